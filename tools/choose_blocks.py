"""Find the blocks of a trained backbone that their neighbours explain best, and print them as a plan."""
import argparse

from rl_mmdet_cli import config_arguments, show_table, start


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Find the blocks of a trained backbone that their neighbours explain '
                                     'best, and print them as a plan', parents=[config_arguments()])
    parser.add_argument('checkpoint', help='weights of the unreplaced backbone, or of a detector with it')
    parser.add_argument('--p', type=float, required=True, help='fraction of the replaceable blocks to replace')
    parser.add_argument('--batches', type=int, default=4, help='batches of the training set to measure on (default: 4)')
    parser.add_argument('--steps', type=int, default=100, help='in which what replaces a block is fitted to it '
                        '(default: 100)')
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    from rl_mmdet import analysis, engine
    cfg = engine.load_config(args.config, args.cfg_options)
    trial = analysis.choose_blocks(cfg, args.checkpoint, args.p, batches=args.batches, steps=args.steps,
                                   ignore_keys=args.ignore_keys, allow_pickle=args.allow_pickle)
    show_table(analysis.error_table(trial))
    print(analysis.cost_line(trial), *analysis.warning_lines(trial), sep='\n')
    print(f'plan={trial.report.as_plan}')


if __name__ == '__main__':
    start(main, parse_args())
