"""The backbone and neck of a trained detector as an ONNX graph, checked against torch."""
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from mmdet.models.detectors import BaseDetector
from mmengine.config import Config
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.onnx.errors import OnnxExporterError
from torch.utils.data import DataLoader

from ..engine import UserError
from ..engine.config import without_workers
from ..engine.detectors import inner_detectors
from ..engine.errors import first_line
from ..engine.files import check_new_file, written_whole
from ..engine.preflight.data import check_data
from ..engine.preflight.guard import built, quiet
from .int8 import Int8, quantise_
from .onnx_session import OnnxSession
from .plain_checkpoint import plain_detector

TOLERANCE = 1e-4
"""How far a map may be from torch's, as a share of the largest value in the map."""
PACKAGES = ('onnx', 'onnxruntime', 'onnxscript')


class Exported(NamedTuple):
    """What :func:`export_onnx` has written.

    Args:
        maps: channels of the feature maps, in the order of the graph's outputs.
        size: height and width of the one image that the graph takes, or None for batches of any number and size.
        checked: heights and widths on which it was checked.
        images: what it was checked on.
        difference: the largest difference of a float graph's to torch's maps, as a share of the largest value in a map.
        int8: what became of it as an int8 graph; None if it is a float one.
    """
    maps: list[int]
    size: tuple[int, int] | None
    checked: list[tuple[int, int]]
    images: str
    difference: float
    int8: Int8 | None

    def describe(self) -> str:
        """One line for the user."""
        taken = 'images of any size' if self.size is None else 'one image of {}×{}'.format(*self.size)
        checked = ' and '.join(f'{height}×{width}' for height, width in self.checked)
        float_graph = 'the float graph ' * (self.int8 is not None)
        return (f'{taken} in, {len(self.maps)} feature maps of {", ".join(map(str, self.maps))} channels out; '
                f'{float_graph}checked on {self.images} of {checked}: maps differ from torch\'s by '
                f'{self.difference:.0e} of their largest value at most, {TOLERANCE:.0e} is allowed')


class Features(nn.Module):
    """A detector's backbone and neck: normalised images (N, 3, H, W) to feature maps."""

    def __init__(self, detector: BaseDetector) -> None:
        super().__init__()
        self.backbone = detector.backbone
        self.neck = detector.neck if detector.with_neck else nn.Identity()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.neck(self.backbone(images)))


def export_onnx(cfg: Config, checkpoint: str, out: str, *, size: Sequence[int] | None = None, int8: bool = False,
                ignore_keys: Sequence[str] = (), allow_pickle: bool = False) -> Exported:
    """Write the backbone and neck of a trained detector as an ONNX graph, materialized.

    Its input ``images`` is what the detector's data preprocessor gives, its outputs ``map0``, ``map1``... are what
    backbone and neck give. Before the file gets its name onnxruntime and torch are compared on images of the config's
    val set: one image, and two of half its size.

    Args:
        cfg: the config the detector was trained with.
        checkpoint: its checkpoint, replaced or ordinary.
        out: file to write, ``.onnx``; must not exist.
        size: height and width, for backbones whose graph depends on it: the graph takes one image of this size. By
            default batches of any number and size.
        int8: make it an int8 graph, see :func:`~rl_mmdet.deploy.int8.quantise_`; needs the config's val set, and not
            ``size``.
        ignore_keys, allow_pickle: see :func:`~rl_mmdet.engine.load_checkpoint_`.

    Raises:
        UserError: a package is missing, the checkpoint doesn't fit the config, ``out`` exists or has another ending,
            torch can't export the backbone, the graph's maps aren't torch's, or ``int8`` without a val set.
    """
    _check(out, size, int8)
    plain = plain_detector(cfg, checkpoint, ignore_keys=ignore_keys, allow_pickle=allow_pickle)
    detector = _only_detector(plain.model)
    loader, reason = _val_loader(plain.cfg)
    if int8 and loader is None:
        raise UserError(f'int8 takes the ranges of the activations, and AP, from the val set: {reason}')
    images, source = _images(detector, loader, size)
    batches = _batches(images, size, getattr(detector.data_preprocessor, 'pad_size_divisor', 1))
    features = Features(detector).eval()
    for parameter in features.parameters():
        parameter.requires_grad = False
    with torch.no_grad():
        wanted = [detector.extract_feat(batch) for batch in batches]
    if not all(isinstance(each, Tensor) for each in wanted[0]):
        raise UserError(f'{type(detector).__name__}: its backbone and neck give something other than feature maps, '
                        'which can\'t be exported')
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, 'graph.onnx')
        _write_graph(features, batches[-1], len(wanted[0]), file, size is None)
        difference = _largest(_difference(file, batch, maps) for batch, maps in zip(batches, wanted, strict=True))
        if not difference <= TOLERANCE:
            raise UserError(f'{out}: the graph\'s maps differ from torch\'s by {difference:.0e} of their largest '
                            f'value, {TOLERANCE:.0e} is allowed; nothing is written{_fix(size)}')
        quantised = quantise_(file, detector, plain.cfg, loader) if int8 else None
        with written_whole(out) as written:
            shutil.copyfile(file, written)
    checked = sorted({tuple(batch.shape[-2:]) for batch in batches}, reverse=True)
    source = source if loader else f'{source} ({reason})'
    return Exported([each.shape[1] for each in wanted[0]], size and tuple(size), checked, source, difference, quantised)


