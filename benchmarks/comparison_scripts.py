"""What the scripts that call tools/compare.py share: their arguments and the call."""
import argparse
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from command_line import Parser, positive

ROOT = Path(__file__).resolve().parents[1]
R = 'model.backbone.replacement.'
"""How the keys of a replacement's settings begin."""
LENGTHS = ('train_cfg.max_epochs', 'train_cfg.val_interval', 'param_scheduler.1.end', 'param_scheduler.1.T_max')


def parser_of(description: str | None, variants: Mapping[str, Sequence[str]], on_the_page: Sequence[str]) -> Parser:
    """The arguments that all have."""
    parser = Parser(description)
    parser.add_argument('--data', required=True, help='folder with annotations/ and images/')
    parser.add_argument('--work-dir', type=Path, required=True)
    parser.add_argument('--variants', nargs='+', choices=variants, default=on_the_page)
    parser.add_argument('--epochs', type=positive, help='of every training, which then measures AP after the last one '
                        'alone, unless --cfg-options says otherwise (default: %(default)s; None: the config\'s)')
    parser.add_argument('--seeds', type=positive, default=3)
    parser.add_argument('--jobs', type=positive, default=1, help='trainings side by side')
    parser.add_argument('--report-dir', type=Path, help='where the report is written (default: the work dir)')
    parser.add_argument('--cost-only', action='store_true', help='measure costs, train nothing')
    parser.add_argument('--report-only', action='store_true', help='of what is finished in the work dir')
    parser.add_argument('--cfg-options', nargs='+', default=[], metavar='KEY=VALUE', help='more changes of all configs')
    return parser


def compare(args: argparse.Namespace, config: str, variants: Mapping[str, Sequence[str]],
            options: Sequence[str]) -> NoReturn:
    """Call tools/compare.py, and end with its status.

    Args:
        args: of a parser by :func:`parser_of`.
        config: the baseline's file.
        variants: changes of the config by the variants' names; those that ``args`` names are compared.
        options: changes of all configs.
    """
    asked = [word for name in args.variants for word in ('--variant', name, *variants[name])]
    lengths = [f'{key}={args.epochs}' for key in LENGTHS if args.epochs]
    ways = ['--cost-only'] * args.cost_only + ['--report-only'] * args.report_only
    ways += ['--report-dir', str(args.report_dir)] if args.report_dir else []
    process = subprocess.Popen([
        sys.executable, 'tools/compare.py', f'baseline={config}', *asked, '--seeds', str(args.seeds),
        '--jobs', str(args.jobs), '--work-dir', str(args.work_dir), *ways,
        '--cfg-options', f'data_root={args.data}/', *options, *lengths, *args.cfg_options], cwd=ROOT)
    try:
        process.wait()
    except KeyboardInterrupt:  # the comparison gets it, too, and stops its trainings
        process.wait()
    sys.exit(process.returncode)
