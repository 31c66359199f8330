"""A trained detector's backbone and neck become an ONNX graph that gives torch's maps, with nothing of the method."""
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS
from torch import nn

from rl_mmdet.deploy import export_onnx
from rl_mmdet.engine import UserError, build_model, load_config
from rl_mmdet.replacement import materialize

onnx = pytest.importorskip('onnx', reason='needs the extra deploy')
onnxruntime = pytest.importorskip('onnxruntime', reason='needs the extra deploy')
pytest.importorskip('onnxscript', reason='needs the extra deploy')
from export import DETECTORS  # noqa: E402  which needs them
from rl_mmdet.deploy.onnx_session import OnnxSession  # noqa: E402

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
LIGHT = {'model.backbone.replacement': dict(
    plan=dict(_delete_=True, type='EveryKth', k=2), operator=dict(type='SlimBlock'),
    fusion=dict(type='TransformFusion', rank=1))}
SMALL = '''
model = dict(backbone=dict(base_channels=4, num_stages=2, strides=(1, 2), dilations=(1, 1), out_indices=(0, 1)),
             neck=dict(in_channels=[4, 8], start_level=0, num_outs=2),
             bbox_head=dict(anchor_generator=dict(strides=[4, 8])))
'''


@pytest.fixture
def trained(tiny_config, tmp_path, randomise_):
    """Save a checkpoint of a config's randomised detector; returns config, checkpoint and detector."""
    def train(cfg):
        model = randomise_(build_model(cfg)).eval()
        torch.save(dict(state_dict=model.state_dict(), meta={}), tmp_path / 'rl.pth')
        return cfg, str(tmp_path / 'rl.pth'), model
    return train


@torch.no_grad()
def same_maps(file, model, *shape):
    """Compare a graph with a detector on random images."""
    images = torch.randn(shape)
    session = onnxruntime.InferenceSession(file, providers=['CPUExecutionProvider'])
    found = session.run(None, dict(images=images.numpy()))
    for ours, theirs in zip(found, model.extract_feat(images), strict=True):
        torch.testing.assert_close(torch.from_numpy(ours), theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))


def test_a_graph_with_light_operators_has_plain_convolutions_and_takes_any_size(trained, tiny_config, tmp_path):
    cfg, checkpoint, model = trained(load_config(tiny_config(more=SMALL), LIGHT))
    file = str(tmp_path / 'out.onnx')
    exported = export_onnx(cfg, checkpoint, file)
    assert (exported.maps, exported.size) == ([48, 48], None)
    assert exported.images == '2 val images'
    assert exported.checked == [(128, 128), (64, 64)]
    for shape in ((1, 3, 64, 96), (3, 3, 32, 32)):
        same_maps(file, model, *shape)
    graph = onnx.load(file).graph
    plain = materialize(model)
    convolutions = [module for part in (plain.backbone, plain.neck) for module in part.modules()
                    if isinstance(module, nn.Conv2d)]
    assert Counter(node.op_type for node in graph.node)['Conv'] == len(convolutions)
    assert not {node.op_type for node in graph.node} & {'MatMul', 'Gemm', 'Mul', 'Einsum'}
    assert sorted(tuple(each.dims) for each in graph.initializer if len(each.dims) > 1) == sorted(
        tuple(module.weight.shape) for module in convolutions)


class FirstBoxes(BaseMetric):
    """The mean of the images' highest box scores, and as another metric the number of images."""

    def process(self, data_batch, data_samples):
        self.results += [float(sample['pred_instances']['scores'].max()) for sample in data_samples]

    def compute_metrics(self, results):
        return dict(mAP=sum(results) / len(results), images=len(results))


@torch.no_grad()
def test_int8_says_what_the_graph_does_to_the_configs_own_evaluation(trained, tiny_config, tmp_path, monkeypatch):
    monkeypatch.setitem(METRICS._module_dict, 'FirstBoxes', FirstBoxes)
    cfg, checkpoint, model = trained(load_config(tiny_config(more=SMALL), LIGHT | dict(
        val_evaluator=dict(_delete_=True, type='FirstBoxes'))))
    file = str(tmp_path / 'out.onnx')
    int8 = export_onnx(cfg, checkpoint, file, int8=True).int8
    assert (int8.calibrated, int8.images, len(int8.ratios)) == (2, 2, 7)
    assert int8.before.keys() == int8.after.keys() == {'mAP'}
    assert 0 < abs(int8.after['mAP'] - int8.before['mAP']) < .1 * int8.before['mAP']
    assert int8.size[1] == Path(file).stat().st_size < int8.size[0]
    graph = onnx.load(file).graph
    assert {'QuantizeLinear', 'DequantizeLinear'} < {node.op_type for node in graph.node}
    images = torch.randn(1, 3, 64, 64)
    session = onnxruntime.InferenceSession(file, providers=['CPUExecutionProvider'])
    for ours, theirs in zip(session.run(None, dict(images=images.numpy())), model.extract_feat(images), strict=True):
        assert 1e-4 < float((torch.from_numpy(ours) - theirs).norm() / theirs.norm()) < .2


