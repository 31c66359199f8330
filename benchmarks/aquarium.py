"""Fine-tuning from ImageNet weights with blocks replaced: what is lost, and what a fitted start keeps.

Faster R-CNN with MobileNetV2 on Aquarium (configs/aquarium), 4 of 14 blocks replaced in every variant, or every k-th
of a stage, compared by tools/compare.py. On a CPU a training of 8 epochs (448 iterations) takes ten minutes and more.

    python benchmarks/aquarium.py --data DIR --weights mobilenet-v2_imagenet.pth --work-dir work_dirs/aquarium
    python benchmarks/aquarium.py --data DIR --weights mobilenet-v2_imagenet.pth --work-dir work_dirs/aquarium_long \
        --k 4 --epochs 54 --variants skip light-fit-fade
"""
import argparse
import subprocess
import sys
from pathlib import Path

from command_line import Parser, positive

ROOT = Path(__file__).resolve().parents[1]
CONFIG = 'configs/aquarium/faster-rcnn_mobilenet-v2_fpn_8e_aquarium.py'
BACKBONE = ('model.backbone.type=RLBackbone', 'model.backbone.backbone=MobileNetV2')
FOUR_BLOCKS = ('plan.type=Blocks', *(f'plan.blocks.layer{stage}=[1]' for stage in (3, 4, 5, 6)))
EVERY_STEP = 'gradient.every=1'  # the learned transformations are small, so their gradient costs little
FIT = 'start.type=FitOutputs'
TRANSFORM = ('fusion.type=TransformFusion', EVERY_STEP)
LIGHT = ('operator.type=SlimBlock', 'operator.width=0.25', 'fusion.rank=16', 'fusion.adapt=True', *TRANSFORM)
FULL = ('fusion.share=0.2', *TRANSFORM)
LENGTHS = ('train_cfg.max_epochs', 'train_cfg.val_interval', 'param_scheduler.1.end', 'param_scheduler.1.T_max')
VARIANTS = {
    'skip': ('operator.type=Skip',),
    'average': (),
    'scalar-fit': (FIT, EVERY_STEP),
    'full-fit': (*FULL, FIT),
    'light': LIGHT,
    'light-fit': (*LIGHT, FIT),
    'full-fit-fade': (*FULL, FIT, 'start.fade=224'),
    'light-fit-fade': (*LIGHT, FIT, 'start.fade=224'),
}


def command(args: argparse.Namespace) -> list[str]:
    """The call of tools/compare.py."""
    variants = []
    plan = FOUR_BLOCKS if args.k is None else ('plan.type=EveryKth', f'plan.k={args.k}')
    for name in args.variants:
        settings = [f'model.backbone.replacement.{each}' for each in (*plan, *VARIANTS[name])]
        variants += ['--variant', name, *BACKBONE, *settings]
    options = [f'data_root={args.data}/', f'model.backbone.init_cfg.checkpoint={args.weights}']
    if args.epochs:
        options += [f'{key}={args.epochs}' for key in LENGTHS]
    report = ['--report-dir', str(args.report_dir)] if args.report_dir else []
    report += ['--report-only'] if args.report_only else []
    return ['tools/compare.py', f'baseline={CONFIG}', *variants, '--seeds', str(args.seeds), '--jobs', str(args.jobs),
            '--work-dir', str(args.work_dir), *report, '--cfg-options', *options, *args.cfg_options]


def parse() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument('--data', required=True, help='folder with annotations/ and images/')
    parser.add_argument('--weights', required=True, help="ImageNet weights in the layout of mmdet's MobileNetV2")
    parser.add_argument('--work-dir', type=Path, required=True)
    parser.add_argument('--variants', nargs='+', choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument('--k', type=positive, help='every k-th block instead of one in each of four stages')
    parser.add_argument('--epochs', type=positive, help='8 by default; AP is then measured after the last one only')
    parser.add_argument('--seeds', type=positive, default=3)
    parser.add_argument('--jobs', type=positive, default=1, help='trainings side by side')
    parser.add_argument('--report-dir', type=Path, help='where the report is written (default: the work dir)')
    parser.add_argument('--report-only', action='store_true', help='of what is finished in the work dir')
    parser.add_argument('--cfg-options', nargs='+', default=[], metavar='KEY=VALUE', help='more changes of all configs')
    return parser.parse_args()


def main() -> None:
    process = subprocess.Popen([sys.executable, *command(parse())], cwd=ROOT)
    try:
        process.wait()
    except KeyboardInterrupt:  # the comparison gets it, too, and stops its trainings
        process.wait()
    sys.exit(process.returncode)


if __name__ == '__main__':
    main()
