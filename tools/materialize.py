"""Turn a replaced detector's checkpoint into an ordinary one."""
import argparse

from rl_mmdet import deploy, engine


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Turn a replaced detector\'s checkpoint into an ordinary one',
                                     parents=[engine.config_arguments()])
    parser.add_argument('checkpoint', help='a checkpoint of the config\'s detector')
    parser.add_argument('out', help='file to write')
    return parser.parse_args()


@engine.tool(parse_args)
def main(args: argparse.Namespace) -> None:
    cfg = engine.load_config(args.config, args.cfg_options)
    engine.take_found_(cfg, args.checkpoint, args.allow_pickle)
    plain = deploy.save_plain_checkpoint(cfg, args.checkpoint, args.out, ignore_keys=args.ignore_keys,
                                         allow_pickle=args.allow_pickle)
    print(f'{args.out}: {plain.describe()}')


if __name__ == '__main__':
    main()
