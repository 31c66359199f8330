"""Turn a replaced detector's checkpoint into an ordinary one."""
import argparse

from rl_mmdet_cli import config_arguments, start


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Turn a replaced detector\'s checkpoint into an ordinary one',
                                     parents=[config_arguments()])
    parser.add_argument('checkpoint', help='a checkpoint of the config\'s detector')
    parser.add_argument('out', help='file to write')
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    from rl_mmdet import deploy, engine
    cfg = engine.load_config(args.config, args.cfg_options)
    engine.take_found_(cfg, args.checkpoint, args.allow_pickle)
    plain = deploy.save_plain_checkpoint(cfg, args.checkpoint, args.out, ignore_keys=args.ignore_keys,
                                         allow_pickle=args.allow_pickle)
    print(f'{args.out}: {plain.describe()}')


if __name__ == '__main__':
    start(main, parse_args())
