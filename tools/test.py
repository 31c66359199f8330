"""Test (and evaluate) a detector: MMDetection's tools/test.py, with checks before anything is written."""
import argparse
import os

from rl_mmdet_cli import run_arguments, start


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Test (and evaluate) a detector', parents=[run_arguments()])
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('--out', help='dump predictions to this .pkl file')
    parser.add_argument('--show', action='store_true', help='show predictions in a window')
    parser.add_argument('--show-dir', help='save painted images in this folder below the work dir')
    parser.add_argument('--wait-time', type=float, default=2, help='seconds between shown images')
    parser.add_argument('--tta', action='store_true', help='test-time augmentation')
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    from rl_mmdet import engine
    from rl_mmdet.engine import options
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg = engine.load_config(args.config, args.cfg_options, args.work_dir, args.launcher)
    if args.out:
        options.dump_predictions_(cfg, args.out)
    engine.take_found_(cfg, args.checkpoint, args.allow_pickle)
    engine.check_testing(cfg, args.checkpoint, ignore_keys=args.ignore_keys, allow_pickle=args.allow_pickle)
    cfg.load_from = args.checkpoint
    if args.show or args.show_dir:
        options.enable_visualization_(cfg, args)
    if args.tta:
        options.enable_tta_(cfg)
    engine.build_runner(cfg).test()


if __name__ == '__main__':
    start(main, parse_args())
