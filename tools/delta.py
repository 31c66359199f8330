"""Save a fine-tuned detector as what it changed in its base checkpoint, apply such a delta file, or look into it."""
import argparse

from rl_mmdet_cli import start


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Fine-tuned detectors as delta files')
    commands = parser.add_subparsers(dest='command', required=True)
    pickles = argparse.ArgumentParser(add_help=False)
    pickles.add_argument('--allow-pickle', action='store_true',
                         help='read checkpoints that need code to be unpickled; only from sources you trust')
    save = commands.add_parser('save', parents=[pickles], help='write what TUNED changed in BASE')
    save.add_argument('base', metavar='BASE', help='checkpoint that the fine-tuning started from')
    save.add_argument('tuned', metavar='TUNED', help='checkpoint at its end')
    save.add_argument('out', metavar='DELTA', help='file to write, *.safetensors')
    apply = commands.add_parser('apply', parents=[pickles], help='write the fine-tuned checkpoint again')
    apply.add_argument('base', metavar='BASE', help='checkpoint that the delta belongs to')
    apply.add_argument('delta', metavar='DELTA', help='file that save has written')
    apply.add_argument('out', metavar='OUT', help='checkpoint to write')
    info = commands.add_parser('info', help='show what a delta file changes')
    info.add_argument('delta', metavar='DELTA', help='file that save has written')
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    from rl_mmdet import deploy
    if args.command == 'save':
        info = deploy.save_delta(args.base, args.tuned, args.out, args.allow_pickle)
        print(f'{args.out}: {str(info).splitlines()[0]}')
    elif args.command == 'apply':
        deploy.apply_delta(args.base, args.delta, args.out, args.allow_pickle)
        print(f'{args.out}: written')
    else:
        print(deploy.delta_info(args.delta))


if __name__ == '__main__':
    start(main, parse_args())
