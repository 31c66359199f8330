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
            the versions needed and what was found, and the install commands.
    """
    problems = []
    for name, minimum in MINIMUM_VERSIONS.items():
        try:
            found = importlib.import_module(name).__version__
            if name == 'mmcv':
                importlib.import_module('mmcv.ops')  # missing in mmcv-lite, broken if compiled for another torch
        except (ImportError, AssertionError) as error:  # mmdet and mmcv assert each other's versions when imported
            problems.append(f'{name}: {error}')
        else:
            if Version(found) < Version(minimum):
                problems.append(f'{name}: found {found}')
    if problems:
        needed = ', '.join(f'{name} >= {minimum}' for name, minimum in MINIMUM_VERSIONS.items())
        listing = '\n'.join(f'  - {problem}' for problem in problems)
        raise ImportError(f'rl_mmdet needs {needed}:\n{listing}\n{INSTALL_COMMANDS}')
