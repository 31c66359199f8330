"""``torch.load`` for tensors, plain data and what MMEngine writes beside them, without running code from the file."""
import os
import pickle
import tarfile
from codecs import encode
from collections import Counter
from contextlib import nullcontext
from typing import Any, BinaryIO

import numpy as np
import torch
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer
from torch import _weights_only_unpickler as torchs_unpickler

ZIP_BEGINS = b'PK\x03\x04'
_torch_load = torch.load  # which others may exchange


def load_weights_only(file: str | os.PathLike | BinaryIO, **settings: Any) -> Any:
    """Read a file that ``torch.save`` has written, with further arguments of ``torch.load``.

    Since 2.6 torch lets ``weights_only`` be extended. With older torch an unpickler of our own finds nothing but the
    allowed names. Files from before torch 1.6 aren't zipped; they are older than MMEngine, so what torch allows is
    enough.

    Raises:
        pickle.UnpicklingError: it needs more than that; the message has the missing name behind ``GLOBAL``. Or it is in
            torch's tar format or holds TorchScript, which older torch reads by running what is in there.
    """
    with nullcontext(file) if hasattr(file, 'read') else open(file, 'rb') as opened:
        zipped = _is_zipped(opened)
    if torch.__version__ >= (2, 6):
        with torch.serialization.safe_globals([(value, name) for name, value in _allowed_globals().items()]):
            return _torch_load(file, weights_only=True, **settings)
    if not zipped:
        return _torch_load(file, weights_only=True, **settings)
    return _torch_load(file, weights_only=False, pickle_module=_RestrictedPickle, **settings)


def _is_zipped(file: BinaryIO) -> bool:
    start = file.tell()
    zipped = file.read(len(ZIP_BEGINS)) == ZIP_BEGINS
    file.seek(start)
    if not zipped and tarfile.is_tarfile(file):
        raise pickle.UnpicklingError('a tar archive')
    if zipped and 'constants.pkl' in torch._C.PyTorchFileReader(file).get_all_records():
        raise pickle.UnpicklingError('a TorchScript archive')
    file.seek(start)
    return zipped


class _RestrictedPickle:
    """Stands for the module :mod:`pickle`."""

    class Unpickler(pickle.Unpickler):

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            dtypes = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
            self.allowed = {'torch.device': torch.device, '_codecs.encode': encode, 'builtins.set': set,
                            'collections.Counter': Counter, **dtypes, **torchs_unpickler._get_allowed_globals(),
                            **_allowed_globals()}

        def find_class(self, module: str, name: str) -> Any:
            found = f'{module.replace("__builtin__", "builtins")}.{name}'  # torch.save writes Python 2's name
            if found not in self.allowed:
                raise pickle.UnpicklingError(f'GLOBAL {found} is not allowed')
            return self.allowed[found]


def _allowed_globals() -> dict[str, Any]:
    """What MMEngine's checkpoints hold beside tensors, by the names that stand in the file: NumPy's of 1.x and 2.x."""
    reconstruct, scalar = np.zeros(1).__reduce__()[0], np.float64(0).__reduce__()[0]
    allowed = {'mmengine.logging.history_buffer.HistoryBuffer': HistoryBuffer, 'builtins.getattr': _statistic,
               'mmengine.config.config.ConfigDict': ConfigDict, 'builtins.slice': slice, 'numpy.ndarray': np.ndarray,
               'numpy.dtype': np.dtype}
    for module in ('numpy.core.multiarray', 'numpy._core.multiarray'):
        allowed |= {f'{module}._reconstruct': reconstruct, f'{module}.scalar': scalar}
    classes = {type(np.dtype(code)) for code in np.typecodes['AllInteger'] + np.typecodes['Float'] + '?SU'}
    return allowed | {f'numpy.dtypes.{each.__name__}': each for each in classes}


def _statistic(owner: Any, name: str) -> Any:
    """In the place of ``getattr``, by which a buffer's statistics are saved: gives these and nothing else."""
    if owner is not HistoryBuffer or name not in ('min', 'max', 'current', 'mean'):
        raise pickle.UnpicklingError(f'GLOBAL getattr of {name!r} is not allowed')
    return getattr(owner, name)
