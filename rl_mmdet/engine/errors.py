"""Errors that the user can mend; a tool shows them as one line without traceback."""


class UserError(Exception):
    """A mistake in a config, a file or the command line. Its text says what, where, what is allowed and the fix."""


class NonFiniteLossError(UserError):
    """Training met a loss or a weight that isn't finite."""
