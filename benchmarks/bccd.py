"""From scratch with blocks replaced: Faster R-CNN with a thin R-34 on BCCD, 3,120 iterations, compared by compare.py.

The backbone has a quarter of R-34's width, so that a CPU core needs 20 minutes for a training. Every second block of a
stage is replaced, 5 of 16. Even so the task doesn't feel them missing: ``skip`` has the baseline's AP. The page's:

    python benchmarks/bccd.py --data DIR --work-dir work_dirs/bccd --variants skip slim-coupled rl-v1-coupled --seeds 3
"""
from comparison_scripts import R, compare, parser_of

CONFIG = 'configs/bccd/faster-rcnn_r34_fpn_24e_bccd.py'
THIN = ('model.backbone.base_channels=16', 'model.neck.in_channels=[16,32,64,128]')
REPLACED = ('model.backbone.type=RLResNet', f'{R}plan.type=EveryKth', f'{R}plan.k=2')
SLIM = (*REPLACED, f'{R}operator.type=SlimBlock', f'{R}operator.width=0.25')
VARIANTS = {
    'skip': (*REPLACED, f'{R}operator.type=Skip'),
    'slim': SLIM,
    'rl-v1': REPLACED,
    'rl-v1-coupled': (*REPLACED, f'{R}gradient.mode=coupled'),
    'slim-coupled': (*SLIM, f'{R}gradient.mode=coupled'),
    'shared': (*REPLACED, f'{R}fusion.type=SharedWeights', f'{R}gradient.mode=coupled'),
}


def main() -> None:
    parser = parser_of(__doc__, VARIANTS, tuple(VARIANTS))
    parser.set_defaults(epochs=120, cfg_options=['train_cfg.val_interval=20'])
    compare(parser.parse_args(), CONFIG, VARIANTS, THIN)


if __name__ == '__main__':
    main()
