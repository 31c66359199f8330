"""Write a first pair of configs, a baseline and its Replacement-Learning twin, for COCO data of one's own."""
import argparse
import shlex

from rl_mmdet_cli import start


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Write a baseline\'s config and its Replacement-Learning twin for '
                                     'your own data')
    parser.add_argument('--coco', nargs=2, required=True, metavar=('TRAIN.json', 'VAL.json'),
                        help='annotation files in COCO\'s format')
    parser.add_argument('--images', nargs='+', default=[], metavar='DIR', help='folder of the images, or two: of the '
                        'train and the val set (default: looked for around the annotation files)')
    parser.add_argument('--base', default='mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py', metavar='CONFIG',
                        help='the detector: one of MMDetection\'s configs for COCO, or your own (default: %(default)s)')
    parser.add_argument('--out', default='.', metavar='DIR', help='where both configs are written (default: here)')
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    from rl_mmdet import engine
    new = engine.write_new_configs(args.base, *args.coco, args.images, args.out)
    print(f'{new.baseline} and {new.rl}: written', *new.remarks, '', 'Next:', sep='\n')
    for command in (['blocks', new.rl], ['train', new.rl],
                    ['compare', f'baseline={new.baseline}', f'rl={new.rl}', '--work-dir', 'work_dirs/compare']):
        print(f'  rl-mmdet {shlex.join(command)}')


if __name__ == '__main__':
    start(main, parse_args())
