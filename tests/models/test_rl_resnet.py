"""The ResNet family: what is special to it, besides what test_backbones.py says of every class."""
import copy
from typing import Any

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import ConfigDict
from torch import Tensor, nn

from rl_mmdet.models import RLResNet, RLResNetV1d, RLResNeXt
from rl_mmdet.replacement import computing_layers, materialize
from rl_mmdet.replacement.gradient import Gradient

EVERY_SECOND = dict(plan=dict(type='EveryKth', k=2))
CLASSES = (RLResNet, RLResNetV1d, RLResNeXt)
TINY = dict(depth=50, base_channels=4)
ONE_STAGE = dict(depth=50, base_channels=4, num_stages=1, strides=(1,), dilations=(1,), out_indices=(0,))


def build(kwargs: dict[str, Any], replacement: dict[str, Any] | None = EVERY_SECOND) -> nn.Module:
    """The same weights at every call."""
    torch.manual_seed(0)
    return RLResNet(**copy.deepcopy(kwargs), replacement=replacement)


def in_gradient_mode(mode: str) -> dict[str, Any]:
    return dict(EVERY_SECOND, gradient=dict(mode=mode))


# replacement=None

def test_no_replacement_is_the_default():
    assert RLResNet(**TINY).replacement_report is None


def test_no_replacement_loading_has_no_hook():
    assert len(build(TINY, None)._load_state_dict_pre_hooks) == 0


@pytest.mark.parametrize('cls', CLASSES)
def test_no_replacement_wrong_depth_raises_as_the_parent_does(cls):
    with pytest.raises(KeyError, match='20'):
        cls(depth=20)


# What the parent does when it is trained

def test_init_weights_gives_the_kept_blocks_zero_residuals():
    model = build(TINY)
    model.init_weights()
    assert not model.layer3[0].norm3.weight.any()
    assert not model.layer3[1].synthesise()['bn3.weight'].any()


def test_train_norm_eval_leaves_all_statistics(image, randomise_, in_mode):
    model = in_mode(randomise_(build(TINY)), True)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model(image)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_train_without_norm_eval_moves_the_computing_layers_statistics(image, in_mode):
    model = in_mode(build(dict(TINY, norm_eval=False)), True)
    before = model.layer3[1].bn1.running_mean.clone()
    model(image)
    assert not torch.equal(model.layer3[1].bn1.running_mean, before)


@pytest.mark.parametrize('stages', [1, 2, 3])
def test_frozen_stages_only_later_ones_are_replaced(stages):
    names = computing_layers(build(dict(TINY, frozen_stages=stages)))
    assert {name.split('.')[0] for name in names} == {f'layer{i}' for i in range(stages + 1, 5)}


def test_frozen_stages_named_in_the_plan_raise():
    plan = dict(type='Blocks', blocks={'layer1': [1]})
    with pytest.raises(ValueError, match=r"layer1 block 1 can't be replaced: its stage is frozen"):
        build(dict(TINY, frozen_stages=1), dict(plan=plan))


# Which blocks

def test_layer1_block1_takes_conv1_from_the_block_after_it_alone(randomise_):
    layer = randomise_(build(dict(TINY, deep_stem=True, stem_channels=8))).layer1[1]
    assert layer.sources['conv1.weight'] == (None, 1)
    torch.testing.assert_close(layer.synthesise()['conv1.weight'], layer.coeff[1] * layer.after.conv1.weight)


@pytest.mark.parametrize('index', [0, 5])
def test_first_and_last_block_of_a_stage_cannot_be_replaced(index):
    with pytest.raises(ValueError, match=rf"layer3 block {index} can't be replaced: no kept block"):
        build(TINY, dict(plan=dict(type='Blocks', blocks={'layer3': [index]})))


def test_depth_18_has_nothing_to_replace():
    with pytest.raises(ValueError, match=r'EveryKth\(k=2, offset=1\) replaces no .*replaced: none'):
        build(dict(depth=18, base_channels=4))


# By config

def test_registry_builds_from_a_config_dict():
    plan = dict(type='Blocks', blocks=dict(layer3=[1]))
    config = ConfigDict(type='RLResNet', **TINY, replacement=dict(plan=plan))
    assert list(computing_layers(MODELS.build(config))) == ['layer3.1']


@pytest.mark.parametrize('cls', CLASSES)
def test_registry_names_are_the_class_names(cls):
    assert MODELS.get(cls.__name__) is cls


