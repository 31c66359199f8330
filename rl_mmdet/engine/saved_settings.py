"""The replacement that a checkpoint was trained with, from the config that MMEngine saves in it; its code isn't run."""
import ast
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..replacement import OPERATORS, computing_layers
from ..replacement.operators import Operator
from ..replacement.registry import build_setting
from .reading import meta_of

STARTS = ('scale',)
"""Settings of operators that say only with which values training begins."""


def other_operator(model: nn.Module, checkpoint: Mapping[str, Any]) -> list[str]:
    """How the operator that a checkpoint was trained with differs from the model's; empty if it doesn't, or is unknown.

    Keys and shapes don't show it where the two learn the same tensors, as SlimBlocks of two widths do.
    """
    replacement = _saved_replacement(checkpoint)
    here = next((layer.operator for layer in computing_layers(model).values()), None)
    if replacement is None or here is None:
        return []
    try:
        there = build_setting(OPERATORS, replacement.get('operator'), default='FullBlock')
    except (TypeError, ValueError):  # saved by another version
        return []
    return [] if _form(there) == _form(here) else [f'the operator is {there} there and {here} here']


def _form(operator: Operator) -> tuple[type, dict[str, Any]]:
    """What an operator is, apart from where it starts."""
    return type(operator), {name: value for name, value in vars(operator).items() if name not in STARTS}


def _saved_replacement(checkpoint: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The one ``replacement`` in the saved config; None without a config, or where it has none or several."""
    text = meta_of(checkpoint).get('cfg')
    try:
        found = [_value(node.value) for node in ast.walk(ast.parse(text or '')) if isinstance(node, ast.keyword)
                 and node.arg == 'replacement']
    except (SyntaxError, ValueError, TypeError):
        return None
    return found[0] if len(found) == 1 and isinstance(found[0], Mapping) else None


def _value(node: ast.expr) -> Any:
    """The value of an expression of literals and ``dict(...)``.

    Raises:
        ValueError: it has something else in it.
    """
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == 'dict' and not node.args:
        return {keyword.arg: _value(keyword.value) for keyword in node.keywords}
    return ast.literal_eval(node)
