"""The ResNet family: without replacement the parent bit for bit, with it every argument of the parent."""
import copy
from dataclasses import dataclass

import pytest
import torch
from mmdet.models.backbones import ResNet, ResNetV1d, ResNeXt
from mmdet.registry import MODELS
from mmengine.config import ConfigDict
from mmengine.model import ExponentialMovingAverage
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rl_mmdet.models import RLResNet, RLResNetV1d, RLResNeXt
from rl_mmdet.replacement import ComputingLayer, Gradient, computing_layers, materialize

EVERY_SECOND = dict(plan=dict(type='EveryKth', k=2))
PARENTS = {RLResNet: ResNet, RLResNetV1d: ResNetV1d, RLResNeXt: ResNeXt}
TINY = dict(depth=50, base_channels=4)
TINY_X = dict(depth=50, base_channels=4, groups=2, base_width=32)
ONE_STAGE = dict(depth=50, base_channels=4, num_stages=1, strides=(1,), dilations=(1,), out_indices=(0,))


def plugin(position: str, kind: str = 'ContextBlock', **more) -> dict:
    return dict(cfg=dict(type=kind, **(more or dict(ratio=1 / 4))), position=position)


ATTENTION = plugin('after_conv2', 'GeneralizedAttention', spatial_range=-1, num_heads=2,
                   attention_type='0010', kv_stride=2)
GN = dict(type='GN', num_groups=2)
SETTINGS = {
    'depth_34': (RLResNet, dict(TINY, depth=34)),
    'depth_50': (RLResNet, TINY),
    'depth_101': (RLResNet, dict(TINY, depth=101)),
    'caffe': (RLResNet, dict(TINY, style='caffe', norm_cfg=dict(type='BN', requires_grad=False))),
    'in_channels': (RLResNet, dict(TINY, in_channels=3, stem_channels=6)),
    'deep_stem': (RLResNet, dict(TINY, deep_stem=True)),
    'avg_down': (RLResNet, dict(TINY, avg_down=True)),
    'dcn': (RLResNet, dict(TINY, dcn=dict(type='DCN', deform_groups=1), stage_with_dcn=(0, 1, 0, 0))),
    'dcn_v2': (RLResNet, dict(TINY, dcn=dict(type='DCNv2', deform_groups=1), stage_with_dcn=(0, 1, 1, 1))),
    'plugin_after_conv1': (RLResNet, dict(TINY, plugins=[plugin('after_conv1')])),
    'plugin_after_conv3': (RLResNet, dict(TINY, plugins=[dict(plugin('after_conv3'), stages=(0, 1, 1, 0))])),
    'plugin_attention': (RLResNet, dict(TINY, plugins=[ATTENTION])),
    'plugin_nonlocal': (RLResNet, dict(TINY, plugins=[plugin('after_conv2', 'NonLocal2d', reduction=2)])),
    'frozen_stages': (RLResNet, dict(TINY, frozen_stages=1)),
    'norm_train': (RLResNet, dict(TINY, norm_eval=False)),
    'group_norm': (RLResNet, dict(TINY, norm_cfg=GN)),
    'sync_bn': (RLResNet, dict(TINY, norm_cfg=dict(type='SyncBN'))),
    'conv_ws': (RLResNet, dict(TINY, conv_cfg=dict(type='ConvWS'), norm_cfg=GN)),
    'out_indices': (RLResNet, dict(TINY, out_indices=(1, 3))),
    'three_stages': (RLResNet, dict(TINY, num_stages=3, strides=(1, 2, 2), dilations=(1, 1, 1),
                                     out_indices=(2,))),
    'dilations': (RLResNet, dict(TINY, strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4))),
    'no_zero_init': (RLResNet, dict(TINY, zero_init_residual=False)),
    'with_cp': (RLResNet, dict(TINY, with_cp=True)),
    'init_cfg': (RLResNet, dict(TINY, init_cfg=dict(type='Xavier', layer='Conv2d'))),
    'v1d': (RLResNetV1d, TINY),
    'v1d_frozen': (RLResNetV1d, dict(TINY, frozen_stages=1)),
    'resnext': (RLResNeXt, TINY_X),
    'resnext_dcn': (RLResNeXt, dict(TINY_X, dcn=dict(type='DCN', deform_groups=1),
                                     stage_with_dcn=(0, 1, 0, 0))),
    'resnext_plugin': (RLResNeXt, dict(TINY_X, plugins=[plugin('after_conv3')])),
}


