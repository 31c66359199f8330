r"""Shape adaptation: a tensor of one block in another block's size. The one place for it, under every fusion.

A weight :math:`W` of :math:`o × i` channels becomes one of :math:`o' × i'`,

.. math:: W'_{uv} = \sqrt{i / i'}\; W_{⌊u·o/o'⌋\,⌊v·i/i'⌋}

so that what is laid out in parts (query, key and value, heads, groups) keeps its order, and independent inputs
give outputs of the same variance. A smaller kernel is laid into the middle of zeros, which changes nothing; a larger
one is summed over areas, which keeps its response to a constant. Vectors repeat or leave out channels in the same way.
Position tables are interpolated along their positions, over both axes of the map where they hold a square one (and
aren't called ``..._h`` or ``..._w``, as those of one axis are).

Nothing here learns: what the sizes can't say, the fusion must (``TransformFusion``).
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor

Shape = tuple[int, ...]


def kind_of(name: str, shape: Shape) -> str:
    """``'weight'`` of a convolution or linear layer, ``'table'`` of positions, ``'vector'`` of a number per channel."""
    if name.endswith('weight') and len(shape) > 1:
        return 'weight'
    one_head = len(shape) == 2 and shape[0] > 1
    return 'table' if one_head or sum(size > 1 for size in shape) > 1 else 'vector'


def can_resize(given: Shape | None, shape: Shape) -> bool:
    """Whether a tensor of shape ``given``, if there is one, can be resized: equally many axes, and none is empty."""
    return given is not None and len(given) == len(shape) and min((*given, *shape), default=1) > 0


def resize(name: str, tensor: Tensor, shape: Shape) -> Tensor:
    """``tensor``, called ``name`` in its block, in ``shape``; itself where that is its shape.

    Raises:
        ValueError: another number of axes.
    """
    if tensor.shape == shape:
        return tensor
    shape = tuple(shape)
    if not can_resize(tuple(tensor.shape), shape):
        raise ValueError(f'{name} of shape {tuple(tensor.shape)} can\'t be resized to {shape}: other axes')
    kind = kind_of(name, shape)
    if kind == 'table':
        one_axis = name.endswith(('_h', '_w'))
        return _channels(_positions(tensor, shape[0], one_axis), shape, range(1, len(shape)))
    if kind == 'vector':
        return _channels(tensor, shape, range(len(shape)))
    made = _kernel(_channels(tensor, shape, (0, 1)), shape[2:])
    return made * math.sqrt(tensor.shape[1] / shape[1])


def stretch(tensor: Tensor, size: int, axis: int = 0) -> Tensor:
    """Repeat, or leave out, entries along ``axis`` until there are ``size``, in their order."""
    if tensor.shape[axis] == size:
        return tensor
    index = torch.arange(size, device=tensor.device) * tensor.shape[axis] // size
    return tensor.index_select(axis, index)


def _channels(tensor: Tensor, shape: Shape, axes) -> Tensor:
    for axis in axes:
        tensor = stretch(tensor, shape[axis], axis)
    return tensor


def _kernel(weight: Tensor, sizes: Shape) -> Tensor:
    """Lay the kernels into zeros where they must grow, sum over areas where they must shrink."""
    given = tuple(weight.shape[2:])
    if given == tuple(sizes):
        return weight
    for axis, (old, new) in enumerate(zip(given, sizes, strict=True), start=2):
        if new < old:
            weight = (weight.movedim(axis, -1) @ _areas(old, new, weight)).movedim(-1, axis)
    margins = [max(0, new - old) for old, new in zip(given, sizes, strict=True)]
    return F.pad(weight, [side for margin in reversed(margins) for side in (margin // 2, margin - margin // 2)])


def _areas(old: int, new: int, like: Tensor) -> Tensor:
    """(old, new): how much of each of ``old`` equal parts of a line lies in each of ``new`` equal parts."""
    parts = torch.arange(old, dtype=like.dtype, device=like.device)[:, None]
    areas = torch.arange(new, dtype=like.dtype, device=like.device) * old / new
    return (torch.minimum(parts + 1, areas + old / new) - torch.maximum(parts, areas)).clamp(min=0)


def _positions(table: Tensor, count: int, one_axis: bool) -> Tensor:
    """Interpolate a table (positions, ...) to ``count`` positions."""
    old, rest = table.shape[0], table.shape[1:]
    if old == count:
        return table
    lines = table.reshape(old, -1).T
    if not one_axis and math.isqrt(old) ** 2 == old and math.isqrt(count) ** 2 == count:
        grid = lines.reshape(1, -1, math.isqrt(old), math.isqrt(old))
        made = F.interpolate(grid, size=math.isqrt(count), mode='bicubic', align_corners=False)
    else:
        made = F.interpolate(lines[None], size=count, mode='linear', align_corners=False)
    return made.reshape(lines.shape[0], count).T.reshape(count, *rest)
