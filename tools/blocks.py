"""Show the blocks of a config's backbone: kept or replaced, by which neighbours, or why not; or what could be saved."""
import argparse

from rl_mmdet_cli import config_arguments, show_table, start


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Show the blocks of a config\'s backbone',
                                     parents=[config_arguments()])
    parser.add_argument('--savings', action='store_true', help='instead: what RL-v1, RL-v2 and fold_norm would save of '
                        'a training step, at the config\'s own batch and image size (a minute)')
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    from rl_mmdet import analysis, engine
    cfg = engine.load_config(args.config, args.cfg_options)
    lines = []
    if args.savings:
        table, lines = analysis.savings_table(cfg)
    else:
        table = analysis.block_table(cfg)
    show_table(table)
    if lines:
        print('in the config, model.backbone gets', *lines, sep='\n')


if __name__ == '__main__':
    start(main, parse_args())