def build(cls: type, kwargs: dict, replacement: dict | None = EVERY_SECOND) -> nn.Module:
    """The same weights at every call; mmdet takes settings out of the dicts it is given: it gets copies."""
    torch.manual_seed(0)
    more = {} if cls in PARENTS.values() else dict(replacement=replacement)
    return cls(**copy.deepcopy(kwargs), **more)


def in_gradient_mode(mode: str) -> dict:
    return dict(EVERY_SECOND, gradient=dict(mode=mode))


def in_mode(model: nn.Module, train: bool) -> nn.Module:
    """``model.train(train)``, which returns None in mmdet's backbones."""
    model.train(train)
    return model


@pytest.fixture
def image() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def assert_equal_outputs(actual: tuple, expected: tuple, tolerance: float = 1e-5) -> None:
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@dataclass
class Case:
    """One setting: the replaced backbone with random weights, its materialized copy, the parent."""
    cls: type
    kwargs: dict
    model: nn.Module
    plain: nn.Module
    parent: nn.Module


@pytest.fixture(scope='module', params=SETTINGS.values(), ids=SETTINGS)
def case(request, randomise_) -> Case:
    cls, kwargs = request.param
    model = randomise_(build(cls, kwargs))
    return Case(cls, kwargs, model, materialize(model), build(PARENTS[cls], kwargs))


# replacement=None

def test_no_replacement_state_dict_is_the_parents(case, assert_same_state):
    assert_same_state(build(case.cls, case.kwargs, None).state_dict(), case.parent.state_dict())


def test_no_replacement_outputs_are_the_parents(case, image):
    outs = [in_mode(model, False)(image) for model in (build(case.cls, case.kwargs, None), case.parent)]
    assert all(torch.equal(one, other) for one, other in zip(*outs, strict=True))


@pytest.mark.parametrize('cls', PARENTS)
def test_no_replacement_train_outputs_are_the_parents(cls, image):
    kwargs = dict(TINY_X if cls is RLResNeXt else TINY, norm_eval=False)
    outs = [in_mode(build(c, kwargs, None), True)(image) for c in (cls, PARENTS[cls])]
    assert all(torch.equal(one, other) for one, other in zip(*outs, strict=True))


@pytest.mark.parametrize('cls', PARENTS)
def test_no_replacement_init_weights_is_the_parents(cls, assert_same_state):
    kwargs, states = TINY_X if cls is RLResNeXt else TINY, []
    for c in (cls, PARENTS[cls]):
        model = build(c, kwargs, None)
        torch.manual_seed(1)
        model.init_weights()
        states.append(model.state_dict())
    assert_same_state(*states)


def test_no_replacement_modules_are_the_parents():
    model, parent = build(RLResNet, TINY, None), build(ResNet, TINY)
    assert [(name, type(m)) for name, m in model.named_modules() if name] == [
        (name, type(m)) for name, m in parent.named_modules() if name]


def test_no_replacement_there_is_no_report():
    assert build(RLResNet, TINY, None).replacement_report is None


def test_no_replacement_is_the_default():
    assert RLResNet(**TINY).replacement_report is None


def test_no_replacement_loading_has_no_hook():
    assert len(build(RLResNet, TINY, None)._load_state_dict_pre_hooks) == 0


@pytest.mark.parametrize('cls', PARENTS)
def test_no_replacement_wrong_depth_raises_as_the_parent_does(cls):
    with pytest.raises(KeyError, match='20'):
        cls(depth=20)


# Every argument of the parent

