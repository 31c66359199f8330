"""What a block is made of, read from its modules."""
import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn

BESIDE = ('downsample', 'shortcut')
"""Names of a block's modules that lie beside the residual branch."""
ACTIVATIONS = tuple(cls for cls in vars(nn.modules.activation).values()
                    if isinstance(cls, type) and issubclass(cls, nn.Module) and cls is not nn.MultiheadAttention)


@dataclass(frozen=True)
class Mlp:
    """The channel-mixing part of an attention block: names of its norm and linear layers, and the activation."""
    norm: str
    expand: str
    project: str
    activation: nn.Module
    channels: int
    hidden: int


def all_parameters(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter slot of ``module``, tied ones under each of their names."""
    return module.named_parameters(remove_duplicate=False)


def slot_of(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The submodule in which the tensor called ``name`` stands, and what it is called there."""
    *path, slot = name.split('.')
    for key in path:
        module = module._modules[key]
    return module, slot


def copy_around_parameters(module: nn.Module, *others: nn.Module) -> nn.Module:
    """A copy whose parameters *are* the module's, and those of ``others`` inside it theirs; all else is its own."""
    shared = [parameter for each in (module, *others) for parameter in each.parameters()]
    return copy.deepcopy(module, {id(parameter): parameter for parameter in shared})


def convolutions(block: nn.Module) -> dict[str, nn.Module]:
    """Two-dimensional convolutions of the residual branch by name, deformable ones included, in their order.

    The order is that of registration; only the highest of several that are numbered is the last in any case: Res2Net
    registers the convolutions that stand in the place of ``conv2`` after ``conv3``.
    """
    found = {name: module for name, module in block.named_modules()
             if hasattr(module, 'kernel_size') and getattr(getattr(module, 'weight', None), 'ndim', 0) == 4
             and not _beside(name)}
    numbered = sorted(name for name in found if re.fullmatch(r'conv\d', name))
    if len(numbered) > 1:
        found[numbered[-1]] = found.pop(numbered[-1])
    return found


def branch(block: nn.Module) -> dict[str, nn.Conv2d] | None:
    """The convolutions of a residual branch that is nothing but ordinary ones in a row; None for other blocks.

    They lie equally deep in the block: squeeze-and-excitation, a module of its own, has some as well.
    """
    convs = convolutions(block)
    row = list(convs.values())
    if len(row) < 2 or not all(isinstance(conv, nn.Conv2d) and _is_odd(conv) for conv in row):
        return None
    fits = (len({name.count('.') for name in convs}) == 1
            and all(conv.in_channels == before.out_channels for before, conv in pairwise(row))
            and all(conv.groups == 1 or conv.in_channels == conv.out_channels for conv in row))
    return convs if fits and row[0].groups == row[-1].groups == 1 else None


def same_padding(conv: nn.Module) -> tuple[int, ...]:
    """The padding with which a convolution of odd kernel and stride 1 keeps height and width."""
    dilation = conv.dilation if isinstance(conv.dilation, tuple) else (conv.dilation,) * len(conv.kernel_size)
    return tuple(d * (k // 2) for d, k in zip(dilation, conv.kernel_size, strict=True))


def keeps_its_shape(block: nn.Module) -> bool:
    """Whether a block of convolutions has the same channels, height and width at its end as at its start."""
    convs = list(convolutions(block).values())
    strides = [getattr(module, 'stride', 1) for module in block.modules()]
    beside = [name for name, _ in block.named_parameters() if _beside(name)]
    return (bool(convs) and not beside and convs[0].in_channels == convs[-1].out_channels
            and all(stride in (1, (1, 1), [1, 1]) for stride in strides))


def mlp(block: nn.Module) -> Mlp | None:
    """The norm - linear - activation - linear that an attention block ends with; None for other blocks."""
    named = [(name, module) for name, module in block.named_modules()
             if isinstance(module, (nn.Linear, nn.LayerNorm, *ACTIVATIONS))]
    linears = [(name, module) for name, module in named if isinstance(module, nn.Linear)]
    if len(linears) < 2 or any(max(conv.kernel_size) > 1 for conv in convolutions(block).values()):
        return None
    (expand, first), (project, last) = linears[-2:]
    names = [name for name, _ in named]
    between = [m for _, m in named[names.index(expand) + 1:names.index(project)] if isinstance(m, ACTIVATIONS)]
    norms = [name for name, m in named if isinstance(m, nn.LayerNorm) and m.normalized_shape == (first.in_features,)
             and m.elementwise_affine]
    if not between or not norms or (first.in_features, first.out_features) != (last.out_features, last.in_features):
        return None
    return Mlp(norms[-1], expand, project, between[0], first.in_features, first.out_features)


def _is_odd(conv: nn.Module) -> bool:
    return all(size % 2 for size in conv.kernel_size)


def _beside(name: str) -> bool:
    return name.partition('.')[0] in BESIDE
