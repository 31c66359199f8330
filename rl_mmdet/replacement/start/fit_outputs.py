"""Fitting computing layers to what the removed blocks did."""
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_flatten

from ..block_structure import copy_around_parameters
from ..computing_layer import ComputingLayer, computing_layers
from .norms import recalibrate_norms_, stale_norms

Run = Callable[[nn.Module, Any], Any]
Reduce = Callable[[Tensor], Any]


class Unexplained(NamedTuple):
    r"""Which part of a block's effect its computing layer doesn't reproduce, before and after the fit, no unit.

    :math:`e = \lVert C(h) - B(h) \rVert / \lVert B(h) - h \rVert`: 0 reproduces the block, 1 is as if it were left out.
    """
    before: float
    after: float


def layers_to_fit(model: nn.Module) -> dict[str, ComputingLayer]:
    """The computing layers that still have their removed block, by name."""
    return {name: layer for name, layer in computing_layers(model).items() if layer.removed.block is not None}


def fit_outputs_(model: nn.Module, batches: Sequence[Any], steps: int = 200, lr: float = 0.03,
                 run: Run | None = None, reduce: Reduce | None = None,
                 track: Callable[[Iterable[int]], Iterable[int]] = iter, keep: bool = False) -> dict[str, Unexplained]:
    r"""Fit each computing layer of ``model`` to the block that it replaces, in place; then drop the removed blocks.

    .. math:: \min_φ \frac{\lVert C(h; φ) - B(h') \rVert^2}{\lVert B(h') - h' \rVert^2}

    over all parameters φ that the layer itself learns, by Adam. Its input h is what the replaced model gives it, with
    the layers before it as far as they are fitted; the target B(h') is what the model had behind that block before
    anything was replaced. So a layer also makes up for what the layers before it got wrong. All layers are fitted in
    the same steps, each by its own loss; kept blocks don't change.

    Dropout and the like are off, and kept norms run on their statistics. BatchNorm of a replaced block runs on the
    batch's; if it is in eval mode in training, its statistics are recalibrated at the end. A layer that the fit
    doesn't improve keeps its start.

    Args:
        model: replaced with ``start=dict(type='FitOutputs')`` from trained weights, or loaded with a baseline's
            checkpoint since, in the mode in which it is trained; comes back in it.
        batches: what ``run`` takes; used in turn.
        steps, lr: see :class:`~.starts.FitOutputs`.
        run: ``run(model, batch)`` runs a model on one of the batches, by default ``model(batch)``.
        reduce: averages a tensor over processes in place (DDP); None for a single process.
        track: goes through the steps, for instance with a progress bar.
        keep: keep the removed blocks.

    Returns:
        What is left unexplained, by the block's name; nothing where no layer has its removed block any more.

    Raises:
        ValueError: no batch, or an e can't be computed: a block never runs, changes nothing or gives numbers that
            aren't finite.

    Source: outputs of a block rather than its weights, on inputs that the changed model gives: as in BRECQ,
    arXiv 2102.05426.
    """
    layers = layers_to_fit(model)
    if not layers:
        return {}
    if not batches:
        raise ValueError('fit_outputs_: no batch to fit to')
    run = run or (lambda whole, batch: whole(batch))
    stale = stale_norms(model)
    with _ready_to_fit(model, layers):
        reference = _unreplaced(model)

        def receive(batch: Any, use: Use) -> None:
            targets = _record(reference, layers, lambda: run(reference, batch))
            with after_each(layers, lambda name, inputs, _: use(name, layers[name], inputs, *next(targets[name]))):
                run(model, batch)

        found = fit_layers_(layers, batches, steps, lr, receive, reduce, track)
    for layer in layers.values():
        layer.fit_wanted = False
        if not keep:
            layer.forget_block_()
    if stale:
        recalibrate_norms_(model, batches, lambda batch: run(model, batch), reduce)
    return found


Use = Callable[[str, ComputingLayer, tuple, Any, Any], None]
"""Gets a block's name, its computing layer, the layer's inputs, and the removed block's inputs and output."""


