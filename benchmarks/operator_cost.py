"""What each operator costs, in counts that are the same on every machine, and its realised share of what removal saves.

Trainable parameters, forward FLOPs, forward + backward FLOPs and bytes saved for backward of R-50, R-101 (norm_eval,
one frozen stage), Swin-T and ViT-B backbones, with the same plan for every operator. Writes
docs/results/operator_cost.md.

    python benchmarks/operator_cost.py
"""
import argparse
from pathlib import Path

import torch
from mmdet.registry import MODELS
from torch import nn

import rl_mmdet  # noqa: F401
from rl_mmdet.analysis import count_flops, saved_bytes, trainable_parameters

OUT = Path(__file__).resolve().parents[1] / 'docs/results/operator_cost.md'
SIZE = (1, 3, 256, 256)
PLAN = dict(type='EveryKth', k=2)
RESNET = dict(type='RLResNet', frozen_stages=1, norm_eval=True)
BACKBONES = {
    'R-50': dict(RESNET, depth=50),
    'R-101': dict(RESNET, depth=101),
    'Swin-T': dict(type='RLSwin'),
    'ViT-B': dict(type='RLBackbone', timm='vit_base_patch16_224', img_size=256),
}


def variant(operator: str, memory: str | None = None, sample: float | None = None, **fusion: str) -> dict:
    return dict(plan=PLAN, operator=dict(type=operator), gradient=dict(memory=memory, sample=sample),
                fusion=fusion or None)


VARIANTS = {
    'baseline': None,
    'skip': variant('Skip'),
    'RL-v1 (FullBlock)': variant('FullBlock'),
    'RL-v1, recompute': variant('FullBlock', 'recompute'),
    'RL-v1, sample=1/8': variant('FullBlock', sample=1 / 8),
    'RL-v1, sample=1/8, rebuild': variant('FullBlock', 'rebuild', sample=1 / 8),
    'FullBlock, ChannelFusion': variant('FullBlock', type='ChannelFusion'),
    'FullBlock, TransformFusion': variant('FullBlock', type='TransformFusion'),
    'DepthwiseBlock': variant('DepthwiseBlock'),
    'DepthwiseBlock, rebuild': variant('DepthwiseBlock', 'rebuild'),
    'SlimBlock': variant('SlimBlock'),
    'SlimBlock, rebuild': variant('SlimBlock', 'rebuild'),
    'SlimBlock, recompute': variant('SlimBlock', 'recompute'),
    'PooledBlock': variant('PooledBlock'),
    'PooledBlock, recompute': variant('PooledBlock', 'recompute'),
}


def cost(backbone: nn.Module) -> tuple[int, int, int, int]:
    """Trainable parameters, FLOPs forward, FLOPs forward and backward, bytes saved for backward."""
    image = torch.rand(SIZE, generator=torch.Generator().manual_seed(0))

    def forward() -> tuple:
        torch.manual_seed(0)  # stochastic depth draws
        return backbone(image)

    forward()  # once, the cheap path checks its recipes
    saved = saved_bytes(backbone, forward)
    flops = count_flops(forward)
    both = count_flops(lambda: sum(output.sum() for output in forward()).backward())
    return trainable_parameters(backbone), flops, both, saved


def rows(name: str, cfg: dict) -> list[str]:
    """The table's rows for one backbone, as far as its blocks fit the operators."""
    counts = {}
    for title, replacement in VARIANTS.items():
        torch.manual_seed(0)
        try:
            backbone = MODELS.build(dict(cfg, replacement=replacement))
        except ValueError as error:
            print(f'{name}, {title}: {error}')
            continue
        backbone.train()
        counts[title] = cost(backbone)
        print(name, title, counts[title], flush=True)
    base, skip = counts['baseline'], counts['skip']
    lines = []
    for title, count in counts.items():
        parameters, flops, both, saved = count
        shares = ['' if title == 'baseline' else f'{(base[i] - count[i]) / (base[i] - skip[i]):.2f}' for i in (1, 2, 3)]
        lines.append(f'| {name} | {title} | {parameters / 1e6:.2f} | {flops / 1e9:.2f} | {both / 1e9:.2f} | '
                     f'{saved / 1e6:.1f} | {" | ".join(shares)} |')
    return lines


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    lines = ['# What each operator costs', '',
             f'Made by `python benchmarks/operator_cost.py`, torch {torch.__version__}, CPU. Input '
             f'{"×".join(map(str, SIZE))}, plan `EveryKth(k=2)`, detached; ResNets with norm_eval=True and '
             'frozen_stages=1. FLOPs by torch.utils.flop_counter with corrected formulas '
             '(`rl_mmdet.analysis.count_flops`); saved bytes are those of distinct storages kept for backward, without '
             'parameters and buffers. Share: (baseline − ours) / (baseline − skip), where skip removes the blocks. An '
             'operator that isn\'t listed doesn\'t fit the blocks.', '',
             '| backbone | variant | trainable parameters, M | forward, GFLOPs | forward + backward, GFLOPs | saved, '
             'MB | share of forward FLOPs | share of all FLOPs | share of saved bytes |',
             '|---|---|---|---|---|---|---|---|---|']
    for name, cfg in BACKBONES.items():
        lines += rows(name, cfg)
        OUT.write_text('\n'.join(lines) + '\n')
    print(OUT)


if __name__ == '__main__':
    main()
