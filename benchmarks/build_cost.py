"""What replacing blocks adds to the building of a large backbone, and what ``import rl_mmdet`` adds to mmdet's imports.

Building is constructing the backbone with random weights and replacing every second block. The baseline and the
replaced backbone are built in turns in one process, each alone; the peaks of memory come from fresh processes. The
limits: 1.1 times the baseline's time and memory, half a second for the import. Writes docs/results/build_cost.md.

    python benchmarks/build_cost.py
"""
import gc
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from command_line import Parser, positive, processor

OUT = Path(__file__).resolve().parents[1] / 'docs/results/build_cost.md'
EVERY_SECOND = dict(plan=dict(type='EveryKth', k=2))
BACKBONES = {  # the baseline's type, ours, and the arguments of both
    'RLSwin, Swin-L': ('SwinTransformer', 'RLSwin', dict(
        embed_dims=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48), window_size=12, pretrain_img_size=384)),
    'RLResNet, ResNet-152': ('ResNet', 'RLResNet', dict(depth=152)),
    'RLViT, large': ('RLViT', 'RLViT', dict(arch='large')),
}
SMALL = [('ResNet', 'RLResNet', dict(depth=50, base_channels=4)),
         ('RLViT', 'RLViT', dict(arch=dict(embed_dim=16, depth=4, num_heads=1)))]
"""What is built first in a fresh process, so that whatever is imported on first use is there."""
IMPORTS = 'import mmdet.models, mmdet.datasets, mmdet.engine, mmdet.evaluation, mmdet.visualization, mmdet.apis'
MEMORY = '''
import resource, sys
sys.path.insert(0, {folder!r})
import build_cost
for small in build_cost.SMALL:
    build_cost.build(*small, replaced={replaced})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = build_cost.build(*build_cost.BACKBONES[{name!r}], replaced={replaced})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
'''
IMPORT_TIME = f'''
import time
{IMPORTS}
start = time.perf_counter()
import rl_mmdet
print(time.perf_counter() - start)
'''


def build(baseline: str, ours: str, arguments: dict[str, Any], *, replaced: bool) -> nn.Module:
    """One backbone with random weights."""
    from mmdet.registry import MODELS

    import rl_mmdet  # noqa: F401  registers the backbones
    if not replaced:
        return MODELS.build(dict(arguments, type=baseline))
    return MODELS.build(dict(arguments, type=ours, replacement=EVERY_SECOND))


def seconds(backbone: tuple, replaced: bool) -> float:
    """CPU seconds of one build, which don't count what else the machine does."""
    gc.collect()
    start = time.process_time()
    model = build(*backbone, replaced=replaced)
    spent = time.process_time() - start
    del model
    return spent


def time_ratios(backbone: tuple, rounds: int) -> list[float]:
    """Replaced over baseline, round by round; the order turns within a round, so that neither gains by it."""
    build(*backbone, replaced=True)
    ratios = []
    for _ in range(rounds):
        first, ours, again, last = (seconds(backbone, replaced) for replaced in (False, True, True, False))
        ratios.append((ours + again) / (first + last))
    return ratios


def in_fresh_process(program: str) -> float:
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', program], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def peak_memory(name: str, replaced: bool) -> float:
    """By how much building raises a process's peak of resident memory, in KiB."""
    return in_fresh_process(MEMORY.format(folder=str(Path(__file__).parent), name=name, replaced=replaced))


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument('--rounds', type=positive, default=11, help='builds of each kind, 11 by default')
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    # The memory first: a process begins with the peak of the one that started it.
    memory = {name: peak_memory(name, replaced=True) / peak_memory(name, replaced=False) for name in BACKBONES}
    added = sorted(in_fresh_process(IMPORT_TIME) for _ in range(rounds))
    lines = ['# What replacement adds to building a backbone', '',
             f'Made by `python benchmarks/build_cost.py`, torch {torch.__version__}, one thread of {processor()}. '
             'Every second block of each backbone is replaced; both kinds start from random weights. Time: CPU time '
             'of the replaced backbone over the baseline\'s, built in turns (A B B A) in one process, the median of '
             f'{rounds} rounds and their range. Memory: by how much building raises the peak of resident memory, in '
             'fresh processes, replaced over baseline. The limit for both is 1.1.', '',
             '| backbone | time, times the baseline\'s | peak memory, times the baseline\'s |', '|---|---|---|']
    for name, backbone in BACKBONES.items():
        ratios = time_ratios(backbone, rounds)
        lines.append(f'| {name} | {median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}) | {memory[name]:.3f} |')
        print(lines[-1], flush=True)
    lines += ['', f'`import rl_mmdet` adds {median(added):.2f} s ({added[0]:.2f} to {added[-1]:.2f} in {rounds} fresh '
              f'processes) to `{IMPORTS}`. The limit is 0.5 s.']
    print(lines[-1])
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text('\n'.join(lines) + '\n')
    print(OUT)


if __name__ == '__main__':
    main()
