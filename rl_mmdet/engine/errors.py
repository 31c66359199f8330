"""Errors that are the user's to mend: one clear line, no traceback."""


class UserError(Exception):
    """A mistake in a config, a file or the command line. Its text says what, where, what is allowed and the fix."""


class NonFiniteLossError(UserError):
    """Training met a loss or a weight that isn't finite."""
