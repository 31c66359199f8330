"""Errors that the user can mend; a tool shows them as one line without traceback."""


class UserError(Exception):
    """A mistake in a config, a file or the command line. Its text says what, where, what is allowed and the fix."""


class NonFiniteLossError(UserError):
    """Training met a loss or a weight that isn't finite."""


def first_line(error: BaseException) -> str:
    """An error's class and the first line of its text."""
    lines = str(error).strip().splitlines()
    return f'{type(error).__name__}: {lines[0] if lines else "no message"}'


def printable(text: str) -> str:
    """A text with its control characters spelled out, but for line breaks: a terminal would obey them."""
    return ''.join(char if char.isprintable() or char == '\n' else repr(char)[1:-1] for char in text)
