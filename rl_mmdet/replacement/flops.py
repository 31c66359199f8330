"""FLOPs, by torch's counter with two of its formulas put right."""
import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from .resize import Shape


def count_flops(run: Callable[[], object]) -> int:
    """FLOPs of what ``run`` does, backward included, by :class:`torch.utils.flop_counter.FlopCounterMode`.

    Two of torch's formulas are replaced: its weight gradient of a grouped convolution counts too much by the number of
    groups, and it has none for attention on a CPU.
    """
    aten = torch.ops.aten
    corrected = {aten.convolution_backward: _convolution_backward}
    if hasattr(aten, '_scaled_dot_product_flash_attention_for_cpu'):  # since torch 2.2
        corrected |= {aten._scaled_dot_product_flash_attention_for_cpu: _attention,
                      aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward}
    with FlopCounterMode(display=False, custom_mapping=corrected) as counter:
        run()
    return counter.get_total_flops()


def _convolution_backward(grad_out: Shape, inputs: Shape, weight: Shape, *rest: Any, **_: Any) -> int:
    """The gradients of input and weight cost one convolution each: 2·(weights per output channel) per output."""
    *_, transposed, _padding, _groups, wanted = rest
    convolution = 2 * math.prod(inputs if transposed else grad_out) * math.prod(weight[1:])
    return convolution * (bool(wanted[0]) + bool(wanted[1]))


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(grad_out: Shape, query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad_out, query, key, value)