def test_int8_without_a_val_set_is_refused(trained, tiny_config, tmp_path):
    cfg, checkpoint, _ = trained(load_config(tiny_config(more=SMALL), dict(
        val_dataloader=None, val_cfg=None, val_evaluator=None)))
    with pytest.raises(UserError, match='int8 takes the ranges.*from the val set: the config has no val_dataloader'):
        export_onnx(cfg, checkpoint, str(tmp_path / 'out.onnx'), int8=True)
    assert not list(tmp_path.glob('out*'))


@pytest.mark.parametrize(('name', 'size', 'package', 'message'), [
    ('out.pth', None, '', r'out.pth: an ONNX graph is called \*.onnx'),
    ('taken.onnx', None, '', 'taken.onnx: exists already'),
    ('out.onnx', (0, 32), '', r'size must be two positive integers.*got \(0, 32\)'),
    ('out.onnx', None, 'onnxruntime', r'onnxruntime not installed: pip install "rl_mmdet\[deploy\]"')])
def test_a_mistake_is_one_line_before_anything_is_read(tmp_path, monkeypatch, name, size, package, message):
    (tmp_path / 'taken.onnx').write_text('mine')
    if package:
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=message):
        export_onnx(Config(), 'nothing.pth', str(tmp_path / name), size=size)
    assert [path.name for path in tmp_path.iterdir()] == ['taken.onnx']
    assert (tmp_path / 'taken.onnx').read_text() == 'mine'


def test_int8_of_one_size_is_refused(tmp_path):
    with pytest.raises(UserError, match='int8 is measured on the val set.*leave out size'):
        export_onnx(Config(), 'nothing.pth', str(tmp_path / 'out.onnx'), size=(32, 32), int8=True)


def test_a_graph_that_is_not_torchs_gets_no_file(trained, tiny_config, tmp_path, monkeypatch):
    def export(model, images, file, **_):
        ends = [onnx.helper.make_tensor_value_info(name, 1, [None] * 4) for name in ('images', 'map0')]
        node = onnx.helper.make_node('Identity', ['images'], ['map0'])
        graph = onnx.helper.make_graph([node], 'other', ends[:1], ends[1:])
        onnx.save(onnx.helper.make_model(graph, ir_version=8, opset_imports=[onnx.helper.make_opsetid('', 17)]), file)
    monkeypatch.setattr(torch.onnx, 'export', export)
    cfg, checkpoint, _ = trained(load_config(tiny_config(more=SMALL)))
    with pytest.raises(UserError, match='maps differ from torch.*nothing is written.*--size HEIGHT WIDTH'):
        export_onnx(cfg, checkpoint, str(tmp_path / 'out.onnx'))
    assert not list(tmp_path.glob('out*'))


def test_a_graph_with_one_map_that_is_not_finite_gets_no_file(trained, tiny_config, tmp_path, monkeypatch):
    class Broken(OnnxSession):
        def __call__(self, images):
            *maps, last = super().__call__(images)
            return [*maps, last * float('nan')]

    monkeypatch.setattr('rl_mmdet.deploy.onnx_graph.OnnxSession', Broken)
    cfg, checkpoint, _ = trained(load_config(tiny_config(more=SMALL)))
    with pytest.raises(UserError, match='maps differ from torch.s by nan'):
        export_onnx(cfg, checkpoint, str(tmp_path / 'out.onnx'))
    assert not list(tmp_path.glob('out*'))


@pytest.mark.slow
@pytest.mark.parametrize(('name', 'size'), DETECTORS.items())
def test_detectors(trained, tmp_path, name, size):
    cfg = load_config(f'{CONFIGS}/{name}.py', dict(val_dataloader=None, val_cfg=None, val_evaluator=None))
    cfg, checkpoint, model = trained(cfg)
    exported = export_onnx(cfg, checkpoint, str(tmp_path / 'out.onnx'), size=size)
    assert exported.images == 'random images (the config has no val_dataloader)'
    for shape in [(1, 3, *size)] if size else [(1, 3, 96, 160), (2, 3, 128, 64)]:
        same_maps(str(tmp_path / 'out.onnx'), model, *shape)
