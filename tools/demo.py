"""The main job in small: a baseline, RL-v1 and RL-v2 on digit scenes."""
import argparse
from pathlib import Path

from rl_mmdet_cli import start

ROOT = Path(__file__).resolve().parents[1]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Train a small detector, and Replacement Learning beside it, on digit '
                                     'scenes')
    parser.add_argument('--work-dir', default='work_dirs/demo', help='where everything is written; found there, '
                        'finished trainings are reused and unfinished ones resumed')
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    from rl_mmdet.analysis.demo import run_demo
    run_demo(ROOT / 'configs' / 'digits', ROOT / 'tools', Path(args.work_dir))


if __name__ == '__main__':
    start(main, parse_args())
