"""Find the blocks of a trained backbone that their neighbours explain best, and print them as a plan."""
import argparse

from rl_mmdet_cli import config_arguments, show_table, start


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Find the blocks of a trained backbone that their neighbours explain '
                                     'best, and print them as a plan', parents=[config_arguments()])
    parser.add_argument('checkpoint', help='weights of the unreplaced backbone, or of a detector with it')
    parser.add_argument('--p', type=float, required=True, help='fraction of the replaceable blocks to replace')
    parser.add_argument('--batches', type=int, default=4, help='batches of the training set to measure on (default: 4)')
    parser.add_argument('--fusion', metavar='NAME|JSON', help='instead of the config\'s, e.g. TransformFusion or '
                        '\'{"type": "ScalarFusion", "adapt": true}\'')
    parser.add_argument('--operator', nargs='+', default=[], metavar='NAME|JSON', help='instead of the config\'s; of '
                        'several each is tried, and the plan is the first one\'s')
    parser.add_argument('--steps', type=int, default=100, help='in which what replaces a block is fitted to it '
                        '(default: 100)')
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    from rl_mmdet import analysis, engine
    cfg = engine.load_config(args.config, args.cfg_options)
    trials = analysis.choose_blocks(cfg, args.checkpoint, args.p, batches=args.batches, steps=args.steps,
                                    fusion=args.fusion, operators=args.operator, ignore_keys=args.ignore_keys,
                                    allow_pickle=args.allow_pickle)
    show_table(analysis.error_table(trials))
    print(*analysis.cost_lines(trials), *analysis.warning_lines(trials), sep='\n')
    print(f'plan={trials[0].report.as_plan}')


if __name__ == '__main__':
    start(main, parse_args())
