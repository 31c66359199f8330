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


class FailingFinder:
    """Makes one import fail with one error."""

    def __init__(self, name, error):
        self.name, self.error = name, error

    def find_spec(self, fullname, path=None, target=None):
        if fullname == self.name:
            raise self.error


def fail_import(monkeypatch, name, error):
    monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, 'meta_path', [FailingFinder(name, error), *sys.meta_path])


def test_check_passes_with_minimum_versions(dependencies, installed):
    for name, minimum in dependencies.MINIMUM_VERSIONS.items():
        installed(name, minimum)
    dependencies.check_dependencies()


def test_check_passes_with_local_and_release_candidate_versions(dependencies, installed):
    installed('mmcv', '2.3.6+cu130')
    installed('mmengine', '0.10.8rc1')
    dependencies.check_dependencies()


@pytest.mark.parametrize('name', ['mmengine', 'mmcv', 'mmdet'])
def test_check_names_missing_package(dependencies, installed, name):
    installed(name, None)
    with pytest.raises(ImportError, match=rf'\n  - {name}: not installed, .* or later is needed\n'):
        dependencies.check_dependencies()


@pytest.mark.parametrize(('name', 'version'), [('mmengine', '0.7.4'), ('mmcv', '1.7.2'), ('mmdet', '2.28.2')])
def test_check_gives_found_and_needed_version_of_old_package(dependencies, installed, name, version):
    installed(name, version)
    minimum = dependencies.MINIMUM_VERSIONS[name]
    with pytest.raises(ImportError, match=f'{name}: found {version}, {minimum} or later is needed'):
        dependencies.check_dependencies()


def test_check_names_all_problems_and_the_install_commands_in_one_error(dependencies, installed):
    installed('mmengine', '0.1.0')
    installed('mmdet', None)
    with pytest.raises(ImportError) as caught:
        dependencies.check_dependencies()
    message = str(caught.value)
    assert message.count('\n  - ') == 2
    assert 'mmengine: found 0.1.0' in message
    assert 'mmdet: not installed' in message
    assert 'make setup' in message
    assert 'pip install --no-build-isolation "rl_mmdet[onedl]"' in message


def test_check_explains_mmcv_without_compiled_ops(dependencies, installed):
    installed('mmcv.ops', None)
    with pytest.raises(ImportError, match=r'mmcv: found 2\.1\.0, but its compiled ops are missing \(mmcv-lite'):
        dependencies.check_dependencies()


def test_check_turns_a_failed_version_assertion_into_its_own_error(dependencies, installed, monkeypatch):
    error = AssertionError('MMCV==2.2.0 is used but incompatible.\nPlease install mmcv>=2.0.0rc4, <2.2.0.')
    fail_import(monkeypatch, 'mmdet', error)
    with pytest.raises(ImportError, match=r'mmdet: cannot be imported \(AssertionError: MMCV==2\.2\.0 is used.*<2\.2'):
        dependencies.check_dependencies()


def test_check_names_the_cause_when_a_dependency_of_a_package_is_missing(dependencies, installed, monkeypatch):
    fail_import(monkeypatch, 'mmcv', ModuleNotFoundError("No module named 'cv2'", name='cv2'))
    with pytest.raises(ImportError, match=r"mmcv: cannot be imported \(ModuleNotFoundError: No module named 'cv2'\)"):
        dependencies.check_dependencies()


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
    assert '  - mmdet: not installed' in result.stderr
    assert 'During handling' not in result.stderr
