"""The main job in small: train a detector and its Replacement-Learning twin on digit scenes, and compare them."""
import argparse
import time
from pathlib import Path

from rich.console import Console

from rl_mmdet import analysis, engine

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = {'baseline': 'configs/digits/faster-rcnn_r34_fpn_digits.py',
           'RL-v1': 'configs/digits/faster-rcnn_rl-r34-k2_fpn_digits.py'}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Train a detector and its Replacement-Learning twin, compare them')
    parser.add_argument('--work-dir', default='work_dirs/demo', help='where everything is written; found there, '
                        'finished trainings are reused and unfinished ones resumed')
    return parser.parse_args()


@engine.tool
def main() -> None:
    args = parse_args()
    work_dir = Path(args.work_dir)
    start = time.monotonic()
    console = Console(soft_wrap=True, highlight=False)

    def say(line: str) -> None:
        console.print(f'[{time.monotonic() - start:4.0f} s] {line}', markup=False)

    try:
        comparison = analysis.compare_side_by_side({name: str(ROOT / path) for name, path in CONFIGS.items()},
                                                   str(ROOT / 'tools' / 'train.py'), work_dir, say)
    except KeyboardInterrupt:
        say('start it again to go on from the last checkpoint')
        raise
    comparison.save(work_dir / 'comparison.json')
    console.print(comparison.table())
    console.print(f'detections:  {comparison.picture}\nall figures: {work_dir / "comparison.json"}\n'
                  f'logs and checkpoints: {", ".join(o.work_dir for o in comparison.outcomes.values())}')


if __name__ == '__main__':
    main()
