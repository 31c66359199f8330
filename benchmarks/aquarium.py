"""Fine-tuning from ImageNet weights with blocks replaced: what is lost, and what a fitted start keeps.

Faster R-CNN with MobileNetV2 on Aquarium (configs/aquarium), 4 of 14 blocks replaced in every variant, compared by
tools/compare.py. On a CPU a training of 448 iterations takes ten minutes and more.

    python benchmarks/aquarium.py --data DIR --weights mobilenet-v2_imagenet.pth --work-dir work_dirs/aquarium
"""
import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONFIG = 'configs/aquarium/faster-rcnn_mobilenet-v2_fpn_8e_aquarium.py'
REPLACED = ('model.backbone.type=RLBackbone', 'model.backbone.backbone=MobileNetV2',
            'model.backbone.replacement.plan.type=Blocks',
            *(f'model.backbone.replacement.plan.blocks.layer{stage}=[1]' for stage in (3, 4, 5, 6)))
EVERY_STEP = 'gradient.every=1'  # the learned transformations are small, so their gradient costs little
FIT = 'start.type=FitOutputs'
TRANSFORM = ('fusion.type=TransformFusion', EVERY_STEP)
LIGHT = ('operator.type=SlimBlock', 'operator.width=0.25', 'fusion.rank=16', 'fusion.adapt=True', *TRANSFORM)
FULL = ('fusion.share=0.2', *TRANSFORM)
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
    for name in args.variants:
        settings = [f'model.backbone.replacement.{each}' for each in VARIANTS[name]]
        variants += ['--variant', name, *REPLACED, *settings]
    options = [f'data_root={args.data}/', f'model.backbone.init_cfg.checkpoint={args.weights}', *args.cfg_options]
    return ['tools/compare.py', f'baseline={CONFIG}', *variants, '--seeds', str(args.seeds), '--jobs', str(args.jobs),
            '--work-dir', str(args.work_dir), '--cfg-options', *options]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', required=True, help='folder with annotations/ and images/')
    parser.add_argument('--weights', required=True, help="ImageNet weights in the layout of mmdet's MobileNetV2")
    parser.add_argument('--work-dir', type=Path, required=True)
    parser.add_argument('--variants', nargs='+', choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--jobs', type=int, default=1, help='trainings side by side')
    parser.add_argument('--cfg-options', nargs='+', default=[], metavar='KEY=VALUE', help='more changes of all configs')
    return parser.parse_args()


def main() -> None:
    sys.exit(subprocess.run([sys.executable, *command(parse())], cwd=ROOT).returncode)


if __name__ == '__main__':
    main()
