"""How noisy is the sampled gradient of (a, b), next to the noise that minibatches have anyway?

A replaced detector is trained on digit scenes (or found in --work-dir). Then the gradient of every (a, b) is taken on
some batches, exactly and several times sampled, with everything else equal. Writes docs/results/gradient_noise.md.

    python benchmarks/gradient_noise.py
"""
import argparse
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner, load_checkpoint
from torch import Tensor, nn

import rl_mmdet  # noqa: F401
from rl_mmdet.analysis import run_training
from rl_mmdet.engine import load_config
from rl_mmdet.engine.preflight import build_model
from rl_mmdet.replacement import computing_layers

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / 'configs/digits/faster-rcnn_rl-r34-k2_fpn_digits.py'
NORMS = {'in eval mode': True, 'training': False}
SAMPLES = (1 / 2, 1 / 4, 1 / 8)


def detector(cfg: Config, checkpoint: str, norm_eval: bool, sample: float | None) -> nn.Module:
    """The trained detector; what its heads draw is the same in every run on a batch."""
    cfg = cfg.copy()
    cfg.model.backbone.update(norm_eval=norm_eval)
    cfg.model.backbone.replacement.gradient = dict(sample=sample)
    model = build_model(cfg)
    load_checkpoint(model, checkpoint, map_location='cpu', logger='silent')
    model.backbone.register_forward_hook(lambda *_: torch.manual_seed(0) and None)
    return model.train()


def gradients(model: nn.Module, batch: dict, seed: int) -> Tensor:
    """The gradient of each block's (a, b), shape (blocks, 2)."""
    model.zero_grad()
    torch.manual_seed(seed)
    losses = model(**model.data_preprocessor(batch, True), mode='loss')
    model.parse_losses(losses)[0].backward()
    return torch.stack([layer.coeff.grad.clone() for layer in computing_layers(model).values()])


def row(cfg: Config, checkpoint: str, batches: list[dict], norms: str, sample: float, draws: int) -> str:
    """Deviations of the sampled gradients from the exact ones; a batch has the same weights in all runs."""
    exact_model, model = (detector(cfg, checkpoint, NORMS[norms], value) for value in (None, sample))
    exact = torch.stack([gradients(exact_model, batch, 0) for batch in batches])
    sampled = torch.stack([torch.stack([gradients(model, batch, seed) for seed in range(draws)]) for batch in batches])
    error = (sampled - exact[:, None]).square().mean((0, 1)).sum(-1).sqrt()
    size = exact.square().mean(0).sum(-1).sqrt()
    batch_noise = exact.var(0).sum(-1).sqrt()
    print(norms, sample, (error / size).tolist(), (error / batch_noise).tolist(), flush=True)
    return (f'| {norms} | {sample:g} | {_span(error / size)} | {_span(error / batch_noise)} |')


def _span(values: Tensor) -> str:
    return f'{values.median():.2f} ({values.min():.2f} to {values.max():.2f})'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--batches', type=int, default=16)
    parser.add_argument('--draws', type=int, default=4, help='sampled gradients per batch')
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/gradient_noise'))
    parser.add_argument('--out', type=Path, default=ROOT / 'docs/results/gradient_noise.md')
    args = parser.parse_args()
    run_training([str(ROOT / 'tools/train.py'), str(CONFIG), '--work-dir', str(args.work_dir), '--resume'],
                 args.work_dir, print)
    checkpoint = (args.work_dir / 'last_checkpoint').read_text().strip()
    cfg = load_config(str(CONFIG), work_dir=str(args.work_dir))
    init_default_scope('mmdet')
    loader = Runner.build_dataloader(cfg.train_dataloader, seed=0)
    batches = [batch for batch, _ in zip(loader, range(args.batches), strict=False)]
    lines = ['# How noisy is the sampled gradient of (a, b)?', '',
             f'Made by `python benchmarks/gradient_noise.py --batches {args.batches} --draws {args.draws}`, torch '
             f'{torch.__version__}, CPU. Faster R-CNN, R-34 with 16 base channels, `EveryKth(k=2)`, trained on digit '
             'scenes for 4 epochs; maps of 32, 16, 8 and 4 rows. Deviation: root mean square of sampled minus exact '
             'gradient over batches and draws; relative to the gradient, and to the spread of exact gradients between '
             'batches. Median over the replaced blocks, and the smallest and largest.', '',
             '| BatchNorm | sample | deviation / gradient | deviation / spread between batches |', '|---|---|---|---|']
    for norms in NORMS:
        for sample in SAMPLES:
            lines.append(row(cfg, checkpoint, batches, norms, sample, args.draws))
            args.out.write_text('\n'.join(lines) + '\n')
    print(args.out)


if __name__ == '__main__':
    main()