@torch.no_grad()
def fit_layers_(layers: Mapping[str, ComputingLayer], batches: Sequence[Any], steps: int, lr: float,
                receive: Callable[[Any, Use], None], reduce: Reduce | None = None,
                track: Callable[[Iterable[int]], Iterable[int]] = iter) -> dict[str, Unexplained]:
    """The fit itself, wherever inputs and targets come from. Arguments as for :func:`fit_outputs_`.

    Args:
        layers: to fit, by the block's name.
        receive: runs a batch, and calls the function that it is given for every layer.

    Returns:
        What is left unexplained.
    """
    learned = {name: [value for value in layer.own_parameters().values() if value.requires_grad]
               for name, layer in layers.items()}
    parameters = [parameter for own in learned.values() for parameter in own]
    start = [parameter.clone() for parameter in parameters]
    before = _measure(layers, batches, receive, reduce)
    if not (parameters and steps):
        return {name: Unexplained(error, error) for name, error in before.items()}
    optimizer = torch.optim.Adam(parameters, lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def learn(name: str, layer: ComputingLayer, inputs: tuple, *target: Any) -> None:
        with torch.enable_grad():
            difference, effect = _squares(_call(layer, inputs), *target)
            loss = difference / effect.clamp(min=torch.finfo(effect.dtype).tiny)
            grads = torch.autograd.grad(loss, learned[name], allow_unused=True) if learned[name] else ()
        for parameter, grad in zip(learned[name], grads, strict=True):  # a block may run several times in a batch
            if grad is not None:
                parameter.grad = grad if parameter.grad is None else parameter.grad + grad

    optimizer.zero_grad()
    for step in track(range(steps)):
        receive(batches[step % len(batches)], learn)
        for parameter in parameters if reduce else ():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            reduce(parameter.grad)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    after = _measure(layers, batches, receive, reduce)
    worse = {id(value) for name, own in learned.items() if not after[name] < before[name] for value in own}
    for parameter, value in zip(parameters, start, strict=True):
        if id(parameter) in worse:
            parameter.copy_(value)
    return {name: Unexplained(before[name], min(before[name], after[name])) for name in layers}


def _measure(layers: Mapping[str, ComputingLayer], batches: Iterable[Any], receive: Callable[[Any, Use], None],
             reduce: Reduce | None) -> dict[str, float]:
    """What each layer leaves unexplained over all batches."""
    sums: dict[str, Tensor] = {}

    def add(name: str, layer: ComputingLayer, inputs: tuple, *target: Any) -> None:
        squares = torch.stack(_squares(_call(layer, inputs), *target)).double()
        sums[name] = sums[name] + squares if name in sums else squares

    for batch in batches:
        receive(batch, add)
    for name in layers if reduce else ():
        reduce(sums[name])
    return {name: _error(name, *sums[name].tolist() if name in sums else (0, 0)) for name in layers}


def _error(block: str, difference: float, effect: float) -> float:
    if effect == 0:
        raise ValueError(f'{block} never runs or changes nothing, so there is nothing to compare with; are the '
                         'model\'s weights trained ones?')
    error = math.sqrt(difference / effect) if math.isfinite(difference / effect) else math.nan
    if math.isnan(error):
        raise ValueError(f'the outputs of {block} or of what replaces it aren\'t finite; are the model\'s weights '
                         'trained ones, and the batches finite?')
    return error


def _squares(made: Any, before: Any, wanted: Any) -> list[Tensor]:
    """The squared norms of C(h) - B(h) and of B(h) - h, or of B(h) where the block changes the shape."""
    sums = [0., 0.]
    for given, goal, start in zip(_tensors(made), _tensors(wanted), _tensors(before), strict=False):
        sums[0] = sums[0] + (given - goal).float().square().sum()
        sums[1] = sums[1] + (goal - start if start.shape == goal.shape else goal).float().square().sum()
    return sums


def _tensors(value: Any) -> list[Tensor]:
    """The tensors in a block's inputs or outputs."""
    return [part for part in tree_flatten(value)[0] if isinstance(part, Tensor)]


def _call(layer: ComputingLayer, inputs: tuple[tuple, dict]) -> Any:
    """The layer's outputs, without the hooks that :func:`after_each` has put on it."""
    return layer.forward(*inputs[0], **inputs[1])


@contextmanager
def _ready_to_fit(model: nn.Module, layers: Mapping[str, ComputingLayer]) -> Iterator[None]:
    """In eval mode, but for the layers' BatchNorms, with layers that learn in every step, those of a teacher, too."""
    modes = [(module, module.training) for module in model.modules()]
    turns = [(layer, layer.turn) for layer in layers.values()]
    frozen = [own for layer in layers.values() for own in layer.own_parameters().values() if not own.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    model.eval()
    for layer in layers.values():
        make_ready_to_fit_(layer)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for layer, turn in turns:
            layer.turn = turn
        for parameter in frozen:
            parameter.requires_grad_(False)


def make_ready_to_fit_(layer: ComputingLayer) -> None:
    """Put a layer into eval mode, but let it learn in every step, and its BatchNorms run on the batch's statistics."""
    layer.eval()
    layer.turn = True
    for norm in layer.modules():
        if isinstance(norm, _BatchNorm):
            norm.train()


def _unreplaced(model: nn.Module) -> nn.Module:
    """The model as it was before blocks were replaced; its parameters *are* the model's."""
    layers, device = layers_to_fit(model), next(model.parameters()).device
    twin = copy_around_parameters(model, *(layer.removed.block for layer in layers.values()))
    for name in layers:
        parent, _, key = name.rpartition('.')
        block = twin.get_submodule(name).removed.block
        twin.get_submodule(parent)._modules[key] = block.to(device).eval()
    return twin


def _record(model: nn.Module, names: Iterable[str], run: Callable[[], Any]) -> dict[str, Iterator[tuple[list, list]]]:
    """Inputs and outputs of each of the named blocks, run by run."""
    blocks = {name: model.get_submodule(name) for name in names}
    found: dict[str, list[tuple[list, list]]] = {name: [] for name in blocks}
    with after_each(blocks, lambda name, inputs, out: found[name].append((_copies(inputs), _copies(out)))):
        run()
    return {name: iter(runs) for name, runs in found.items()}


def _copies(value: Any) -> list[Tensor]:
    """Of a block's inputs or outputs, which the next module may change in place."""
    return [tensor.clone() for tensor in _tensors(value)]


@contextmanager
def after_each(blocks: Mapping[str, nn.Module], call: Callable[[str, tuple, Any], None]) -> Iterator[None]:
    """While the blocks run, call a function with each one's name, inputs and output."""
    def hook(name: str) -> Any:
        return lambda _, args, kwargs, out: call(name, (args, kwargs), out)

    with ExitStack() as stack:
        for name, block in blocks.items():
            stack.callback(block.register_forward_hook(hook(name), with_kwargs=True).remove)
        yield
