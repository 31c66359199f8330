"""Files that are written as a whole or not at all, and never over the user's; and records that are read again."""
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import UserError, first_line


@contextmanager
def written_whole(path: str | os.PathLike) -> Iterator[Path]:
    """Give a file beside ``path`` to write to; it is renamed to ``path`` when the block ends without an error."""
    unfinished = Path(f'{path}.part')
    yield unfinished
    os.replace(unfinished, path)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file, all of it or nothing."""
    with written_whole(path) as file:
        file.write_text(text, encoding='utf-8')


def check_new_file(path: str) -> None:
    """Raise a UserError if something is in the place of a file that is to be written."""
    if os.path.lexists(path):
        raise UserError(f'{path}: exists already; name another file')


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
