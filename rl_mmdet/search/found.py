"""What a search has found."""
from typing import Any, NamedTuple


class Found(NamedTuple):
    """What a search has found.

    Args:
        setting: the ordinary setting that takes the place of the search's in a config: a ``plan`` or a ``transfer``.
        text: for the log.
    """
    setting: dict[str, dict[str, Any]]
    text: str
