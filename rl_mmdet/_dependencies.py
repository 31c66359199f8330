"""The OpenMMLab packages that rl_mmdet stands on, checked at import.

They can't be hard requirements of the distribution: ``onedl-mmdetection`` and ``mmdet`` (likewise mmcv and
mmengine) share an import name, and either is fine. So what counts here is the imported module, not which
distribution it came from.
"""

import importlib

from packaging.version import Version

MINIMUM_VERSIONS = {'mmengine': '0.10.0', 'mmcv': '2.0.0', 'mmdet': '3.0.0'}

INSTALL_COMMANDS = """\
In a clone of rl_mmdet `make setup` installs all of it. Elsewhere:
  pip install torch torchvision "setuptools>=77,<82" wheel ninja packaging
  pip install --no-build-isolation "rl_mmdet[onedl]"
(The second needs torch to be there, and compiles onedl-mmcv's ops where there is no prebuilt wheel. Uninstall
mmengine, mmcv, mmcv-lite and mmdet first if they are there, or keep them and take "rl_mmdet[openmmlab]".)"""


def check_dependencies() -> None:
    """Import mmengine, mmcv with its compiled ops, and mmdet, and compare their versions with the minimum.

    Raises:
        ImportError: one of them is missing, too old or can't be imported. The message names all such packages,
            the versions found and needed, and the install commands.
    """
    problems = [problem for name in MINIMUM_VERSIONS if (problem := _find_problem(name))]
    if problems:
        needed = ', '.join(f'{name} >= {minimum}' for name, minimum in MINIMUM_VERSIONS.items())
        listing = '\n'.join(f'  - {problem}' for problem in problems)
        raise ImportError(f'rl_mmdet needs {needed}:\n{listing}\n{INSTALL_COMMANDS}')


def _find_problem(name: str) -> str | None:
    """What is wrong with the installed package ``name``, in one line, or None."""
    minimum = MINIMUM_VERSIONS[name]
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name:
            return f'{name}: not installed, {minimum} or later is needed'
        return f'{name}: {_cannot_import(error)}'
    except (ImportError, AssertionError) as error:  # mmdet and mmcv assert each other's versions when imported
        return f'{name}: {_cannot_import(error)}'
    if Version(module.__version__) < Version(minimum):
        return f'{name}: found {module.__version__}, {minimum} or later is needed'
    return _find_ops_problem(module.__version__) if name == 'mmcv' else None


def _find_ops_problem(version: str) -> str | None:
    try:
        importlib.import_module('mmcv.ops')
    except ImportError as error:
        return (
            f'mmcv: found {version}, but its compiled ops are missing (mmcv-lite has none) or were compiled for '
            f'another torch: mmcv.ops {_cannot_import(error)}'
        )
    return None


def _cannot_import(error: Exception) -> str:
    cause = ' '.join(str(error).split())
    return f'cannot be imported ({type(error).__name__}: {cause})'
