"""The main job in small: compare a detector and its Replacement-Learning twin on digit scenes."""
import argparse
from pathlib import Path

from rl_mmdet_cli import start

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = [f'baseline={ROOT}/configs/digits/faster-rcnn_r34_fpn_digits.py',
           f'RL-v1={ROOT}/configs/digits/faster-rcnn_rl-r34-k2_fpn_digits.py']


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Compare a detector and its Replacement-Learning twin')
    parser.add_argument('--work-dir', default='work_dirs/demo', help='where everything is written; found there, '
                        'finished trainings are reused and unfinished ones resumed')
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    from rl_mmdet.analysis import compare
    folder = Path(args.work_dir)
    compare.carry_out(compare.plan_comparison(folder, CONFIGS, seeds=1), compare.Tools(ROOT / 'tools'), folder)


if __name__ == '__main__':
    start(main, parse_args())
