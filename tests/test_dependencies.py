"""The module is loaded from its file: importing rl_mmdet would run the check before a test can arrange anything."""
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope='module')
def dependencies():
    spec = importlib.util.spec_from_file_location('_dependencies', ROOT / 'rl_mmdet' / '_dependencies.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def installed(monkeypatch):
    """Stand-ins for good versions of the three packages; called with NAME=VERSION, changes one (None: missing)."""

    def set_version(name, version):
        module = None if version is None else ModuleType(name)
        if module is not None:
            module.__version__ = version
        monkeypatch.setitem(sys.modules, name, module)

    for name, version in {'mmengine': '0.10.4', 'mmcv': '2.1.0', 'mmcv.ops': '', 'mmdet': '3.3.0'}.items():
        set_version(name, version)
    return set_version


class RefusingFinder:
    """An mmdet that asserts another mmcv."""

    def find_spec(self, fullname, path=None, target=None):
        assert fullname != 'mmdet', 'MMCV==2.2.0 is used but incompatible.'


def test_minimum_and_local_versions_are_fine(dependencies, installed):
    for name, minimum in dependencies.MINIMUM_VERSIONS.items():
        installed(name, minimum)
    dependencies.check_dependencies()
    installed('mmcv', '2.3.6+cu130')
    dependencies.check_dependencies()


def test_all_that_is_old_missing_or_broken_is_named_with_the_install_commands(dependencies, installed, monkeypatch):
    installed('mmengine', '0.1.0')
    installed('mmcv.ops', None)  # as in mmcv-lite
    monkeypatch.delitem(sys.modules, 'mmdet')
    monkeypatch.setattr(sys, 'meta_path', [RefusingFinder(), *sys.meta_path])
    with pytest.raises(ImportError, match='rl_mmdet needs mmengine >= 0') as caught:
        dependencies.check_dependencies()
    message = str(caught.value)
    for said in ('\n  - mmengine: found 0.1.0\n', '\n  - mmcv: import of mmcv.ops', '\n  - mmdet: MMCV==2.2.0 is used',
                 'make setup', 'pip install --no-build-isolation "rl_mmdet[onedl]"'):
        assert said in message


def run_without(packages, code):
    """Run code in a process of its own, in which these packages can't be imported."""
    missing = f'import sys; sys.modules.update(dict.fromkeys({packages!r})); '
    return subprocess.run([sys.executable, '-c', missing + code], cwd=ROOT, capture_output=True, text=True)


def test_the_method_works_with_torch_and_mmengine_alone():
    packages = ['mmdet', 'mmcv', 'timm', 'torchvision', 'scipy', 'sklearn', 'safetensors']
    result = run_without(packages, 'from rl_mmdet.replacement import find_chains; from torch import nn; '
                         'unit = lambda: nn.TransformerEncoderLayer(4, 1, 4); '
                         'print(list(find_chains(nn.Sequential(nn.Sequential(unit(), unit(), unit())))))')
    assert result.stdout == "['0']\n", result.stderr


@pytest.mark.parametrize('code', ['from rl_mmdet import analysis, engine', 'import rl_mmdet; rl_mmdet.models.RLResNet'])
def test_what_needs_mmdet_fails_without_it_with_one_clear_error(code):
    result = run_without(['mmdet'], code)
    assert result.returncode == 1
    assert 'ImportError: rl_mmdet needs mmengine' in result.stderr
    assert '  - mmdet: ' in result.stderr
    assert 'During handling' not in result.stderr
