r"""Fine-tuning from ImageNet weights with blocks replaced: what is lost, and what a fitted start keeps.

Faster R-CNN with MobileNetV2 on Aquarium (configs/aquarium), compared by tools/compare.py. Replaced are 4 of the 17
blocks in stages, one in each of the last four: what ``EveryKth`` chooses with k = 2, 3 and 4, as these stages have
three or four blocks. Variants called ``best-...`` replace the four that tools/choose_blocks.py chooses (``BEST``). On
a CPU core a training of 8 epochs (448 iterations) takes ten minutes and more, one of 54 epochs (3,024 iterations) over
an hour.

    python benchmarks/aquarium.py --data DIR --weights mobilenet-v2_imagenet.pth --work-dir work_dirs/aquarium

Settings of the method, one seed each; the default width and plain alternatives; a long training:

    python benchmarks/aquarium.py --data DIR --weights FILE --work-dir work_dirs/aquarium_settings --seeds 1 \
        --variants average coupled pair-per-tensor fast-pair light-fit-fade light-fit light-fit-500-fade full-fit \
        average-every-1 light-fit-fade-every-8
    python benchmarks/aquarium.py --data DIR --weights FILE --work-dir work_dirs/aquarium_more \
        --variants thinner-fit-fade fixed frozen-3
    python benchmarks/aquarium.py --data DIR --weights FILE --work-dir work_dirs/aquarium_long --epochs 54 --seeds 2 \
        --variants skip light-fit-fade
"""
from comparison_scripts import R, compare, parser_of

CONFIG = 'configs/aquarium/faster-rcnn_mobilenet-v2_fpn_8e_aquarium.py'
BACKBONE = ('model.backbone.type=RLBackbone', 'model.backbone.backbone=MobileNetV2')
BLOCKS = {f'layer{stage}': [1] for stage in (3, 4, 5, 6)}
BEST = {'layer3': [1], 'layer4': [1, 2], 'layer6': [2]}
"""By tools/choose_blocks.py with ``--p 0.4 --batches 10 --steps 200``, fusion and operator of ``THIN``."""


def replacing(blocks: dict[str, list[int]]) -> tuple[str, ...]:
    """The settings that replace these blocks."""
    return (*BACKBONE, f'{R}plan.type=Blocks',
            *(f'{R}plan.blocks.{stage}={indices}' for stage, indices in blocks.items()))


REPLACED = replacing(BLOCKS)
FIT, FADE = f'{R}start.type=FitOutputs', f'{R}start.fade=224'
TRANSFORM = f'{R}fusion.type=TransformFusion'
EVERY_STEP = f'{R}gradient.every=1'  # the learned transformations are small, so their gradient costs little
LIGHT = (TRANSFORM, f'{R}fusion.rank=16', f'{R}fusion.adapt=True', EVERY_STEP)
THIN = (*LIGHT, f'{R}operator.type=SlimBlock', f'{R}operator.width=0.25')
SLIM = (*REPLACED, *THIN)
FULL = (*REPLACED, TRANSFORM, f'{R}fusion.share=0.2', EVERY_STEP)
VARIANTS = {
    'skip': (*REPLACED, f'{R}operator.type=Skip'),
    'skip-fade': (*REPLACED, f'{R}operator.type=Skip', FIT, FADE),
    'average': REPLACED,
    'full-fit': (*FULL, FIT),
    'light': SLIM,
    'light-fit': (*SLIM, FIT),
    'full-fit-fade': (*FULL, FIT, FADE),
    'light-fit-fade': (*SLIM, FIT, FADE),
    # what else the method could do
    'coupled': (*REPLACED, f'{R}gradient.mode=coupled'),
    'pair-per-tensor': (*REPLACED, TRANSFORM, f'{R}fusion.rank=0', EVERY_STEP),
    'fast-pair': (*REPLACED, 'optim_wrapper.constructor=RLOptimWrapperConstructor',
                  'optim_wrapper.paramwise_cfg.custom_keys.coeff.lr_mult=10'),
    'light-fit-500-fade': (*SLIM, FIT, f'{R}start.steps=500', FADE),
    'average-every-1': (*REPLACED, EVERY_STEP),
    'light-fit-fade-every-8': (*SLIM, FIT, FADE, f'{R}gradient.every=8'),
    'light-fit-fade-coupled': (*SLIM, FIT, FADE, f'{R}gradient.mode=coupled'),
    'best-fit-fade': (*replacing(BEST), *THIN, FIT, FADE),
    'thinner-fit-fade': (*SLIM, f'{R}operator.width=0.0625', f'{R}fusion.rank=8', FIT, FADE),  # the default width
    'scalar-fit': (*REPLACED, FIT, EVERY_STEP),
    # what a user would do otherwise
    'shared': (*REPLACED, f'{R}fusion.type=SharedWeights', f'{R}gradient.mode=coupled'),
    'fixed': (*REPLACED, f'{R}fusion.type=OwnWeights', f'{R}fusion.learn=False'),
    'frozen-2': ('model.backbone.frozen_stages=2',),
    'frozen-3': ('model.backbone.frozen_stages=3',),
    'with-cp': ('model.backbone.with_cp=True',),
    'conv-bn-eval': ('efficient_conv_bn_eval=[backbone]',),
    'fold-norm': (*BACKBONE, 'model.backbone.fold_norm=True'),
    'light-fold-norm': (*SLIM, FIT, FADE, 'model.backbone.fold_norm=True'),
}


ON_THE_PAGE = ('skip', 'skip-fade', 'average', 'light-fit-fade', 'best-fit-fade', 'full-fit-fade', 'fixed', 'frozen-2',
               'fold-norm')


def main() -> None:
    parser = parser_of(__doc__, VARIANTS, ON_THE_PAGE)
    parser.add_argument('--weights', required=True, help="ImageNet weights in the layout of mmdet's MobileNetV2")
    args = parser.parse_args()
    compare(args, CONFIG, VARIANTS, [f'model.backbone.init_cfg.checkpoint={args.weights}'])


if __name__ == '__main__':
    main()
