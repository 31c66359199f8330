"""Which detectors' backbones and necks become ONNX graphs, and what int8 costs in AP: a page.

The listed configs' detectors get random weights and random images; of trained detectors, given by config and
checkpoint, an int8 graph is written, too, and AP measured on the config's val set. Minutes on a CPU core.

    python benchmarks/export.py --trained CONFIG CHECKPOINT --trained CONFIG CHECKPOINT --out docs/results/export.md
"""
import platform
import tempfile
from pathlib import Path
from statistics import median

import onnx
import onnxruntime
import torch

from command_line import Parser, processor
from rl_mmdet.deploy import export_onnx
from rl_mmdet.engine import build_model, load_config

ROOT = Path(__file__).resolve().parents[1]
DETECTORS = {
    'rl_resnet/faster-rcnn_rl-r50-k2_fpn_1x_coco': None, 'rl_resnet/retinanet_rl-r50-k2_fpn_1x_coco': None,
    'rl_resnet/atss_rl-r50-k2_fpn_1x_coco': None, 'rl_resnet/mask-rcnn_rl-r50-k2_fpn_1x_coco': None,
    'aquarium/faster-rcnn_rl-mobilenet-v2-k2_fpn_8e_aquarium': None,
    'rl_swin/mask-rcnn_rl-swin-t-p4-w7-k2_fpn_1x_coco': (224, 256),
}
"""Configs, and the one size that their graphs take; None for any."""
NO_VAL_SET = dict(val_dataloader=None, val_cfg=None, val_evaluator=None)


def float_row(name: str, size: tuple[int, int] | None, folder: str) -> str:
    """A table's row about a detector with random weights."""
    cfg = load_config(str(ROOT / f'configs/{name}.py'), NO_VAL_SET)
    torch.manual_seed(0)
    torch.save(build_model(cfg).state_dict(), f'{folder}/detector.pth')
    exported = export_onnx(cfg, f'{folder}/detector.pth', f'{folder}/{Path(name).name}.onnx', size=size)
    taken = 'any' if size is None else '{}×{}'.format(*size)
    return f'| {Path(name).name} | {taken} | {len(exported.maps)} | {exported.difference:.0e} |'


def int8_rows(config: str, checkpoint: str, folder: str) -> list[str]:
    """A table's rows about a trained detector, one for each AP."""
    int8 = export_onnx(load_config(config), checkpoint, f'{folder}/{Path(config).stem}-int8.onnx', int8=True).int8
    old, new = (size / 1e6 for size in int8.size)
    ratios = f'{median(int8.ratios):.2f} ({min(int8.ratios):.2f} to {max(int8.ratios):.2f})'
    return [f'| {Path(config).stem} | {name} | {int8.before[name]:.3f} | {int8.after[name]:.3f} | {int8.images} | '
            f'{int8.calibrated} | {old:.1f} → {new:.1f} MB | {ratios} |' for name in int8.before]


def page(trained: list[list[str]]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        rows = [float_row(name, size, folder) for name, size in DETECTORS.items()]
        int8 = [row for config, checkpoint in trained for row in int8_rows(config, checkpoint, folder)]
    versions = f'torch {torch.__version__}, onnx {onnx.__version__}, onnxruntime {onnxruntime.__version__}'
    return '\n'.join([
        '# Export to ONNX', '', 'Made by `python benchmarks/export.py --trained CONFIG CHECKPOINT ... --out '
        'docs/results/export.md`.', '',
        f'{processor()}, one thread, Python {platform.python_version()}, {versions}', '',
        '## Float graphs', '',
        'Backbone and neck with random weights, on one random image, and on two of half its size. Difference: the '
        'largest to torch\'s maps, over the largest value in a map; 1e-04 is allowed.', '',
        '| config | image sizes | feature maps | difference |', '| :--- | :--- | ---: | ---: |', *rows, '',
        '## Int8 graphs', '',
        'Static quantisation, one scale per output channel of a weight, one per tensor of activations. AP by the '
        'config\'s own evaluator: torch\'s detector, then the same with the int8 graph as backbone and neck. Time for '
        'an image over the float graph\'s, both by onnxruntime, in rounds in which they took turns.', '',
        '| config | AP | float | int8 | val images | calibrated on | file | time |',
        '| :--- | :--- | ---: | ---: | ---: | ---: | ---: | ---: |', *int8, ''])


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument('--trained', nargs=2, action='append', default=[], metavar=('CONFIG', 'CHECKPOINT'))
    parser.add_argument('--out', type=Path, required=True, help='the page')
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.write_text(page(args.trained))


if __name__ == '__main__':
    main()
