"""Compare variants of a detector with its baseline: train, evaluate, measure, and write one report."""
import argparse
import shlex
import sys
from pathlib import Path

from rl_mmdet_cli import add_cfg_options, checkpoint_arguments, start


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Compare variants of a detector with its baseline',
                                     parents=[checkpoint_arguments()])
    parser.add_argument('configs', nargs='*', metavar='[NAME=]CONFIG',
                        help='config files, the baseline\'s first; each is called NAME or else like its file')
    parser.add_argument('--variant', nargs='+', action='append', default=[], metavar=('NAME', 'KEY=VALUE'),
                        help='one more variant: changes of the baseline\'s config; may be given several times')
    parser.add_argument('--work-dir', required=True, help='where everything is written; finished trainings found there '
                        'are reused and unfinished ones resumed')
    parser.add_argument('--seeds', type=int, default=3, help='trainings of each variant (default: %(default)s)')
    add_cfg_options(parser, 'changes of all configs; data_root=DIR moves them to that data')
    parser.add_argument('--launcher', choices=['none', 'pytorch'], default='none',
                        help='pytorch trains every run by torchrun on this machine')
    parser.add_argument('--processes', type=int, help='how many torchrun starts (default: one for each GPU)')
    parser.add_argument('--jobs', type=int, default=1, help='how many trainings run side by side on the same device '
                        '(default: 1)')
    parser.add_argument('--report-dir', help='where the report is written (default: the work dir)')
    only = parser.add_mutually_exclusive_group()
    only.add_argument('--cost-only', action='store_true', help='measure costs, train nothing')
    only.add_argument('--report-only', action='store_true', help='make the report again from what lies in the work dir')
    return parser.parse_args()


def command_line() -> str:
    """What the user has typed, for the report."""
    name, *arguments = sys.argv
    return f'{f"python {name}" if name.endswith(".py") else name} {shlex.join(arguments)}'


def main(args: argparse.Namespace) -> None:
    from rl_mmdet.analysis import compare
    folder = Path(args.work_dir)
    if args.report_dir:
        compare.check_report_folder(Path(args.report_dir))
    options = ['--allow-pickle'] * args.allow_pickle
    options += ['--ignore-keys', *args.ignore_keys] if args.ignore_keys else []
    tools = compare.Tools(Path(__file__).parent, args.launcher, args.processes, args.jobs, options)
    if args.report_only:
        comparison = compare.Comparison(folder)
    else:
        comparison = compare.plan_comparison(
            folder, args.configs, compare.parse_variants(args.variant), args.seeds, args.cfg_options,
            ignore_keys=args.ignore_keys, allow_pickle=args.allow_pickle, command=command_line())
    compare.carry_out(comparison, tools, Path(args.report_dir or folder), measure_costs=not args.report_only,
                      train=not (args.cost_only or args.report_only), allow_pickle=args.allow_pickle)


if __name__ == '__main__':
    start(main, parse_args())
