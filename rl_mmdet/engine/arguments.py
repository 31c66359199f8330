"""Command-line arguments that the tools have in common."""
import argparse

from mmengine.config import DictAction


def checkpoint_arguments() -> argparse.ArgumentParser:
    """A parent parser: whether files may run code, and which tensors needn't fit."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument('--allow-pickle', action='store_true',
                        help='read checkpoints that need code to be unpickled; only from sources you trust')
    parser.add_argument('--ignore-keys', nargs='+', default=[], metavar='REGEX',
                        help='tensors of a checkpoint that may be missing or left over')
    return parser


def config_arguments() -> argparse.ArgumentParser:
    """A parent parser: the config, its overrides, and :func:`checkpoint_arguments`."""
    parser = argparse.ArgumentParser(add_help=False, parents=[checkpoint_arguments()])
    parser.add_argument('config', help='config file')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE',
                        help='override settings of the config, e.g. model.backbone.replacement.plan.k=2; '
                        'data_root=DIR moves the whole config to that data')
    return parser


def run_arguments() -> argparse.ArgumentParser:
    """A parent parser for tools that run a config: :func:`config_arguments`, the work dir and the launcher."""
    parser = argparse.ArgumentParser(add_help=False, parents=[config_arguments()])
    parser.add_argument('--work-dir', help='folder for logs and results (default: work_dirs/<config stem>)')
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)
    return parser
