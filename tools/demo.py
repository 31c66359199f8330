"""The main job in small: compare a detector and its Replacement-Learning twin on digit scenes."""
import argparse
import os
import time
from pathlib import Path

from rich.console import Console

from rl_mmdet import engine
from rl_mmdet.analysis import compare

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = [f'baseline={ROOT}/configs/digits/faster-rcnn_r34_fpn_digits.py',
           f'RL-v1={ROOT}/configs/digits/faster-rcnn_rl-r34-k2_fpn_digits.py']


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Compare a detector and its Replacement-Learning twin')
    parser.add_argument('--work-dir', default='work_dirs/demo', help='where everything is written; found there, '
                        'finished trainings are reused and unfinished ones resumed')
    return parser.parse_args()


@engine.tool
def main() -> None:
    os.environ.setdefault('KINETO_LOG_LEVEL', '5')  # else torch's profiler complains about a GPU that isn't there
    args = parse_args()
    folder, start = Path(args.work_dir), time.monotonic()
    console = Console(soft_wrap=True, highlight=False)

    def say(line: str) -> None:
        console.print(f'[{time.monotonic() - start:4.0f} s] {line}', markup=False)

    try:
        comparison = compare.plan_comparison(folder, CONFIGS, seeds=1)
        with compare.only_one(folder):
            contents = compare.carry_out(comparison, compare.Tools(ROOT / 'tools'), folder, say)
    except KeyboardInterrupt:
        say('start it again to go on from the last checkpoint')
        raise
    compare.print_result(contents, folder, console)


if __name__ == '__main__':
    main()