def test_argument_some_blocks_are_replaced(case):
    assert len(computing_layers(case.model)) >= 3


def test_argument_output_shapes_are_the_parents(case, image):
    outs = [in_mode(model, True)(image) for model in (case.model, case.parent)]
    assert [out.shape for out in outs[0]] == [out.shape for out in outs[1]]


def test_argument_backward_reaches_every_learning_parameter(case, image):
    case.model.zero_grad()
    sum(out.square().mean() for out in in_mode(case.model, True)(image)).backward()
    assert [name for name, p in case.model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_argument_backward_coupled_gives_finite_nonzero_coefficient_gradients(case, image, randomise_):
    model = in_mode(randomise_(build(case.cls, case.kwargs, in_gradient_mode('coupled'))), True)
    sum(out.square().mean() for out in model(image)).backward()
    for layer in computing_layers(model).values():
        assert layer.coeff.grad.isfinite().all()
        assert layer.coeff.grad.ne(0).all()


def test_argument_materialize_equal_in_eval(case, image):
    model = in_mode(case.model, False)
    assert_equal_outputs(materialize(model)(image), model(image))


def test_argument_materialize_equal_in_train(case, image):
    model = in_mode(case.model, True)
    assert_equal_outputs(materialize(model)(image), model(image))


def test_argument_materialize_has_the_parents_keys_and_shapes(case):
    shapes = [{k: v.shape for k, v in model.state_dict().items()} for model in (case.plain, case.parent)]
    assert shapes[0] == shapes[1]


def test_argument_materialize_keeps_who_learns(case):
    plain, parent = ({name: p.requires_grad for name, p in model.named_parameters()}
                     for model in (case.plain, case.parent))
    assert plain == parent


def test_argument_state_dict_is_kept_tensors_buffers_and_coefficients(case):
    gone = tuple(f'{name}.' for name in computing_layers(case.model))
    buffers = {name for name, _ in case.parent.named_buffers()}
    expected = {key for key in case.parent.state_dict() if key in buffers or not key.startswith(gone)}
    assert set(case.model.state_dict()) == expected | {f'{name}coeff' for name in gone}


# What the parent does when it is trained

def test_init_weights_leaves_the_coefficients(image):
    model = build(RLResNet, TINY)
    model.init_weights()
    assert {tuple(layer.coeff.tolist()) for layer in computing_layers(model).values()} == {(0.5, 0.5)}


def test_init_weights_gives_the_kept_blocks_zero_residuals():
    model = build(RLResNet, TINY)
    model.init_weights()
    assert not model.layer3[0].norm3.weight.any()
    assert not model.layer3[1].synthesise()['bn3.weight'].any()


def test_train_norm_eval_keeps_all_norms_in_eval():
    model = in_mode(build(RLResNet, TINY), True)
    assert {norm.training for norm in model.modules() if isinstance(norm, _BatchNorm)} == {False}


def test_train_norm_eval_leaves_all_statistics(image, randomise_):
    model = in_mode(randomise_(build(RLResNet, TINY)), True)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model(image)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_train_without_norm_eval_moves_the_computing_layers_statistics(image):
    model = in_mode(build(RLResNet, dict(TINY, norm_eval=False)), True)
    before = model.layer3[1].bn1.running_mean.clone()
    model(image)
    assert not torch.equal(model.layer3[1].bn1.running_mean, before)


@pytest.mark.parametrize('stages', [1, 2, 3])
def test_frozen_stages_are_left_alone(stages):
    names = computing_layers(build(RLResNet, dict(TINY, frozen_stages=stages)))
    assert {name.split('.')[0] for name in names} == {f'layer{i}' for i in range(stages + 1, 5)}


def test_frozen_stages_named_in_the_plan_raise():
    plan = dict(type='Blocks', blocks={'layer1': [1]})
    with pytest.raises(ValueError, match=r"layer1 block 1 can't be replaced: its stage is frozen"):
        build(RLResNet, dict(TINY, frozen_stages=1), dict(plan=plan))


def test_frozen_stages_nothing_in_them_learns_after_train():
    model = in_mode(build(RLResNet, dict(TINY, frozen_stages=1)), True)
    assert not any(p.requires_grad for p in model.layer1.parameters())


def test_learnable_numbers_are_two_per_replaced_block():
    model, parent = build(RLResNet, TINY), build(ResNet, TINY)
    blocks = [parent.get_submodule(name) for name in computing_layers(model)]
    removed = sum(p.numel() for block in blocks for p in block.parameters())
    count = [sum(p.numel() for p in m.parameters()) for m in (model, parent)]
    assert count[0] == count[1] - removed + 2 * len(blocks)


def test_report_names_what_was_replaced():
    report = build(RLResNet, TINY).replacement_report
    assert report.replaced == {'layer1': [1], 'layer2': [1], 'layer3': [1, 3], 'layer4': [1]}


def test_layer1_block1_takes_conv1_from_the_block_after_it_alone(randomise_):
    layer = randomise_(build(RLResNet, dict(TINY, deep_stem=True, stem_channels=8))).layer1[1]
    assert layer.sources['conv1.weight'] == (None, 1)
    torch.testing.assert_close(layer.synthesise()['conv1.weight'], layer.coeff[1] * layer.after.conv1.weight)


@pytest.mark.parametrize('index', [0, 5])
def test_first_and_last_block_of_a_stage_cannot_be_replaced(index):
    with pytest.raises(ValueError, match=rf"layer3 block {index} can't be replaced: no kept block"):
        build(RLResNet, TINY, dict(plan=dict(type='Blocks', blocks={'layer3': [index]})))


def test_depth_18_has_nothing_to_replace():
    with pytest.raises(ValueError, match=r'EveryKth\(k=2, offset=1\) replaces no .*replaced: none'):
        build(RLResNet, dict(depth=18, base_channels=4))


def test_registry_builds_from_a_config_dict():
    plan = dict(type='Blocks', blocks=dict(layer3=[1]))
    config = ConfigDict(type='RLResNet', **TINY, replacement=dict(plan=plan))
    assert list(computing_layers(MODELS.build(config))) == ['layer3.1']


@pytest.mark.parametrize('cls', PARENTS)
def test_registry_names_are_the_class_names(cls):
    assert MODELS.get(cls.__name__) is cls


def test_registry_wrong_setting_is_named():
    with pytest.raises(ValueError, match=r"replacement\.plan: unknown type 'Every'; allowed: .*EveryKth"):
        MODELS.build(dict(type='RLResNet', **TINY, replacement=dict(plan=dict(type='Every'))))


# with_cp

def train_twins(kwargs: dict, mode: str, randomise_) -> list[nn.Module]:
    """The same backbone without and with checkpointing."""
    return [in_mode(randomise_(build(RLResNet, dict(kwargs, with_cp=with_cp), in_gradient_mode(mode))), True)
            for with_cp in (False, True)]


@pytest.mark.parametrize('mode', Gradient.MODES)
@pytest.mark.parametrize('norm_eval', [True, False])
def test_with_cp_outputs_and_gradients_equal(mode, norm_eval, image, randomise_):
    models = [model.double() for model in train_twins(dict(TINY, norm_eval=norm_eval), mode, randomise_)]
    outs = [model(image.double()) for model in models]
    assert_equal_outputs(*outs)
    for out in outs:
        sum(level.square().mean() for level in out).backward()
    for (name, plain), again in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(again.grad, plain.grad, rtol=1e-9, atol=1e-9, msg=name)


def test_with_cp_statistics_move_as_those_of_the_materialized_model(image, randomise_):
    model = train_twins(dict(TINY, norm_eval=False), 'detached', randomise_)[1]
    plain = materialize(model)
    for each in (model, plain):
        sum(level.square().mean() for level in each(image)).backward()
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(model.get_buffer(name), buffer, msg=name)


def saved_shapes(model: nn.Module, x: Tensor) -> list[tuple]:
    """Shapes of what one forward keeps for backward, the parameters and buffers excepted."""
    known = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    shapes = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in known:
            shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x.requires_grad_())
    return shapes


