"""Train a detector: MMDetection's tools/train.py, with checks before anything is written."""
import argparse
import os

from rl_mmdet_cli import run_arguments, start


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Train a detector', parents=[run_arguments()])
    parser.add_argument('--amp', action='store_true', help='automatic mixed precision')
    parser.add_argument('--auto-scale-lr', action='store_true', help='scale the learning rate with the batch size')
    parser.add_argument('--resume', nargs='?', const='auto',
                        help='go on from this checkpoint; without a file, from the latest one in the work dir')
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    from rl_mmdet import engine
    from rl_mmdet.engine import options
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg = engine.load_config(args.config, args.cfg_options, args.work_dir, args.launcher)
    texts = engine.begin_or_resume_(cfg, args.resume, args.allow_pickle)
    engine.take_found_(cfg, engine.resume_checkpoint(cfg), args.allow_pickle)
    engine.add_rl_defaults_(cfg)
    texts += engine.add_import_(cfg)
    if args.amp:
        options.enable_amp_(cfg)
    if args.auto_scale_lr:
        options.enable_auto_scale_lr_(cfg)
    texts += engine.check_training(cfg, ignore_keys=args.ignore_keys, allow_pickle=args.allow_pickle)
    runner = engine.build_runner(cfg, texts)
    with engine.saved_when_stopped(runner):
        runner.train()


if __name__ == '__main__':
    start(main, parse_args())
