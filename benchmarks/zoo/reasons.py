"""Why a model doesn't run, in one short line."""
import re

from rl_mmdet.engine import UserError

RULES = (
    (r'\b(mmpretrain|transformers|detectron2|fairscale|lap)\b', r'needs the package \1'),
    (r'\b(\w+?)(?:_forward)?_impl: implementation for device cpu not found', r"mmcv's \1 has no CPU form"),
)
"""Patterns in an error's text, and what they mean."""


def short_reason(error: BaseException, stage: str = '') -> str:
    """Describe an error without paths and without the chain of classes that the registries put in front of it.

    Args:
        error: what was raised.
        stage: what was going on, such as ``'training step'``.
    """
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    text = re.sub(r'class `\w+` in \S+: ', '', text)
    for pattern, meaning in RULES:
        if found := re.search(pattern, text, re.IGNORECASE):
            return found.expand(meaning)
    text = ' '.join(re.sub(r'(/[\w.+-]+)+/', '', text).split('\n')[0].split())[:200]
    if isinstance(error, FileNotFoundError):
        return f'a file is missing: {text}'
    kind = '' if isinstance(error, UserError) else f'{type(error).__name__}: '
    return (f'{stage}: ' if stage else '') + kind + text.removeprefix('model: ')
