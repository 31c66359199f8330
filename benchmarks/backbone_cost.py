"""What RL-v1 with plain autograd costs, in counts that are the same on every machine.

Trainable parameters, FLOPs of forward + backward and bytes saved for backward of R-50 and R-101 backbones as mmdet
trains them (norm_eval, one frozen stage). Writes docs/results/backbone_cost.md.

    python benchmarks/backbone_cost.py
"""
import argparse
from pathlib import Path

import torch
from torch import nn

from rl_mmdet.analysis import count_flops, saved_bytes, trainable_parameters
from rl_mmdet.models import RLResNet

OUT = Path(__file__).resolve().parents[1] / 'docs/results/backbone_cost.md'
SIZE = (1, 3, 256, 256)
VARIANTS = {'baseline': None}
for k in (2, 4):
    for mode in ('detached', 'coupled'):
        VARIANTS[f'RL-v1, k={k}, {mode}'] = dict(plan=dict(type='EveryKth', k=k), gradient=dict(mode=mode))


def cost(backbone: nn.Module) -> tuple[int, int, int]:
    """Trainable parameters, FLOPs of one forward and backward, bytes saved for backward."""
    image = torch.rand(SIZE, generator=torch.Generator().manual_seed(0))
    saved = saved_bytes(backbone, lambda: backbone(image))
    flops = count_flops(lambda: sum(output.sum() for output in backbone(image)).backward())
    return trainable_parameters(backbone), flops, saved


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    lines = ['# What RL-v1 with plain autograd costs', '',
             f'Made by `python benchmarks/backbone_cost.py`, torch {torch.__version__}, CPU. Input '
             f'{"×".join(map(str, SIZE))}, norm_eval=True, frozen_stages=1. FLOPs by torch.utils.flop_counter; saved '
             'bytes are those of distinct storages kept for backward, without parameters and buffers.', '',
             '| backbone | variant | trainable parameters, M | forward + backward, GFLOPs | saved for backward, MB |',
             '|---|---|---|---|---|']
    for depth in (50, 101):
        for name, replacement in VARIANTS.items():
            torch.manual_seed(0)
            backbone = RLResNet(depth, frozen_stages=1, norm_eval=True, replacement=replacement)
            backbone.train()
            parameters, flops, saved = cost(backbone)
            lines.append(f'| R-{depth} | {name} | {parameters / 1e6:.2f} | {flops / 1e9:.2f} | {saved / 1e6:.1f} |')
            print(lines[-1], flush=True)
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text('\n'.join(lines) + '\n')
    print(OUT)


if __name__ == '__main__':
    main()
