"""Errors that the user can mend; a tool shows them as one line without traceback."""
import json
import os
import sys
import time


class UserError(Exception):
    """A mistake in a config, a file or the command line. Its text says what, where, what is allowed and the fix."""


class NonFiniteLossError(UserError):
    """Training met a loss or a weight that isn't finite."""


def show(line: str) -> None:
    """Write a line to stderr, with the rank where there are several processes, and let torchrun end with it, too.

    Control characters are spelled out. torchrun prints some forty lines when a process fails; the last of them show
    what stands in its error file.
    """
    line = printable(line)
    if int(os.environ.get('WORLD_SIZE', '1')) > 1:
        line = f'[rank {os.environ.get("RANK", "?")}] {line}'
    sys.stderr.write(f'{line}\n')
    file = os.environ.get('TORCHELASTIC_ERROR_FILE')
    if file:
        with open(file, 'w', encoding='utf-8') as out:
            json.dump(dict(message=dict(message=line, extraInfo=dict(timestamp=str(int(time.time()))))), out)


def first_line(error: BaseException) -> str:
    """An error's class and the first line of its text."""
    lines = str(error).strip().splitlines()
    return f'{type(error).__name__}: {lines[0] if lines else "no message"}'


def printable(text: str) -> str:
    """A text with its control characters spelled out, but for line breaks: a terminal would obey them."""
    return ''.join(char if char.isprintable() or char == '\n' else repr(char)[1:-1] for char in text)
