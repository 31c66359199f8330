"""Which start trains better from pretrained weights: of (a, b), or of the light operators' scale γ?

A baseline detector is trained on digit scenes (or found in --work-dir), then its replaced twin goes on from the
baseline's weights as mmdet fine-tunes: BatchNorm in eval mode, a tenth of the learning rate. Every start gets the same
data order per seed. Writes docs/results/pretrained_start.md, with --study scale pretrained_scale.md beside it, and
with --study sample sampled_gradient.md: does a sampled gradient train as well?

    python benchmarks/pretrained_start.py --seeds 3
    python benchmarks/pretrained_start.py --seeds 3 --study scale
    python benchmarks/pretrained_start.py --seeds 3 --study sample
"""
import argparse
import statistics
from pathlib import Path

from mmdet.registry import HOOKS
from mmengine.config import ConfigDict
from mmengine.hooks import Hook
from mmengine.runner import Runner

import rl_mmdet  # noqa: F401
from rl_mmdet.analysis import run_training
from rl_mmdet.engine import add_rl_defaults_, load_config

ROOT = Path(__file__).resolve().parents[1]
BASELINE = ROOT / 'configs/digits/faster-rcnn_r34_fpn_digits.py'
REPLACED = ROOT / 'configs/digits/faster-rcnn_rl-r34-k2_fpn_digits.py'
STARTS = {
    'baseline, nothing replaced': None,
    'average': dict(pretrained='average'),
    'least squares': dict(pretrained='least_squares'),
    'average, statistics not recalibrated': dict(pretrained='average', recalibrate=False),
    'least squares, statistics not recalibrated': dict(pretrained='least_squares', recalibrate=False),
}
SCALES = {
    'baseline, nothing replaced': None,
    'FullBlock': dict(operator=dict(type='FullBlock')),
    'Skip': dict(operator=dict(type='Skip')),
    **{f'{operator}, γ = {scale}': dict(operator=dict(type=operator, scale=scale))
       for operator in ('DepthwiseBlock', 'SlimBlock') for scale in (0, 0.1, 1)},
    'PooledBlock, γ = 1': dict(operator=dict(type='PooledBlock')),
}
SAMPLES = {
    'RL-v1, plain autograd': dict(),
    'RL-v1, sample=1, rebuild': dict(gradient=dict(sample=1, memory='rebuild')),
    'RL-v1, sample=1/8, rebuild': dict(gradient=dict(sample=1 / 8, memory='rebuild')),
}
STUDIES = {
    'start': (STARTS, 'pretrained_start.md', 'How should (a, b) start from pretrained weights?', 'RL-v1'),
    'scale': (SCALES, 'pretrained_scale.md', 'How should γ start from pretrained weights?', 'light operators (RL-v2)'),
    'sample': (SAMPLES, 'sampled_gradient.md', 'Does a sampled gradient of (a, b) train as well?', 'RL-v1'),
}


@HOOKS.register_module()
class EvaluateFirstHook(Hook):
    """Evaluate once before the first step, after RecalibrateNormsHook has run."""
    priority = 'VERY_LOW'

    def before_train(self, runner: Runner) -> None:
        runner.first_metrics = runner.val_loop.run()


def fine_tune(start: dict | None, checkpoint: str, seed: int, iterations: int, work_dir: Path) -> dict[str, float]:
    """Fine-tune once; AP before and after, mean loss over the first and the last 30 iterations."""
    cfg = load_config(str(BASELINE if start is None else REPLACED), work_dir=str(work_dir))
    if start is not None:
        fusion = dict(type='ScalarFusion', pretrained=start.get('pretrained', 'average'))
        cfg.model.backbone.replacement.update(fusion=fusion, operator=start.get('operator'),
                                              gradient=start.get('gradient'))
    cfg.model.backbone.norm_eval = True
    cfg.load_from = checkpoint
    cfg.train_cfg = ConfigDict(type='IterBasedTrainLoop', max_iters=iterations, val_interval=iterations)
    cfg.train_dataloader.sampler = ConfigDict(type='InfiniteSampler', shuffle=True)
    cfg.optim_wrapper.optimizer.lr *= 0.1
    cfg.param_scheduler = None
    cfg.default_hooks.checkpoint = ConfigDict(type='CheckpointHook', by_epoch=False, interval=10 * iterations,
                                              save_last=False)
    cfg.log_processor = ConfigDict(type='LogProcessor', by_epoch=False)
    cfg.randomness = ConfigDict(seed=seed)
    cfg.experiment_name = f'{work_dir.name}'
    cfg.log_level = 'WARNING'
    add_rl_defaults_(cfg)
    if start and not start.get('recalibrate', True):
        cfg.custom_hooks = [hook for hook in cfg.custom_hooks if hook['type'] != 'RecalibrateNormsHook']
    cfg.custom_hooks.append(ConfigDict(type='EvaluateFirstHook'))
    runner = Runner.from_cfg(cfg)
    runner.train()
    losses = runner.message_hub.get_scalar('train/loss').data[0]
    return dict(ap_before=runner.first_metrics['coco/bbox_mAP'], loss_first=float(losses[:30].mean()),
                loss_last=float(losses[-30:].mean()),
                ap_after=float(runner.message_hub.get_scalar('val/coco/bbox_mAP').current()))


def report(results: dict[str, list[dict]], iterations: int, command: str, study: str) -> str:
    """The results as a Markdown page."""
    _, _, title, what = STUDIES[study]
    lines = [f'# {title}', '',
             f'Made by `{command}`. Faster R-CNN, R-34 with 16 base channels, digit scenes, on a CPU; {what}, '
             '`EveryKth(k=2)`, detached. The twin starts from the trained baseline and trains '
             f'{iterations} more iterations with BatchNorm in eval mode. AP on val, losses on train; mean over '
             f'{len(next(iter(results.values())))} seeds, ± standard deviation.', '',
             '| start | AP before the first step | loss, first 30 | loss, last 30 | AP after |',
             '|---|---|---|---|---|']
    for name, runs in results.items():
        cells = [_mean([run[key] for run in runs]) for key in ('ap_before', 'loss_first', 'loss_last', 'ap_after')]
        lines.append(f'| {name} | ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines) + '\n'


def _mean(values: list[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.
    return f'{statistics.mean(values):.3f} ± {spread:.3f}'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--iterations', type=int, default=120)
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/pretrained_start'))
    parser.add_argument('--study', choices=STUDIES, default='start')
    parser.add_argument('--out', type=Path, help='the page (default: in docs/results)')
    args = parser.parse_args()
    starts, page, *_ = STUDIES[args.study]
    out = args.out or ROOT / 'docs/results' / page
    baseline = args.work_dir / 'baseline'
    training = [str(ROOT / 'tools/train.py'), str(BASELINE), '--work-dir', str(baseline), '--resume']
    run_training(training, baseline, print)
    checkpoint = (baseline / 'last_checkpoint').read_text().strip()
    results: dict[str, list[dict]] = {name: [] for name in starts}
    for seed in range(args.seeds):
        for index, (name, start) in enumerate(starts.items()):
            folder = args.work_dir / f'{args.study}{index}_seed{seed}'
            found = fine_tune(start, checkpoint, seed, args.iterations, folder)
            results[name].append(found)
            print(f'seed {seed}, {name}: {found}', flush=True)
    command = f'python benchmarks/pretrained_start.py --seeds {args.seeds} --iterations {args.iterations}'
    command += '' if args.study == 'start' else f' --study {args.study}'
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(report(results, args.iterations, command, args.study))
    print(out)


if __name__ == '__main__':
    main()
