"""Show the blocks of a config's backbone: kept or replaced, by which neighbours, or why not."""
import argparse

from rl_mmdet_cli import config_arguments, start


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Show the blocks of a config\'s backbone',
                                     parents=[config_arguments()])
    parser.add_argument('--checkpoint', help='a baseline\'s weights: adds the fit residual of replaced blocks')
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    from rich.console import Console

    from rl_mmdet import analysis, engine
    cfg = engine.load_config(args.config, args.cfg_options)
    table = analysis.block_table(cfg, args.checkpoint, args.allow_pickle)
    console = Console()
    console.print(table) if console.is_terminal else Console(width=160).print(table)


if __name__ == '__main__':
    start(main, parse_args())