def _check(out: str, size: Sequence[int] | None, int8: bool) -> None:
    """Raise UserError unless the packages are here, and the file may be written."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise UserError(f'export needs {", ".join(PACKAGES)}; {", ".join(missing)} not installed: '
                        'pip install "rl_mmdet[deploy]"')
    if not out.endswith('.onnx'):
        raise UserError(f'{out}: an ONNX graph is called *.onnx')
    if size is not None and min(size) < 1:
        raise UserError(f'size must be two positive integers, height and width, got {size}')
    if size is not None and int8:
        raise UserError('int8 is measured on the val set, whose images have more than one size: leave out size')
    check_new_file(out)


def _only_detector(model: nn.Module) -> BaseDetector:
    """The detector in a model, or a UserError if there are several or none."""
    detectors = inner_detectors(model, lambda detector: True)
    if len(detectors) != 1:
        raise UserError(f'model: export takes one detector, and {type(model).__name__} has {len(detectors)}'
                        f'{detectors and ": "}{", ".join(detectors)}')
    return next(iter(detectors.values()))


def _val_loader(cfg: Config) -> tuple[DataLoader | None, str]:
    """The config's val set, one image at a time; or None, and why."""
    def build(cfg: Config) -> DataLoader:
        return Runner.build_dataloader(without_workers(cfg.val_dataloader) | dict(batch_size=1, batch_sampler=None))
    if not cfg.get('val_dataloader'):
        return None, 'the config has no val_dataloader'
    try:
        check_data(cfg, 'val')
    except UserError as error:
        return None, str(error)
    return built(cfg, 'val_dataloader', build, must=True), ''


def _images(detector: BaseDetector, loader: DataLoader | None,
            size: Sequence[int] | None) -> tuple[list[Tensor], str]:
    """Two images of the val set as the detector gets them, or random ones without one; and what they are."""
    if loader is not None:
        images = [detector.data_preprocessor(batch, False)['inputs'] for batch in islice(loader, 2)]
        return images, f'{len(images)} val images'
    generator = torch.Generator().manual_seed(0)
    height, width = size or (256, 384)
    return [torch.randn(1, 3, height, width, generator=generator) for _ in range(2)], 'random images'


def _batches(images: Sequence[Tensor], size: Sequence[int] | None, divisor: int) -> list[Tensor]:
    """One image, then two that are half as large at sides that ``divisor`` divides; or one and one of a given size."""
    if size:
        return [interpolate(image, tuple(size)) for image in images]
    half = [-(-side // (2 * divisor)) * divisor for side in images[0].shape[-2:]]
    return [images[0], torch.cat([interpolate(image, half) for image in images])]


def _write_graph(features: nn.Module, images: Tensor, maps: int, file: Path, any_size: bool) -> None:
    """Let torch's exporter write a graph for batches of any number of images of any size, or for such a one."""
    import onnx
    outputs = [f'map{number}' for number in range(maps)]
    axes = dict(images={0: 'batch', 2: 'height', 3: 'width'}) if any_size else None
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), quiet():
        warnings.simplefilter('ignore')
        graph = f'{folder}/graph.onnx'
        try:
            torch.onnx.export(features, (images,), graph, input_names=['images'], output_names=outputs,
                              dynamic_axes=axes)
        except OnnxExporterError as error:
            cause = error.__cause__ or error
            raise UserError(f'{type(features.backbone).__name__}: torch can\'t export it ({first_line(cause)})'
                            f'{_fix(None if any_size else images.shape[-2:])}') from error
        onnx.save(onnx.load(graph), file)  # with the weights, which newer torch puts into a file of their own


def _difference(file: Path, images: Tensor, wanted: Sequence[Tensor]) -> float:
    """How far the graph's maps are from the wanted ones, as a share of a map's largest value; ∞ if it can't run."""
    try:
        found = OnnxSession(file)(images)
    except ValueError:
        return float('inf')
    if [each.shape for each in found] != [each.shape for each in wanted]:
        return float('inf')
    return _largest(float((one - other).abs().max() / other.abs().max())
                    for one, other in zip(found, wanted, strict=True))


def _largest(values: Iterable[float]) -> float:
    """NaN if one of them is, which Python's max overlooks."""
    return torch.tensor(list(values)).max().item()


def _fix(size: Sequence[int] | None) -> str:
    """What may help a graph that depends on the images' size."""
    return '; a graph for one image of one size may do: --size HEIGHT WIDTH' if size is None else ''
