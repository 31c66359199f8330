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
SOURCES = ['rl_mmdet', 'configs', 'tools', 'requirements', 'setup.py', 'pyproject.toml', 'MANIFEST.in', 'README.md',
           'LICENSE', 'model-index.yml']


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


@pytest.fixture(scope='module')
def installed(tree):
    """A fresh environment with the built wheel and the other packages of this one, without the project's tree."""
    environment = tree.parent / 'environment'
    venv.create(environment, symlinks=True)
    (site,) = environment.glob('lib/python3*/site-packages')
    with zipfile.ZipFile(build(tree, 'wheel')) as archive:
        archive.extractall(site)
    (site / 'others.pth').write_text(sysconfig.get_path('purelib'))

    def run(*arguments):
        result = subprocess.run([environment / 'bin' / 'python', *arguments], cwd=tree.parent, capture_output=True,
                                text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout
    return run, site / 'rl_mmdet' / '.mim'


def source_files(folder):
    return {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob('*')
            if path.is_file() and '__pycache__' not in path.parts and '.mim' not in path.parts}


def test_wheel_holds_every_module(wheel):
    assert source_files('rl_mmdet') <= set(wheel)


@pytest.mark.parametrize('folder', ['configs', 'tools'])
def test_wheel_holds_copies_for_mim(wheel, folder):
    wanted = {f'rl_mmdet/.mim/{name}' for name in source_files(folder)}
    assert wanted, f'{folder}/ is empty'
    assert wanted <= set(wheel)


def test_wheel_holds_model_index_and_nothing_outside_the_package(wheel):
    assert 'rl_mmdet/.mim/model-index.yml' in wheel
    assert {name.split('/')[0] for name in wheel if '.dist-info' not in name} == {'rl_mmdet'}


def test_installed_wheel_is_the_one_that_is_imported(installed):
    run, mim = installed
    assert run('-c', 'import rl_mmdet; print(rl_mmdet.__file__)').strip().endswith(str(mim.parent / '__init__.py'))


def test_installed_wheel_reads_every_config_and_finds_it_in_the_index(installed):
    run, mim = installed
    code = """if True:
        import sys, pathlib, yaml
        from mmengine.config import Config
        mim = pathlib.Path(sys.argv[1])
        configs = {str(p.relative_to(mim)) for p in mim.glob('configs/[a-z]*/*.py')}
        for config in configs:
            assert 'model' in Config.fromfile(mim / config), config
        index = yaml.safe_load((mim / 'model-index.yml').read_text())['Import']
        listed = {m['Config'] for file in index for m in yaml.safe_load((mim / file).read_text())['Models']}
        assert listed <= configs, listed - configs
        print(len(listed))
    """
    assert int(run('-c', code, str(mim)).split()[-1]) > 20


def test_installed_wheels_tools_take_its_configs(installed):
    run, mim = installed
    table = run(mim / 'tools/blocks.py', mim / 'configs/rl_resnet/faster-rcnn_rl-r50-k2_fpn_1x_coco.py')
    assert table.count('replaced') > 4
    assert '--work-dir' in run(mim / 'tools/train.py', '--help')


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


def test_requirements_pin_every_package_exactly():
    for file in (ROOT / 'requirements').glob('*.txt'):
        for line in file.read_text().splitlines():
            if line and not line.startswith('#'):
                assert re.fullmatch(r'[a-z0-9-]+==[0-9][0-9.]*(; python_version (<|>=) "3\.11")?', line), line


def test_extras_hold_the_openmmlab_packages_and_hard_requirements_do_not(wheel):
    (metadata,) = (content.decode() for name, content in wheel.items() if name.endswith('.dist-info/METADATA'))
    lines = re.findall(r'^Requires-Dist: .*(?:mmdet|mmcv|mmengine).*$', metadata, re.MULTILINE)
    assert len(lines) == 6
    assert all(re.search(r'extra == "(onedl|openmmlab)"', line) for line in lines)
