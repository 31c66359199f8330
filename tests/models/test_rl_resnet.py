"""The ResNet family: what is special to it, besides what test_backbones.py says of every class."""
import copy
from typing import Any

import pytest
import torch
from mmdet.registry import MODELS
from torch import Tensor, nn

from rl_mmdet.models import RLResNet, RLResNetV1d, RLResNeXt
from rl_mmdet.replacement import computing_layers, materialize

EVERY_SECOND = dict(plan=dict(type='EveryKth', k=2))
CLASSES = (RLResNet, RLResNetV1d, RLResNeXt)
TINY = dict(depth=50, base_channels=4)
ONE_STAGE = dict(depth=50, base_channels=4, num_stages=1, strides=(1,), dilations=(1,), out_indices=(0,))


def build(kwargs: dict[str, Any], replacement: dict[str, Any] | None = EVERY_SECOND) -> nn.Module:
    """The same weights at every call."""
    torch.manual_seed(0)
    return RLResNet(**copy.deepcopy(kwargs), replacement=replacement)


# replacement=None

def test_no_replacement_is_the_default_and_loads_as_the_parent_does():
    model = RLResNet(**TINY)
    assert model.replacement_report is None
    assert len(model._load_state_dict_pre_hooks) == 0


@pytest.mark.parametrize('cls', CLASSES)
def test_wrong_depth_raises_as_the_parent_does(cls):
    with pytest.raises(KeyError, match='20'):
        cls(depth=20)


# What the parent does when it is trained

def test_init_weights_gives_all_blocks_zero_residuals():
    model = build(TINY)
    model.init_weights()
    assert not model.layer3[0].norm3.weight.any()
    assert not materialize(model).layer3[1].norm3.weight.any()


@pytest.mark.parametrize('norm_eval', [True, False])
def test_train_moves_statistics_only_without_norm_eval(norm_eval, image, randomise_, in_mode):
    model = in_mode(randomise_(build(dict(TINY, norm_eval=norm_eval))), True)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model(image)
    moved = {name for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])}
    assert moved == (set() if norm_eval else set(before))


# Which blocks

@pytest.mark.parametrize('stages', [1, 3])
def test_frozen_stages_only_later_ones_are_replaced(stages):
    names = computing_layers(build(dict(TINY, frozen_stages=stages)))
    assert {name.split('.')[0] for name in names} == {f'layer{i}' for i in range(stages + 1, 5)}


def test_layer1_block1_takes_conv1_from_the_block_after_it_alone(randomise_):
    model = randomise_(build(dict(TINY, deep_stem=True, stem_channels=8)))
    made, after = materialize(model).layer1[1].conv1.weight, model.layer1[2].conv1.weight
    torch.testing.assert_close(made, model.layer1[1].coeff[1] * after)


@pytest.mark.parametrize(('kwargs', 'plan', 'match'), [
    (TINY, dict(type='Blocks', blocks={'layer3': [0]}), "layer3 block 0 can't be replaced: no kept block"),
    (TINY, dict(type='Blocks', blocks={'layer3': [5]}), "layer3 block 5 can't be replaced: no kept block"),
    (dict(TINY, frozen_stages=1), dict(type='Blocks', blocks={'layer1': [1]}),
     "layer1 block 1 can't be replaced: its stage is frozen"),
    (dict(TINY, depth=18), EVERY_SECOND['plan'], r'EveryKth\(k=2, offset=1\) replaces no .*replaced: none'),
    (TINY, dict(type='Every'), r"replacement\.plan: unknown type 'Every'; allowed: .*EveryKth"),
], ids=['first', 'last', 'frozen', 'depth_18', 'unknown_plan'])
def test_block_or_plan_that_is_not_there_raises(kwargs, plan, match):
    with pytest.raises(ValueError, match=match):
        MODELS.build(dict(kwargs, type='RLResNet', replacement=dict(plan=plan)))


# Arguments that the parents refuse without a word, or not at all

@pytest.mark.parametrize('cls', CLASSES)
@pytest.mark.parametrize(('arguments', 'match'), [
    (dict(out_indices=(0, 4)), 'out_indices .* has 4, .* allowed: 0 to 3'),
    (dict(out_indices=(-1,)), 'out_indices .* has -1, .* allowed: 0 to 3'),
    (dict(num_stages=2, out_indices=(2,)), 'out_indices .* has 2, .* allowed: 0 to 1'),
    (dict(frozen_stages=5), 'frozen_stages=5, but there are 4 stages; allowed: -1 to 4'),
    (dict(strides=(1, 2)), r'refuses its arguments: .*len\(strides\) == len\(dilations\)'),
])
def test_stages_that_do_not_exist_raise(cls, arguments, match):
    with pytest.raises(ValueError, match=f'{cls.__name__}:? {match}'):
        cls(**TINY, **arguments)


# with_cp

@pytest.fixture
def train_twins(randomise_, in_mode):
    """The same backbone without and with checkpointing."""
    def twins(kwargs: dict[str, Any], mode: str = 'detached') -> list[nn.Module]:
        replacement = dict(EVERY_SECOND, gradient=dict(mode=mode, every=1))
        return [in_mode(randomise_(build(dict(kwargs, with_cp=with_cp), replacement)), True)
                for with_cp in (False, True)]
    return twins


def test_with_cp_replaced_blocks_move_their_statistics_once_a_step(image, train_twins):
    kept, again = train_twins(dict(TINY, norm_eval=False))
    assert {block.with_cp for block in materialize(again).layer3} == {True}
    for model in (kept, again):
        sum(level.square().mean() for level in model(image)).backward()
    layers = computing_layers(kept)
    assert layers
    for name, layer in layers.items():
        for key, buffer in layer.named_buffers():
            torch.testing.assert_close(again.get_submodule(name).get_buffer(key), buffer, msg=f'{name}.{key}')


def saved_shapes(model: nn.Module, x: Tensor) -> set[tuple]:
    """Shapes of what one forward keeps for backward, the parameters and buffers excepted."""
    known = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    shapes = set()

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in known:
            shapes.add(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x.requires_grad_())
    return shapes


@pytest.mark.parametrize('mode', ['detached', 'coupled'])
def test_with_cp_made_weights_are_not_saved(mode, train_twins):
    models = train_twins(ONE_STAGE, mode)
    block = materialize(models[0]).layer1[1]
    weights = {tuple(conv.weight.shape) for conv in (block.conv1, block.conv2, block.conv3)}
    without, with_cp = (saved_shapes(model.layer1[1], torch.randn(1, 16, 8, 8)) for model in models)
    assert weights <= without
    assert not weights & with_cp


# Compilers

@pytest.mark.parametrize('with_cp', [False, True])
def test_compile_fullgraph_outputs_and_gradients_equal(with_cp, image, train_twins, assert_near):
    models = [train_twins(ONE_STAGE)[with_cp] for _ in range(2)]
    torch._dynamo.reset()
    outs = models[0](image), torch.compile(models[1], fullgraph=torch.__version__ >= (2, 3), backend='eager')(image)
    assert_near(*outs)
    for (out,) in outs:
        out.square().mean().backward()
    for (name, eager), compiled in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(compiled.grad, eager.grad, msg=name)
