"""Turn a replaced detector's checkpoint into an ordinary one, for the baseline's config."""
import argparse

from mmengine.config import DictAction

from rl_mmdet import deploy, engine


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Turn a replaced detector\'s checkpoint into an ordinary one')
    parser.add_argument('config', help='the config it was trained with')
    parser.add_argument('checkpoint', help='its checkpoint')
    parser.add_argument('out', help='file to write')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE',
                        help='override settings of the config')
    parser.add_argument('--allow-pickle', action='store_true',
                        help='read a checkpoint that needs code to be unpickled; only from sources you trust')
    return parser.parse_args()


@engine.tool
def main() -> None:
    args = parse_args()
    cfg = engine.load_config(args.config, args.cfg_options)
    count = deploy.save_plain_checkpoint(cfg, args.checkpoint, args.out, args.allow_pickle)
    print(f'{args.out}: {count} computing layers are plain blocks now; use it with the baseline\'s config')


if __name__ == '__main__':
    main()
