"""The command ``rl-mmdet``, and how every tool starts: ``rl-mmdet train CONFIG`` is ``python tools/train.py CONFIG``.

A tool reads its arguments first and imports ``rl_mmdet`` afterwards, so that ``--help`` and a mistyped option take no
time. That is why this lies outside the package: Python would import all of it, with PyTorch, before a module in it.
"""
import argparse
import contextlib
import io
import os
import re
import runpy
import sys
import warnings
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

HERE = Path(__file__).resolve().parent
COMMANDS = {
    'init': ('init', 'write a first pair of configs for your COCO data'),
    'train': ('train', 'train a detector'),
    'test': ('test', 'evaluate a checkpoint'),
    'compare': ('compare', 'train a baseline and its variants, and report what differs'),
    'blocks': ('blocks', 'list a backbone\'s blocks: which are replaced, and why others can\'t be'),
    'choose': ('choose_blocks', 'find the blocks that their neighbours explain best'),
    'materialize': ('materialize', 'turn a replaced detector\'s checkpoint into an ordinary one'),
    'export': ('export', 'write a trained detector\'s backbone and neck as an ONNX graph'),
    'delta': ('delta', 'save what fine-tuning has changed as a small file'),
}
"""The script and what it does, by subcommand."""


def main() -> None:
    """Run a subcommand's script with all arguments behind its name."""
    command = sys.argv[1] if len(sys.argv) > 1 else '--help'
    if command in ('-h', '--help'):
        lines = [f'  {name:12} {help}' for name, (_, help) in COMMANDS.items()]
        print('usage: rl-mmdet COMMAND [--help | ARGUMENTS]', '', *lines, sep='\n')
    elif command == '--version':
        print('rl_mmdet', runpy.run_path(str(HERE / 'rl_mmdet' / 'version.py'))['__version__'])
    elif command not in COMMANDS:
        sys.exit(f'error: rl-mmdet {command}: unknown command, allowed: {", ".join(COMMANDS)}')
    else:
        folder = HERE / 'rl_mmdet' / '.mim' / 'tools'
        if not folder.is_dir():  # a clone that isn't installed
            folder = HERE / 'tools'
        sys.argv = [f'rl-mmdet {command}', *sys.argv[2:]]
        # runpy would put the script's path in place of the command's name, which usage lines show.
        spec = spec_from_file_location('__main__', folder / f'{COMMANDS[command][0]}.py')
        spec.loader.exec_module(module_from_spec(spec))


def start(tool: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Import ``rl_mmdet``, without what other packages say about each other meanwhile, and run a tool's main."""
    os.environ.setdefault('TORCH_CPP_LOG_LEVEL', 'ERROR')  # its warnings are for PyTorch's developers
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        from rl_mmdet import engine
    engine.run_tool(tool, args)


def show_table(table: object) -> None:
    """Print a table as wide as the terminal, and without one wide enough to be read by other programs."""
    from rich.console import Console
    console = Console()
    console.print(table) if console.is_terminal else Console(width=160).print(table)


def checkpoint_arguments() -> argparse.ArgumentParser:
    """A parent parser: whether files may run code, and which tensors needn't fit."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument('--allow-pickle', action='store_true',
                        help='read checkpoints that need code to be unpickled; only from sources you trust')
    parser.add_argument('--ignore-keys', nargs='+', default=[], metavar='REGEX', type=_regex,
                        help='tensors of a checkpoint that may be missing, left over or of another shape')
    return parser


def config_arguments() -> argparse.ArgumentParser:
    """A parent parser: the config, its overrides, and :func:`checkpoint_arguments`."""
    parser = argparse.ArgumentParser(add_help=False, parents=[checkpoint_arguments()])
    parser.add_argument('config', help='config file')
    add_cfg_options(parser, 'override settings of the config, e.g. model.backbone.replacement.plan.k=2; '
                    'data_root=DIR moves the whole config to that data')
    return parser


def add_cfg_options(parser: argparse.ArgumentParser, help: str) -> None:
    """Add ``--cfg-options``, as MMEngine reads it."""
    from mmengine.config import DictAction

    class Settings(DictAction):

        def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: list[str],
                     option_string: str | None = None) -> None:
            for value in values:
                key, sign, rest = value.partition('=')
                if not sign:
                    raise argparse.ArgumentError(self, f'{value!r} isn\'t KEY=VALUE')
                if rest.startswith(('dict(', '{')):
                    raise argparse.ArgumentError(self, f'{value!r}: write each key of a dict by itself, as in '
                                                 f'{key}.type=NAME {key}.other=1')
            super().__call__(parser, namespace, values, option_string)

    parser.add_argument('--cfg-options', nargs='+', action=Settings, metavar='KEY=VALUE', help=help)


def _regex(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f'{text!r} is no regular expression ({error}); all that begins with head: '
                                         '^head') from None
    return text


def run_arguments() -> argparse.ArgumentParser:
    """A parent parser for tools that run a config: :func:`config_arguments`, the work dir and the launcher."""
    parser = argparse.ArgumentParser(add_help=False, parents=[config_arguments()])
    parser.add_argument('--work-dir', help='folder for logs and results (default: work_dirs/<config stem>)')
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)
    return parser


if __name__ == '__main__':
    main()
