"""One check for all numbers that a user can set."""
import math
from typing import Any


def check_number(name: str, value: Any, *, whole: bool = False, least: float | None = None,
                 above: float | None = None, most: float | None = None, below: float | None = None,
                 hint: str = '') -> Any:
    """``value``, if it is a number within the bounds; booleans, infinities and NaN are none.

    Args:
        name: what the message calls it, such as ``'EveryKth: k'``.
        value: what the user gave.
        whole: only integers.
        least, above: lower bound, included or excluded.
        most, below: upper bound, included or excluded.
        hint: what to do instead, appended to the message.

    Raises:
        ValueError: it isn't; the message has the name, the value and what is allowed.
    """
    kind = int if whole else (int, float)
    if isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value) and (
            (least is None or value >= least) and (above is None or value > above)
            and (most is None or value <= most) and (below is None or value < below)):
        return value
    bounds = [f'{word} {bound}' for word, bound in (('at least', least), ('above', above), ('at most', most),
                                                    ('below', below)) if bound is not None]
    allowed = ('an integer' if whole else 'a number' if bounds else 'a finite number') + (
        f' of {" and ".join(bounds)}' if whole and bounds else f' {" and ".join(bounds)}' if bounds else '')
    raise ValueError(f'{name} must be {allowed}, got {value!r}' + (f' ({hint})' if hint else ''))
