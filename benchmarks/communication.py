"""What DDP sends in a training step, and what that means on many GPUs: a page. A minute on a CPU core.

Bytes are counted: a communication hook sums the gradients that DDP hands over to be averaged in one step, replaced
blocks' own included, whether they learn in this step or not. What follows from them is arithmetic.

    python benchmarks/communication.py --out docs/results/communication.md
"""
import tempfile
from pathlib import Path

import torch
from mmdet.testing import demo_mm_inputs
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from command_line import Parser
from rl_mmdet.replacement import set_step_
from step_variants import MASK_R50, MASK_R101, SWIN_T, VIT_B, Case, build

VARIANTS = {'baseline': 'baseline', 'every-8': 'RL-v1', 'slim': '`SlimBlock`'}
GPUS = (8, 64, 512)
BANDWIDTH = 12.5e9
"""Bytes a second from each GPU to the next: 100 Gbit/s."""
HOP = 10e-6
"""Seconds from one GPU to the next for however small a message."""


def gradient_bytes(detector: nn.Module) -> int:
    """Bytes that DDP hands over to be averaged in a training step."""
    sizes = []

    def count(state: None, bucket: distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
        sizes.append(bucket.buffer().numel() * bucket.buffer().element_size())
        done = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    model = DistributedDataParallel(detector)
    model.register_comm_hook(None, count)
    data = demo_mm_inputs(1, [(3, 128, 128)], with_mask=True)
    set_step_(detector, 0)
    loss, _ = detector.parse_losses(model(**detector.data_preprocessor(data, True), mode='loss'))
    loss.backward()
    return sum(sizes)


def ring_seconds(size: float, gpus: int) -> float:
    """A ring all-reduce: 2·(n−1) times every GPU sends size/n bytes to the next one."""
    return 2 * (gpus - 1) * (size / gpus / BANDWIDTH + HOP)


def rows(config: str) -> list[str]:
    """A table's rows about one detector."""
    lines, first = [], None
    for name, title in VARIANTS.items():
        size = gradient_bytes(build(Case(config, 'detector', (128, 128)), name, dict(type='EveryKth', k=2)))
        first = first or size
        times = ' | '.join(f'{1e3 * ring_seconds(size, gpus):.1f}' for gpus in GPUS)
        model = Path(config).stem.partition('_fpn')[0].partition('_simple')[0]
        lines.append(f'| {model} | {title} | {size / 1e6:.1f} | {size / first:.2f} | {times} |')
    return lines


def page() -> str:
    head = ' | '.join(f'{gpus} GPUs, ms' for gpus in GPUS)
    return '\n'.join([
        '# Cost of communication', '', 'Made by `python benchmarks/communication.py`.', '',
        'Gradients that a detector\'s DDP averages in a step, float32, with every second block replaced: counted. '
        'Times are arithmetic, not measured: a ring all-reduce over n GPUs, 2·(n−1)·(bytes / n / bandwidth + hop), '
        f'with {BANDWIDTH / 1e9:g} GB/s from each GPU to the next and {1e6 * HOP:g} µs a hop. DDP hides part of it '
        'behind the backward pass.', '',
        f'| detector | variant | gradients, MB a step | over the baseline\'s | {head} |',
        '| :--- | :--- | ---: | ---: |' + ' ---: |' * len(GPUS),
        *(row for config in (MASK_R50, MASK_R101, SWIN_T, VIT_B) for row in rows(config)), '',
        'With `every=8` a replaced block of RL-v1 learns in one step of eight; the zeros of the other steps are sent, '
        'too, as DDP expects the same tensors in every step. They are two numbers a block. BatchNorm\'s statistics are '
        'not averaged.', ''])


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument('--out', type=Path, required=True, help='the page')
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        distributed.init_process_group('gloo', init_method=f'file://{folder}/rendezvous', rank=0, world_size=1)
        text = page()
        distributed.destroy_process_group()
    args.out.write_text(text)


if __name__ == '__main__':
    main()
