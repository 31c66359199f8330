"""Run mmdet's own configs with replaced backbones: build, train one step, predict; and the same without replacement."""
import argparse
import math
import shlex
import sys
from pathlib import Path

from command_line import Parser, above_zero, positive
from rl_mmdet import engine
from zoo.configs import config_names
from zoo.coverage import check_configs, require_all
from zoo.page import coverage_page, summary
from zoo.sample import sample


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument('--configs', nargs='+', metavar='GLOB', default=[],
                        help='which configs, e.g. \'faster_rcnn/*r50*\' (default: all that mmdet ships)')
    choice.add_argument('--sample', type=int, metavar='N',
                        help='a quick check: the first N of a fixed list (a cheap config for every folder and backbone '
                        'that runs), which look at few regions of an image')
    parser.add_argument('--workers', type=positive, default=2, help='number of processes, of one thread each')
    parser.add_argument('--limit', type=above_zero, default=900., metavar='SECONDS', help='most time for one model')
    parser.add_argument('--stop-after', type=float, default=math.inf, metavar='SECONDS', help='begin no further model '
                        'then; 0 makes the page from the record alone')
    parser.add_argument('--json', type=Path, metavar='FILE', help='file for the raw results, one JSON object per line; '
                        'models found there are not run again, so an interrupted run goes on')
    parser.add_argument('--out', type=Path, metavar='FILE.md', help='write the result page')
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    quick = args.sample is not None
    if quick and (args.json or args.out):
        raise engine.UserError('--sample is a quick check of which no record is kept; leave out --json and --out')
    names = sample(args.sample) if quick else config_names(args.configs)
    outcomes = check_configs(names, workers=args.workers, limit=args.limit, stop_after=args.stop_after,
                                 quick=quick, record=args.json, say=lambda line: print(line, flush=True))
    if args.out is not None:
        args.out.write_text(coverage_page(outcomes, shlex.join(['python', 'benchmarks/check_zoo.py', *sys.argv[1:]])))
    print(summary(outcomes))
    require_all(outcomes)


if __name__ == '__main__':
    engine.run_tool(main, parse_args())
