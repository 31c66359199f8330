"""Test (and evaluate) a detector: MMDetection's tools/test.py, with checks before anything is written."""
import argparse

from mmengine.config import DictAction

import rl_mmdet.engine as engine


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Test (and evaluate) a detector')
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('--work-dir', help='folder for logs and metrics (default: work_dirs/<config stem>)')
    parser.add_argument('--out', help='dump predictions to this .pkl file')
    parser.add_argument('--show', action='store_true', help='show predictions in a window')
    parser.add_argument('--show-dir', help='save painted images in this folder below the work dir')
    parser.add_argument('--wait-time', type=float, default=2, help='seconds between shown images')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE',
                        help='override settings of the config; data_root=DIR moves the whole config to that data')
    parser.add_argument('--allow-pickle', action='store_true',
                        help='read a checkpoint that needs code to be unpickled; only from sources you trust')
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    parser.add_argument('--tta', action='store_true', help='test-time augmentation')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)
    return parser.parse_args()


@engine.tool
def main() -> None:
    args = parse_args()
    engine.set_local_rank(args.local_rank)
    cfg = engine.load_config(args.config, args.cfg_options, args.work_dir, args.launcher)
    if args.out:
        engine.check_out_file(args.out)
    engine.check_testing(cfg, args.checkpoint, allow_pickle=args.allow_pickle)
    cfg.load_from = args.checkpoint
    if args.show or args.show_dir:
        engine.enable_visualization_(cfg, args)
    if args.tta:
        engine.enable_tta_(cfg)
    runner = engine.build_runner(cfg)
    if args.out:
        engine.dump_predictions_(runner, args.out)
    runner.test()


if __name__ == '__main__':
    main()
