"""How a block of convolutions and norms in a row is computed, so that it can be run without its own forward."""
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .block_parts import branch, keeps_its_shape
from .sampling import ConvSettings, Part, pick_part, wide

PLAIN = (nn.Conv2d, _BatchNorm, nn.GroupNorm, nn.ReLU, nn.Identity)


@dataclass(frozen=True)
class Recipe:
    """A block that computes :math:`σ(x + N_n(W_n * … σ(N_1(W_1 * x))))`: its convolutions' and norms' names, in order.
    """
    convs: list[str]
    norms: list[str]

    def settings(self, block: nn.Module) -> list[ConvSettings]:
        return [ConvSettings.of(block.get_submodule(name)) for name in self.convs]

    def foldable(self, block: nn.Module) -> bool:
        """Whether all norms are BatchNorm in eval mode now."""
        return all(isinstance(norm, _BatchNorm) and not norm.training for norm in self.norms_of(block))

    def local(self, block: nn.Module) -> bool:
        """Whether BatchNorm that trains looks at this process's batch alone, as torch's own does."""
        return all(type(norm).forward is _BatchNorm.forward for norm in self.norms_of(block)
                   if norm.training and isinstance(norm, _BatchNorm))

    def fixed_statistics(self, block: nn.Module) -> list[Tensor]:
        """The running statistics that the block is computed with now."""
        return [buffer for norm in self.norms_of(block) if not norm.training for buffer in norm.buffers()]

    def fold(self, block: nn.Module, index: int, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The weight and bias of a convolution with its norm in them.

        Args:
            block: its norms have the running statistics.
            index: which convolution.
            tensors: parameters of the block by name, these two modules' among them.
        """
        norm = self.norms[index]
        weight, bias, gamma, beta = (tensors.get(name) for name in self.parameters(index))
        module = block.get_submodule(norm)
        return fold(weight, bias, gamma, beta, module.running_mean, module.running_var, module.eps)

    def parameters(self, index: int) -> list[str]:
        """The names that a convolution's and its norm's parameters have, if they have them."""
        return [f'{module}.{slot}' for module in (self.convs[index], self.norms[index]) for slot in ('weight', 'bias')]

    def run(self, block: nn.Module, tensors: dict[str, Tensor], x: Tensor) -> Tensor:
        """What the block computes if the recipe is right, with all norms in eval mode."""
        def norm(index: int, z: Tensor, tensors: dict[str, Tensor]) -> Tensor:
            name = self.norms[index]
            return norm_again(block.get_submodule(name), False, z, **affine(tensors, name))

        return self.steps(block, lambda index: tensors, norm, x)[-1]

    def steps(self, block: nn.Module, tensors: Callable[[int], dict[str, Tensor]],
              norm: Callable[[int, Tensor, dict[str, Tensor]], Tensor], x: Tensor) -> list[Tensor]:
        """The outputs of all convolutions, and the block's.

        Args:
            block: for its convolutions' settings.
            tensors: gives the parameters of a convolution, by its index, and of the norm behind it.
            norm: runs that norm: index, input and these parameters.
            x: the input.
        """
        h, outputs = x, []
        for index, (name, conv) in enumerate(zip(self.convs, self.settings(block), strict=True)):
            weights = tensors(index)
            outputs.append(conv.run(h, weights[f'{name}.weight'], weights.get(f'{name}.bias')))
            h = norm(index, outputs[-1], weights)
            h = F.relu(h + x if index == len(self.convs) - 1 else h)
        return [*outputs, h]

    @contextmanager
    def norms_in_eval(self, block: nn.Module) -> Iterator[None]:
        modes = [(norm, norm.training) for norm in self.norms_of(block)]
        for norm, _ in modes:
            norm.training = False
        try:
            yield
        finally:
            for norm, mode in modes:
                norm.training = mode

    def norms_of(self, block: nn.Module) -> list[nn.Module]:
        return [block.get_submodule(name) for name in self.norms]


def fold(weight: Tensor, bias: Tensor | None, gamma: Tensor | None, beta: Tensor | None, mean: Tensor, var: Tensor,
         eps: float) -> tuple[Tensor, Tensor]:
    r"""A convolution's weight and bias with the BatchNorm behind it in them: :math:`Wγ/σ` and :math:`β + γ(c - μ)/σ`.

    Args:
        weight, bias: W and c.
        gamma, beta, mean, var, eps: the norm's.
    """
    _, scale = scales(gamma, var, eps)
    shift = scale * (-mean if bias is None else bias - mean)
    return weight * scale.view(-1, 1, 1, 1), shift if beta is None else shift + beta


def scales(gamma: Tensor | None, var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """1/σ and γ/σ, in float32 or better."""
    inverse = (wide(var) + eps).rsqrt()
    return inverse, inverse if gamma is None else inverse * gamma


def recipe_of(block: nn.Module) -> Recipe | None:
    """How the block is computed, or None if it isn't known to be such a block.

    It must consist of ordinary convolutions, each with a BatchNorm or GroupNorm behind it, and ReLUs, and keep its
    shape. Whether it computes what the recipe says is then checked by its outputs, see :func:`agrees`.
    """
    convs = branch(block)
    if not convs or not keeps_its_shape(block):
        return None
    modules = [(name, module) for name, module in block.named_modules() if not list(module.children())]
    if not all(isinstance(module, PLAIN) for _, module in modules):
        return None
    norms = {name: module for name, module in modules if isinstance(module, (_BatchNorm, nn.GroupNorm))}
    matches = len(norms) == len(convs) and all(
        _channels(norm) == conv.out_channels for norm, conv in zip(norms.values(), convs.values(), strict=True))
    padded = all(conv.padding_mode == 'zeros' and not isinstance(conv.padding, str) for conv in convs.values())
    relus = any(isinstance(module, nn.ReLU) for _, module in modules)
    return Recipe(list(convs), list(norms)) if matches and relus and padded else None


@torch.no_grad()
def agrees(recipe: Recipe, block: nn.Module, tensors: dict[str, Tensor], run: Callable[[Tensor], Tensor]) -> bool:
    """Whether ``run``, the block on these tensors, computes what the recipe says; norms are put in eval mode for it."""
    like = next(iter(tensors.values()))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, block.get_submodule(recipe.convs[0]).in_channels, 6, 6, generator=generator).to(like)
    with torch.autocast(like.device.type, enabled=False), recipe.norms_in_eval(block):
        made, expected = recipe.run(block, tensors, x), run(x)
    tolerance = max(1e-3, 16 * torch.finfo(like.dtype).eps)
    return made.shape == expected.shape and torch.allclose(made, expected, tolerance,
                                                           tolerance * expected.abs().max().item())


def affine(tensors: dict[str, Tensor], norm: str) -> dict[str, Tensor]:
    """Weight and bias of a norm, as far as it has them."""
    return {slot: tensors[f'{norm}.{slot}'] for slot in ('weight', 'bias') if f'{norm}.{slot}' in tensors}


def norm_again(norm: nn.Module, training: bool, z: Tensor, weight: Tensor | None = None,
               bias: Tensor | None = None) -> Tensor:
    """What a norm made of z in this mode, without another update of its running statistics."""
    if isinstance(norm, nn.GroupNorm):
        return F.group_norm(z, norm.num_groups, weight, bias, norm.eps)
    if training:
        return F.batch_norm(z, None, None, weight, bias, True, 0., norm.eps)
    return F.batch_norm(z, norm.running_mean, norm.running_var, weight, bias, False, 0., norm.eps)


def _channels(norm: nn.Module) -> int | None:
    """Channels of a norm, None for a BatchNorm without running statistics."""
    if isinstance(norm, nn.GroupNorm):
        return norm.num_channels
    return None if norm.running_mean is None else norm.num_features


@dataclass
class Job:
    """One run of a block, what its forward tells its backward.

    Args:
        weights: makes tensors of the block, by name, from the fusion's parameters.
        recipe, block: how it is computed, and by which modules.
        parts: K, how many parts of rows there are.
        memory: what is kept: ``'masks'``, ``'rebuild'`` or ``'recompute'``, see :class:`~.gradients.Gradient`.
        keep_input: keep the block's whole input and not only a part of it.
        inner: what the block computed inside: with ``'rebuild'`` of its last layer, from forward on; with
            ``'recompute'`` of all, from when the output is made again until backward.
    """
    weights: Callable[[list[Tensor], list[str]], dict[str, Tensor]]
    recipe: Recipe
    block: nn.Module
    parts: int
    memory: str = 'masks'
    keep_input: bool = True
    inner: list[Tensor] | None = None

    def __post_init__(self) -> None:
        self.training = [norm.training for norm in self.recipe.norms_of(self.block)]
        self.convs = self.recipe.settings(self.block)
        self.kernels = [self.block.get_submodule(name).kernel_size[0] for name in self.recipe.convs]

    def pick(self, rows: int) -> list[Part]:
        """A part of the output's rows for each convolution."""
        return [pick_part(rows, kernel, conv, self.parts) for kernel, conv in zip(self.kernels, self.convs,
                                                                                  strict=True)]

    def tensors(self, index: int, parameters: list[Tensor]) -> dict[str, Tensor]:
        """A convolution's and its norm's tensors from the fusion's parameters: one layer's at a time are there."""
        return self.weights(parameters, self.recipe.parameters(index))

    def fold(self, index: int, parameters: list[Tensor]) -> tuple[Tensor, Tensor]:
        """A convolution's folded weight and bias from the fusion's parameters."""
        return self.recipe.fold(self.block, index, self.tensors(index, parameters))

    def take_inner(self) -> list[Tensor] | None:
        """What was computed again, if it was; it is not kept any longer."""
        inner, self.inner = self.inner, None
        return inner


def add_contracted_(total: list[Tensor | None], tensors: list[Tensor], gradients: list[Tensor],
                    parameters: list[Tensor]) -> None:
    """Add to the gradients of the fusion's parameters what those of some tensors that were made of them give."""
    pairs = [(tensor, grad.to(tensor.dtype)) for tensor, grad in zip(tensors, gradients, strict=True)
             if tensor.requires_grad]
    if not pairs:
        return
    found = torch.autograd.grad([tensor for tensor, _ in pairs], parameters, [grad for _, grad in pairs],
                                allow_unused=True)
    for index, grad in enumerate(found):
        if grad is not None:
            total[index] = grad if total[index] is None else total[index] + grad


def autocast_now(device: str) -> Callable[[], torch.autocast]:
    """Makes contexts with the autocast setting of this moment."""
    return partial(torch.autocast, device, dtype=torch.get_autocast_dtype(device),
                   enabled=torch.is_autocast_enabled(device))
