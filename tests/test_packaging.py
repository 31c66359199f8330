"""Wheels, sdists and editable installs are built offline, in a copy of the source tree."""
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ['rl_mmdet', 'rl_mmdet_cli.py', 'configs', 'tools', 'requirements', 'setup.py', 'pyproject.toml',
           'MANIFEST.in', 'README.md', 'LICENSE', 'model-index.yml']


@pytest.fixture(scope='module')
def tree(tmp_path_factory):
    tree = tmp_path_factory.mktemp('packaging') / 'tree'
    tree.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns('.mim', '__pycache__'))
        else:
            shutil.copy(ROOT / name, tree)
    return tree


def build(tree, kind):
    """Call one hook of the build backend in ``tree``, as pip does; returns the file it made."""
    out = tree.parent / kind
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    code = f'import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])'
    result = subprocess.run([sys.executable, '-c', code, str(out)], cwd=tree, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (file,) = out.iterdir()
    return file


@pytest.fixture(scope='module')
def wheel(tree):
    with zipfile.ZipFile(build(tree, 'wheel')) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def source_files(folder):
    return {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob('*')
            if path.is_file() and '__pycache__' not in path.parts and '.mim' not in path.parts}


def test_wheel_holds_every_module(wheel):
    assert source_files('rl_mmdet') <= set(wheel)


def test_wheel_holds_copies_for_mim_and_nothing_outside_the_package(wheel):
    wanted = source_files('configs') | source_files('tools') | {'model-index.yml'}
    assert {f'rl_mmdet/.mim/{name}' for name in wanted} <= set(wheel)
    assert {name.split('/')[0] for name in wheel if '.dist-info' not in name} == {'rl_mmdet', 'rl_mmdet_cli.py'}


def test_installed_wheel_has_its_configs_and_its_command_and_finds_them(tree, wheel):
    """In a fresh environment with the other packages of this one, without the project's tree."""
    (script,) = (content.decode() for name, content in wheel.items() if name.endswith('.dist-info/entry_points.txt'))
    assert 'rl-mmdet = rl_mmdet_cli:main' in script.splitlines()
    environment = tree.parent / 'environment'
    venv.create(environment, symlinks=True)
    (site,) = environment.glob('lib/python3*/site-packages')
    with zipfile.ZipFile(build(tree, 'wheel')) as archive:
        archive.extractall(site)
    (site / 'others.pth').write_text(sysconfig.get_path('purelib'))
    code = """if True:
        import pathlib, sys, yaml
        import rl_mmdet, rl_mmdet_cli
        mim = pathlib.Path(rl_mmdet.__file__).parent / '.mim'
        index = yaml.safe_load((mim / 'model-index.yml').read_text())['Import']
        configs = [m['Config'] for file in index for m in yaml.safe_load((mim / file).read_text())['Models']]
        assert len(configs) > 20 and all((mim / config).is_file() for config in configs)
        sys.argv = ['rl-mmdet', 'blocks', str(mim / 'configs/rl_resnet/faster-rcnn_rl-r50-k2_fpn_1x_coco.py')]
        rl_mmdet_cli.main()
        print(mim)
    """
    result = subprocess.run([environment / 'bin' / 'python', '-I', '-c', code], cwd=tree.parent, capture_output=True,
                            text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[-1] == str(site / 'rl_mmdet' / '.mim')
    assert result.stdout.count('replaced') > 4


def test_sdist_holds_all_that_a_wheel_is_built_from(tree):
    with tarfile.open(build(tree, 'sdist')) as archive:
        names = {name.partition('/')[2] for name in archive.getnames()}
    for folder in ('rl_mmdet', 'configs', 'tools', 'requirements'):
        assert source_files(folder) <= names
    assert {'setup.py', 'pyproject.toml', 'README.md', 'LICENSE', 'model-index.yml'} <= names


def test_editable_install_links_to_the_sources_and_a_later_wheel_keeps_the_links(tree):
    build(tree, 'editable')
    build(tree, 'wheel')
    for name in ('configs', 'tools', 'model-index.yml'):
        link = tree / 'rl_mmdet' / '.mim' / name
        assert link.is_symlink()
        assert link.resolve() == tree / name


@pytest.mark.parametrize('stack', ['onedl', 'openmmlab'])
def test_lock_has_the_pins_of_direct_txt_and_all_that_setup_py_requires(wheel, stack):
    folder = ROOT / 'requirements' / stack
    direct, locked = (dict(re.findall(r'^([\w-]+)==([\w.]+)', (folder / name).read_text(), re.MULTILINE))
                      for name in ('direct.txt', 'lock.txt'))
    assert len(direct) > 20
    assert direct.items() <= locked.items()
    (metadata,) = (content.decode() for name, content in wheel.items() if name.endswith('.dist-info/METADATA'))
    required = re.findall(r'^Requires-Dist: ([\w-]+)(?!.*extra)', metadata, re.MULTILINE)
    assert len(required) > 10
    assert set(required) <= set(locked)


def test_extras_hold_the_openmmlab_packages_and_hard_requirements_do_not(wheel):
    (metadata,) = (content.decode() for name, content in wheel.items() if name.endswith('.dist-info/METADATA'))
    lines = re.findall(r'^Requires-Dist: .*(?:mmdet|mmcv|mmengine).*$', metadata, re.MULTILINE)
    assert len(lines) == 6
    assert all(re.search(r'extra == "(onedl|openmmlab)"', line) for line in lines)