@pytest.mark.parametrize('mode', Gradient.MODES)
def test_with_cp_synthesised_weights_are_not_saved(mode, randomise_):
    layers = [model.layer1[1] for model in train_twins(ONE_STAGE, mode, randomise_)]
    weights = {tuple(layers[0].shapes[name]) for name in ('conv1.weight', 'conv2.weight', 'conv3.weight')}
    without, with_cp = (set(saved_shapes(layer, torch.randn(1, 16, 8, 8))) for layer in layers)
    assert weights <= without
    assert not weights & with_cp


def test_with_cp_is_done_for_the_computing_layer_in_its_place(randomise_):
    layer = build(RLResNet, dict(TINY, with_cp=True)).layer3[1]
    assert layer.checkpointed
    assert not layer.template.with_cp


def test_with_cp_materialize_gives_checkpointed_blocks():
    plain = materialize(build(RLResNet, dict(TINY, with_cp=True)))
    assert {block.with_cp for block in plain.layer3} == {True}


def test_with_cp_without_gradient_equals(image, randomise_):
    models = train_twins(TINY, 'detached', randomise_)
    with torch.no_grad():
        assert_equal_outputs(*(model(image) for model in models))


# Copies, casts, compilers

def test_deepcopy_points_into_the_copy():
    twin = copy.deepcopy(build(RLResNet, TINY))
    layer = twin.layer3[3]
    assert isinstance(layer, ComputingLayer)
    assert (layer.before, layer.after) == (twin.layer3[2], twin.layer3[4])


