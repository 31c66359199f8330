"""Random mistakes in a config, as a hand makes them: a key misspelt, left out or moved, a value of another kind."""
import copy
import math
import random
from collections.abc import Iterator
from typing import Any

VALUES = (None, 'x', '', -1, 0, 2, 0.5, 1e30, math.nan, True, [], {}, [1, 'a'], {'type': 'Nothing'}, {'a': 1})
"""What is put in a value's place. None of them is so large that a run which takes it needs hours or gigabytes."""
LEFT_ALONE = ('work_dir', 'launcher', 'data', 'resize', 'workers', 'train_pipeline', 'test_pipeline', 'data_root',
              'dataset_type', 'backend_args', 'vis_backends', 'test_dataloader', 'test_cfg', 'test_evaluator')
"""What a user gives otherwise, the config's own variables, what a training doesn't
use."""


def mutation(settings: dict, seed: int) -> tuple[str, str, str | None]:
    """A config with one mistake in it.

    Args:
        settings: the config's settings: plain dicts, lists and values; they stay as they are. The config gets them all
            but ``LEFT_ALONE``.
        seed: of the mistake.

    Returns:
        The config's text, the change as a user would describe it, and the key that now is misspelt, or None.
    """
    settings = copy.deepcopy({key: settings[key] for key in settings if key not in LEFT_ALONE})
    change, wrong = mutate_(settings, random.Random(seed))
    lines = [f'{key} = {value!r}' for key, value in settings.items()]
    return '\n'.join(["nan = float('nan')", *lines, 'del nan', '']), change, wrong


def mutate_(settings: dict, draw: random.Random) -> tuple[str, str | None]:
    """Put one mistake into a config's settings.

    Args:
        settings: plain dicts, lists and values; changed in place.
        draw: where and which.

    Returns:
        The change as a user would describe it, and a key that now is misspelt, or None.
    """
    place, key, holder = draw.choice(list(_places(settings)))
    kind = draw.choice(('value', 'value', 'value', 'misspelt', 'left out', 'letter'))
    if kind == 'misspelt' and isinstance(key, str):
        wrong = misspelt(key, draw)
        if wrong not in holder:
            holder[wrong] = holder.pop(key)
            return f'{place} called {wrong}', wrong
    if kind == 'letter' and isinstance(holder[key], str) and len(holder[key]) > 1:
        holder[key] = misspelt(holder[key], draw)
        return f'{place}={holder[key]!r}', None
    if kind == 'left out':
        del holder[key]
        return f'no {place}', None
    holder[key] = draw.choice([value for value in VALUES if value != holder[key]])
    return f'{place}={holder[key]!r}', None


def misspelt(word: str, draw: random.Random) -> str:
    """A word with two letters swapped, or one left out, doubled or wrong."""
    at = draw.randrange(len(word))
    letters = {word[:at] + word[at + 1:], word[:at] + word[at] * 2 + word[at + 1:], word[:at] + 'q' + word[at + 1:],
               word[:at] + word[at:at + 2][::-1] + word[at + 2:]} - {word, ''}
    return draw.choice(sorted(letters))


def _places(value: Any, place: str = '') -> Iterator[tuple[str, Any, Any]]:
    """Dotted key, last key and holder of every setting."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        inner = f'{place}.{key}' if place else str(key)
        if key == '_scope_':
            continue
        yield inner, key, value
        if isinstance(value[key], (dict, list)):
            yield from _places(value[key], inner)
