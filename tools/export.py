"""Write the backbone and neck of a trained detector as an ONNX graph."""
import argparse

from rl_mmdet_cli import config_arguments, start


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Write the backbone and neck of a trained detector as an ONNX graph',
                                     parents=[config_arguments()])
    parser.add_argument('checkpoint', help='a checkpoint of the config\'s detector, replaced or ordinary')
    parser.add_argument('out', help='file to write, *.onnx')
    parser.add_argument('--size', nargs=2, type=int, metavar=('HEIGHT', 'WIDTH'),
                        help='let the graph take one image of this size only, for backbones such as Swin')
    parser.add_argument('--int8', action='store_true',
                        help='int8 weights and activations, calibrated on the val set; shows AP before and after')
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    from rl_mmdet import deploy, engine
    cfg = engine.load_config(args.config, args.cfg_options)
    engine.take_found_(cfg, args.checkpoint, args.allow_pickle)
    exported = deploy.export_onnx(cfg, args.checkpoint, args.out, size=args.size, int8=args.int8,
                                  ignore_keys=args.ignore_keys, allow_pickle=args.allow_pickle)
    print(f'{args.out}: {exported.describe()}')
    if exported.int8:
        print(exported.int8.describe())


if __name__ == '__main__':
    start(main, parse_args())
