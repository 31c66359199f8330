"""Show the blocks of a config's backbone: kept or replaced, by which neighbours, or why not."""
import argparse

from rl_mmdet_cli import config_arguments, start


def parse_args() -> argparse.Namespace:
    return argparse.ArgumentParser(description='Show the blocks of a config\'s backbone',
                                   parents=[config_arguments()]).parse_args()


def main(args: argparse.Namespace) -> None:
    from rich.console import Console

    from rl_mmdet import analysis, engine
    cfg = engine.load_config(args.config, args.cfg_options)
    table = analysis.block_table(cfg)
    console = Console()
    console.print(table) if console.is_terminal else Console(width=160).print(table)


if __name__ == '__main__':
    start(main, parse_args())
