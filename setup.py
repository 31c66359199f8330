import os
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


class BuildWithMim(build_py):
    """Puts into ``rl_mmdet/.mim`` what the `mim` command looks for there.

    A wheel carries copies, made in the build folder; an editable install gets symlinks in the source tree.
    """

    names = ('configs', 'tools', 'model-index.yml')

    def run(self):
        super().run()
        if self.editable_mode:
            self._link(ROOT / 'rl_mmdet' / '.mim')
        else:
            self._copy(Path(self.build_lib) / 'rl_mmdet' / '.mim')

    def _link(self, mim):
        mim.mkdir(exist_ok=True)
        for name in self.names:
            link = mim / name
            link.unlink(missing_ok=True)
            link.symlink_to(os.path.relpath(ROOT / name, mim))

    def _copy(self, mim):
        shutil.rmtree(mim, ignore_errors=True)  # an earlier build may have left files that are gone by now
        mim.mkdir()
        for name in self.names:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, mim / name, ignore=shutil.ignore_patterns('__pycache__', '.*'))
            else:
                shutil.copy(source, mim / name)


def read_version():
    scope = {}
    exec((ROOT / 'rl_mmdet' / 'version.py').read_text(), scope)
    return scope['__version__']


setup(
    name='rl_mmdet',
    version=read_version(),
    description='Replacement Learning for MMDetection',
    long_description=(ROOT / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    author='rl_mmdet authors',
    license='Apache-2.0',
    python_requires='>=3.10',
    packages=find_packages(include=['rl_mmdet', 'rl_mmdet.*']),
    py_modules=['rl_mmdet_cli'],
    entry_points=dict(console_scripts=['rl-mmdet = rl_mmdet_cli:main']),
    include_package_data=True,
    cmdclass={'build_py': BuildWithMim},
    install_requires=[
        'jinja2',
        'matplotlib',
        'numpy',
        'packaging',
        'rich',
        'safetensors',
        'scikit-learn',
        'scipy>=1.11',
        'timm>=1.0.16',
        'torch>=2.1',
        'torchvision',
        'tqdm',
    ],
    # Either of the two, they share their import names: see rl_mmdet/_dependencies.py. Both are tested, with the
    # versions in requirements/, the openmmlab ones with the oldest torch and timm above.
    extras_require={
        'onedl': [
            'onedl-mmdetection>=3.5',
            'onedl-mmcv>=2.3',
            'onedl-mmengine>=0.10.8',
            'torch<2.14',
        ],
        'openmmlab': [
            'mmdet>=3.0.0',
            'mmcv>=2.0.0,<2.2',  # mmdet 3.3 refuses later ones
            'mmengine>=0.10.0',
            'numpy<2',  # for which mmcv 2.1 and its torch were built
        ],
        # For configs/pretrain alone. To go with `openmmlab`, install mmpretrain>=1.2 in its place.
        'pretrain': [
            'onedl-mmpretrain>=1.3',
        ],
        # For tools/export.py alone.
        'deploy': [
            'onnx>=1.16',
            'onnxruntime>=1.18',
            'onnxscript>=0.5',
        ],
        # For `make docs`.
        'docs': [
            'furo',
            'myst-parser>=5',
            'sphinx>=8',
            'sphinx-copybutton',
        ],
    },
    zip_safe=False,
)
