"""Checkpoints that a model is to load: what doesn't fit is refused."""
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..models.layouts import never_pretrained, own_layout, state_dict_of, translates
from ..replacement.start import LoadReport, other_replacement
from ..replacement.start.checkpoint import listed
from .errors import UserError, first_line
from .reading import read_checkpoint
from .saved_settings import other_operator

MISMATCH = re.compile(r'size mismatch for (\S+): copying a param with shape (.*?) from checkpoint, '
                      r'the shape in current model is (.*?)\.$', re.M)
"""How PyTorch says that a tensor has another shape."""
COUNTER = 'num_batches_tracked'
"""BatchNorm's tensor that may be missing; MMEngine doesn't mention it either."""


def load_checkpoint_(model: nn.Module, path: str, *, prefix: str = '', ignore: Sequence[str] = (),
                     allow_pickle: bool = False) -> LoadReport:
    """Load a checkpoint into a model as MMEngine does, and refuse what doesn't fit.

    These differences are expected: weights of removed blocks, which initialise the computing layers; tensors beside the
    model, such as an ImageNet classifier's ``fc``; buffers that the model has but doesn't save; and missing tensors of
    modules that ImageNet models don't have, such as DCN offsets, plugins or a pyramid's norms. A backbone's weights may
    be in any layout that it loads, and any part of the model may rename them.

    Args:
        model: the module whose keys the checkpoint (below ``prefix``) should have.
        path, allow_pickle: as for :func:`~rl_mmdet.engine.read_checkpoint`.
        ignore: regular expressions of keys to leave out on purpose.

    Returns:
        What became of the tensors.

    Raises:
        UserError: the checkpoint is a replaced model's, and other blocks are replaced here, or in another way; or
            another tensor is missing, left over or of another shape. The first few are named. The model may have been
            loaded in part then.
    """
    checkpoint = read_checkpoint(path, allow_pickle)
    tensors = state_dict_of(checkpoint, prefix)
    if not tensors:
        raise UserError(f'{path}: holds no tensor' + (f' below {prefix!r}' if prefix else ''))
    try:
        report = _load_(model, own_layout(model, tensors) if translates(model) else tensors)
    except ValueError as error:
        raise UserError(f'{path}: {error}') from error
    new = _modules_without_pretraining(model) + never_pretrained(model)
    differences = _not_ignored(other_replacement(model, report, new), ignore)
    if not differences and not report.initialised:
        differences = other_operator(model, checkpoint)
    if differences:
        raise UserError(f'{path}: it was saved from a model with another replacement: {listed(differences, 4, "; ")}'
                        '. Give both models the same replacement, or materialize the checkpoint first '
                        '(tools/materialize.py)')
    problems = _not_ignored(_unexplained(model, report, new), ignore)
    if problems and not report.mismatched and all(key.endswith(COUNTER) for key in report.loaded):
        raise UserError(f'{path}: none of its {len(tensors)} tensors is the model\'s: its keys begin with '
                        f'{_beginnings(tensors)}, the model\'s with {_beginnings(model.state_dict())}. Of another '
                        'model an init_cfg takes a part, by prefix=\'...\'')
    if problems:
        raise UserError(f'{path}: {len(problems)} tensors don\'t fit the model: {listed(problems, 4, "; ")}. Is it '
                        'from another architecture? To leave tensors out on purpose, add --ignore-keys REGEX')
    return report


def _load_(model: nn.Module, tensors: Mapping[str, Tensor]) -> LoadReport:
    """Load a state dict as far as it fits; what PyTorch says on its keys, and the backbones on their removed blocks."""
    found = LoadReport()

    def note(_: nn.Module, keys: Any) -> None:
        found.missing[:], found.left_over[:] = keys.missing_keys, keys.unexpected_keys

    hook = model.register_load_state_dict_post_hook(note)
    try:
        model.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        mismatches = MISMATCH.findall(str(error))
        if not mismatches:
            raise ValueError(first_line(error)) from error
        found.mismatched.update({key: (_shape(old), _shape(own)) for key, old, own in mismatches})
    finally:
        hook.remove()
    for name, module in model.named_modules():
        inner = getattr(module, 'load_report', None) or LoadReport()
        place = f'{name}.' if name else ''
        found.initialised += [place + each for each in inner.initialised]
        for part in ('held', 'mismatched'):
            getattr(found, part).update({place + key: value for key, value in getattr(inner, part).items()})
    absent = {*found.missing, *found.mismatched}
    found.loaded = [key for key in model.state_dict() if key not in absent]
    found.missing = [key for key in found.missing if not key.endswith(COUNTER)]
    return found


def _shape(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r'\d+', text)))


def _beginnings(keys: Iterable[str]) -> str:
    """The first parts of keys."""
    return ', '.join(list(dict.fromkeys(key.split('.')[0] for key in keys))[:4])


def _unexplained(model: nn.Module, report: LoadReport, new: tuple[str, ...]) -> dict[str, str]:
    """A text for each tensor that differs in a way that isn't expected, by key."""
    roots = {name for name, _ in model.named_children()}
    unsaved = dict(model.named_buffers()).keys() - model.state_dict().keys()
    problems = {key: f'{key} has shape {old}, the model needs {own}' for key, (old, own) in report.mismatched.items()}
    problems.update({key: f'{key} is missing' for key in report.missing if not key.startswith(new)})
    problems.update({key: f'{key} has no place in the model'
                     for key in report.left_over if key.split('.')[0] in roots and key not in unsaved})
    return problems


def _not_ignored(texts: Mapping[str, str], ignore: Sequence[str]) -> list[str]:
    """The texts whose keys match none of the patterns."""
    return [text for key, text in texts.items() if not any(re.search(pattern, key) for pattern in ignore)]


def _modules_without_pretraining(model: nn.Module) -> tuple[str, ...]:
    """Key prefixes of modules that ImageNet models don't have: DCN offsets and plugins."""
    names = []
    for name, module in model.named_modules():
        if name.endswith('conv_offset'):
            names.append(f'{name}.')
        for position in ('after_conv1', 'after_conv2', 'after_conv3'):
            names += [f'{name}.{plugin}.' for plugin in getattr(module, f'{position}_plugin_names', [])]
    return tuple(names)
