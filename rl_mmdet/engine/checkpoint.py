"""Checkpoints that a model is to load: what doesn't fit is refused."""
import re
from collections.abc import Mapping, Sequence

from mmcv.cnn.bricks.conv_ws import ConvAWS2d
from torch import nn

from ..models.layouts import never_pretrained, own_layout, state_dict_of, translates
from ..replacement import adapt_state_dict
from ..replacement.start import LoadReport, other_replacement
from .errors import UserError
from .reading import read_checkpoint
from .saved_settings import other_operator


def check_checkpoint(model: nn.Module, path: str, *, prefix: str = '', ignore: Sequence[str] = (),
                     allow_pickle: bool = False) -> LoadReport:
    """Compare a checkpoint with the model that is going to load it.

    These differences are expected: weights of removed blocks, which initialise the computing layers; tensors beside the
    model, such as an ImageNet classifier's ``fc``; and missing tensors of modules that ImageNet models don't have, such
    as DCN offsets, plugins or a pyramid's norms. A backbone's weights may be in any layout that it loads.

    Args:
        model: the module whose keys the checkpoint (below ``prefix``) should have.
        path, allow_pickle: as for :func:`~rl_mmdet.engine.read_checkpoint`.
        ignore: regular expressions of keys to leave out on purpose.

    Raises:
        UserError: the checkpoint is a replaced model's, and other blocks are replaced here, or in another way; or
            another tensor is missing, left over or of another shape. The first few are named.
    """
    checkpoint = read_checkpoint(path, allow_pickle)
    tensors = state_dict_of(checkpoint, prefix)
    if not tensors:
        raise UserError(f'{path}: holds no tensor' + (f' below {prefix!r}' if prefix else ''))
    try:
        tensors = own_layout(model, tensors) if translates(model) else tensors
    except ValueError as error:
        raise UserError(f'{path}: {error}') from error
    _, report = adapt_state_dict(model, tensors)
    new = _modules_without_pretraining(model) + never_pretrained(model)
    differences = _not_ignored(other_replacement(model, tensors, report, new), ignore)
    if not differences and not report.fits:
        differences = other_operator(model, checkpoint)
    if differences:
        raise UserError(f'{path}: it was saved from a model with another replacement: {_first(differences)}. Give both '
                        'models the same replacement, or materialize the checkpoint first (tools/materialize.py)')
    problems = _not_ignored(_unexplained(model, report, new), ignore)
    if problems:
        raise UserError(f'{path}: {len(problems)} tensors don\'t fit the model: {_first(problems)}. Is it from another '
                        'architecture? To leave tensors out on purpose, add --ignore-keys REGEX')
    return report


def _unexplained(model: nn.Module, report: LoadReport, new: tuple[str, ...]) -> dict[str, str]:
    """A text for each tensor that differs in a way that isn't expected, by key."""
    roots = {name for name, _ in model.named_children()}
    problems = {key: f'{key} has shape {old}, the model needs {own}' for key, (old, own) in report.mismatched.items()}
    problems.update({key: f'{key} is missing' for key in report.missing if not key.startswith(new)})
    problems.update({key: f'{key} has no place in the model'
                     for key in report.left_over if key.split('.')[0] in roots})
    return problems


def _not_ignored(texts: Mapping[str, str], ignore: Sequence[str]) -> list[str]:
    """The texts whose keys match none of the patterns."""
    return [text for key, text in texts.items() if not any(re.search(pattern, key) for pattern in ignore)]


def _first(texts: Sequence[str]) -> str:
    more = f' and {len(texts) - 4} more' if len(texts) > 4 else ''
    return '; '.join(texts[:4]) + more


def _modules_without_pretraining(model: nn.Module) -> tuple[str, ...]:
    """Key prefixes of modules that ImageNet models don't have: DCN offsets, plugins, ConvAWS's scale and shift."""
    names = []
    for name, module in model.named_modules():
        if isinstance(module, ConvAWS2d):
            names += [f'{name}.weight_gamma', f'{name}.weight_beta']
        if name.endswith('conv_offset'):
            names.append(f'{name}.')
        for position in ('after_conv1', 'after_conv2', 'after_conv3'):
            names += [f'{name}.{plugin}.' for plugin in getattr(module, f'{position}_plugin_names', [])]
    return tuple(names)