def test_deepcopy_does_not_follow_the_original(image, randomise_):
    model = in_mode(randomise_(build(RLResNet, TINY)), False)
    twin = copy.deepcopy(model)
    expected = twin(image)
    with torch.no_grad():
        model.layer3[2].conv1.weight.zero_()
    assert_equal_outputs(twin(image), expected, 0)


def test_ema_output_equals_the_materialized_average(image, randomise_):
    model = in_mode(randomise_(build(RLResNet, TINY)), False)
    ema = ExponentialMovingAverage(model, momentum=0.5)
    first = {name: p.detach().clone() for name, p in model.named_parameters()}
    ema.update_parameters(model)
    randomise_(model, seed=2)
    ema.update_parameters(model)
    by_hand = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in by_hand.named_parameters():
            parameter.copy_((parameter + first[name]) / 2)
    assert_equal_outputs(ema(image), materialize(by_hand)(image))


@pytest.mark.parametrize('mode', Gradient.MODES)
def test_autocast_equals_the_materialized_model(mode, image, randomise_):
    model = in_mode(randomise_(build(RLResNet, TINY, in_gradient_mode(mode))), False)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert_equal_outputs(model(image), materialize(model)(image), 1e-2)


@pytest.mark.parametrize('mode', Gradient.MODES)
@pytest.mark.parametrize('with_cp', [False, True])
def test_autocast_backward_gives_finite_float32_gradients(mode, with_cp, image, randomise_):
    model = in_mode(randomise_(build(RLResNet, dict(TINY, with_cp=with_cp), in_gradient_mode(mode))), True)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        loss = sum(out.float().square().mean() for out in model(image))
    loss.backward()
    for parameter in model.parameters():
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize('with_cp', [False, True])
def test_compile_fullgraph_outputs_and_gradients_equal(with_cp, image, randomise_):
    models = [in_mode(randomise_(build(RLResNet, dict(ONE_STAGE, with_cp=with_cp))), True) for _ in range(2)]
    torch._dynamo.reset()
    outs = models[0](image), torch.compile(models[1], fullgraph=True, backend='eager')(image)
    assert_equal_outputs(*outs)
    for (out,) in outs:
        out.square().mean().backward()
    for (name, eager), compiled in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(compiled.grad, eager.grad, msg=name)
