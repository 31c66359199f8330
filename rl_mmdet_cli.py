"""The command ``rl-mmdet``: ``rl-mmdet train CONFIG`` is ``python tools/train.py CONFIG`` without a clone.

It lies outside the package because Python would import all of ``rl_mmdet``, with PyTorch, before a module in it.
"""
import runpy
import sys
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


if __name__ == '__main__':
    main()