def test_registry_wrong_setting_is_named():
    with pytest.raises(ValueError, match=r"replacement\.plan: unknown type 'Every'; allowed: .*EveryKth"):
        MODELS.build(dict(type='RLResNet', **TINY, replacement=dict(plan=dict(type='Every'))))


@pytest.mark.parametrize('cls', CLASSES)
@pytest.mark.parametrize(('arguments', 'index'), [(dict(out_indices=(0, 4)), 4), (dict(out_indices=(-1,)), -1), (
    dict(num_stages=2, strides=(1, 2), dilations=(1, 1), out_indices=(2,)), 2)])
def test_out_indices_that_do_not_exist_raise(cls, arguments, index):
    allowed = arguments.get('num_stages', 4) - 1
    with pytest.raises(ValueError, match=rf'{cls.__name__}: out_indices .* has {index}, .* allowed: 0 to {allowed}'):
        cls(**TINY, **arguments)


@pytest.mark.parametrize('replacement', [None, EVERY_SECOND], ids=['unreplaced', 'replaced'])
def test_frozen_stages_that_do_not_exist_raise(replacement):
    with pytest.raises(ValueError, match=r'frozen_stages.*5'):
        build(dict(TINY, frozen_stages=5), replacement)


def test_assertion_of_the_parent_is_a_value_error_that_quotes_it():
    with pytest.raises(ValueError, match=r'RLResNet refuses its arguments: .*len\(strides\) == len\(dilations\)'):
        RLResNet(**TINY, strides=(1, 2))


# with_cp

@pytest.fixture
def train_twins(randomise_, in_mode):
    """The same backbone without and with checkpointing."""
    def twins(kwargs: dict[str, Any], mode: str = 'detached') -> list[nn.Module]:
        return [in_mode(randomise_(build(dict(kwargs, with_cp=with_cp), in_gradient_mode(mode))), True)
                for with_cp in (False, True)]
    return twins


@pytest.mark.parametrize('mode', Gradient.MODES)
@pytest.mark.parametrize('norm_eval', [True, False])
def test_with_cp_gradients_equal_in_both_modes(mode, norm_eval, image, train_twins):
    models = [model.double() for model in train_twins(dict(TINY, norm_eval=norm_eval), mode)]
    for model in models:
        sum(level.square().mean() for level in model(image.double())).backward()
    for (name, plain), again in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(again.grad, plain.grad, rtol=1e-9, atol=1e-9, msg=name)


def test_with_cp_statistics_move_as_those_of_the_materialized_model(image, train_twins):
    model = train_twins(dict(TINY, norm_eval=False))[1]
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
def test_with_cp_synthesised_weights_are_not_saved(mode, train_twins):
    layers = [model.layer1[1] for model in train_twins(ONE_STAGE, mode)]
    weights = {tuple(layers[0].shapes[name]) for name in ('conv1.weight', 'conv2.weight', 'conv3.weight')}
    without, with_cp = (set(saved_shapes(layer, torch.randn(1, 16, 8, 8))) for layer in layers)
    assert weights <= without
    assert not weights & with_cp


def test_with_cp_is_done_for_the_computing_layer_in_its_place():
    layer = build(dict(TINY, with_cp=True)).layer3[1]
    assert layer.checkpointed
    assert not layer.template.with_cp


def test_with_cp_materialize_gives_checkpointed_blocks():
    plain = materialize(build(dict(TINY, with_cp=True)))
    assert {block.with_cp for block in plain.layer3} == {True}


def test_with_cp_without_gradient_equals(image, train_twins, assert_near):
    with torch.no_grad():
        assert_near(*(model(image) for model in train_twins(TINY)))


@pytest.mark.parametrize('mode', Gradient.MODES)
def test_with_cp_autocast_backward_gives_finite_float32_gradients(mode, image, train_twins):
    model = train_twins(TINY, mode)[1]
    with torch.autocast('cpu', dtype=torch.bfloat16):
        loss = sum(out.float().square().mean() for out in model(image))
    loss.backward()
    for parameter in model.parameters():
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()


# Compilers

@pytest.mark.parametrize('with_cp', [False, True])
def test_compile_fullgraph_outputs_and_gradients_equal(with_cp, image, train_twins, assert_near):
    models = [train_twins(ONE_STAGE)[with_cp] for _ in range(2)]
    torch._dynamo.reset()
    outs = models[0](image), torch.compile(models[1], fullgraph=True, backend='eager')(image)
    assert_near(*outs)
    for (out,) in outs:
        out.square().mean().backward()
    for (name, eager), compiled in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(compiled.grad, eager.grad, msg=name)
