"""Files that are written as a whole or not at all, and never over the user's; and records that are read again."""
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmengine.fileio import LocalBackend, register_backend
from safetensors import SafetensorError

from .errors import UserError, first_line


@contextmanager
def written_whole(path: str | os.PathLike) -> Iterator[Path]:
    """Give a file beside ``path`` to write to; it is renamed to ``path`` when the block ends without an error.

    Raises:
        UserError: it can't be written, as the disk is full for instance; nothing is left of it then.
    """
    unfinished = Path(f'{path}.part')
    try:
        yield unfinished
        with unfinished.open('rb') as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except (OSError, RuntimeError, SafetensorError) as error:  # PyTorch's writer says RuntimeError
        reason = getattr(error, 'strerror', None) or first_line(error)
        raise UserError(f'{path}: can\'t be written ({reason})') from error
    finally:
        unfinished.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file, all of it or nothing."""
    with written_whole(path) as file:
        file.write_text(text, encoding='utf-8')


def check_new_file(path: str) -> None:
    """Raise a UserError if something is in the place of a file that is to be written, or it has no folder to be in."""
    if os.path.lexists(path):
        raise UserError(f'{path}: exists already; name another file')
    folder = os.path.dirname(path) or '.'
    if not os.path.isdir(folder):
        raise UserError(f'{path}: there is no folder {folder}; make it, or name another file')
    if not os.access(folder, os.W_OK):
        raise UserError(f'{path}: the folder {folder} can\'t be written to; name another file')


def read_record(path: Path, make: Callable[[Any], Any] = lambda content: content) -> Any:
    """What ``make`` makes of the contents of a JSON file that a tool has written.

    Raises:
        UserError: the file can't be read, or isn't what the tool has written.
    """
    try:
        return make(json.loads(path.read_text(encoding='utf-8')))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f'{path}: truncated or changed ({first_line(error)}); delete it to have it made '
                        'again') from error


@register_backend('whole')
class WholeFiles(LocalBackend):
    """MMEngine's local files, each of which appears as a whole; what is to be removed stays until :meth:`clear`."""

    def __init__(self) -> None:
        self.outdated: list[str] = []

    def put(self, obj: bytes, filepath: str | os.PathLike) -> None:
        os.makedirs(os.path.dirname(filepath), exist_ok=True)
        with written_whole(filepath) as file:
            file.write_bytes(obj)

    def remove(self, filepath: str | os.PathLike) -> None:
        self.outdated.append(os.fspath(filepath))

    rmtree = remove

    def clear(self, but: Sequence[str | None]) -> None:
        """Remove what is outdated, except these."""
        for path in {*self.outdated} - {*but}:
            super().rmtree(path) if os.path.isdir(path) else Path(path).unlink(missing_ok=True)
        self.outdated.clear()
