"""Outputs that are rebuilt in backward: the same gradients, less kept, and nothing wrong in silence."""
import copy
import gc
import pickle
import weakref

import pytest
import torch
from mmdet.models.backbones.resnet import Bottleneck as ResNetBottleneck
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from rl_mmdet.analysis import saved_bytes
from rl_mmdet.replacement import computing_layers, materialize, replace_blocks_

BLOCKS = {'stage': [1, 3, 4]}
LIGHT = ['DepthwiseBlock', 'SlimBlock']


class Bottleneck(nn.Module):
    """A residual unit of three convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(8, 2, 1, bias=False), nn.Conv2d(2, 2, 3, padding=1, bias=False)
        self.conv3 = nn.Conv2d(2, 8, 1, bias=False)
        self.inplace = False

    def forward(self, x: Tensor) -> Tensor:
        if self.inplace:
            x = x.mul_(2)
        return torch.relu(x + self.conv3(torch.relu(self.conv2(torch.relu(self.conv1(x))))))


@pytest.fixture
def build():
    def net(operator: str = 'DepthwiseBlock', memory: str | None = 'rebuild', mode: str = 'detached') -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential()
        model.stage = nn.Sequential(*(Bottleneck() for _ in range(6)))
        scale = {} if operator == 'FullBlock' else dict(scale=0.5)
        replace_blocks_(model, dict(plan=dict(type='Blocks', blocks=BLOCKS), operator=dict(type=operator, **scale),
                                    gradient=dict(mode=mode, memory=memory)))
        return model
    return net


@pytest.fixture
def image() -> Tensor:
    return torch.randn(2, 8, 16, 16, generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module, image: Tensor) -> dict[str, Tensor]:
    image = image.clone().requires_grad_()
    model(image).square().sum().backward()
    return {'image': image.grad} | {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize('mode', ['detached', 'coupled'])
@pytest.mark.parametrize('memory', ['rebuild', 'recompute'])
@pytest.mark.parametrize('operator', LIGHT)
def test_gradients_are_those_of_plain_autograd(build, image, operator, memory, mode):
    expected = gradients(build(operator, None, mode), image)
    actual = gradients(build(operator, memory, mode), image)
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@pytest.mark.parametrize('operator', ['FullBlock', 'PooledBlock'])
def test_recompute_gradients_of_operators_with_state(build, image, operator):
    expected, actual = (gradients(build(operator, memory), image) for memory in (None, 'recompute'))
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value)


@pytest.mark.parametrize('operator', LIGHT)
def test_outputs_of_replaced_blocks_are_not_saved(build, image, operator):
    """Three outputs, of which the second is the third layer's input and saved by it alone."""
    output = image.numel() * image.element_size()
    plain, rebuilt = (saved_bytes(model, lambda model=model: model(image))
                      for model in (build(operator, None), build(operator)))
    assert plain - rebuilt == 3 * output


def test_output_is_freed_after_the_block_behind_it(build, image):
    """Seen from outside: the storage is gone while the graph is still there."""
    model, storages = build(), []
    for layer in computing_layers(model).values():
        layer.register_forward_hook(lambda layer, inputs, out: storages.append(weakref.ref(out.untyped_storage())))
    out = model(image)
    assert out.grad_fn is not None
    assert [storage() for storage in storages] == [None] * 3


def test_nothing_stays_after_the_step(build, image):
    model, seen = build(), []
    follow = model.stage[2]
    follow.register_forward_pre_hook(lambda *_: None)
    layer = model.stage[1]
    layer.register_forward_hook(lambda *_: seen.append(weakref.ref(layer.rebuilt)), always_call=True)
    gc.disable()
    try:
        model(image).sum().backward()
        assert seen[0]() is None
    finally:
        gc.enable()


def test_backward_twice_over_a_retained_graph(build, image):
    model = build()
    loss = model(image).square().sum()
    loss.backward(retain_graph=True)
    once = {name: p.grad.clone() for name, p in model.named_parameters()}
    loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, 2 * once[name])


def test_changed_input_raises(build, image):
    model = build()
    x = (image * 1).requires_grad_(False)
    middle = model.stage[0](x)
    out = model.stage[2](model.stage[1](middle))
    with torch.no_grad():
        middle.add_(1)
    with pytest.raises(RuntimeError, match='inplace'):
        out.sum().backward()


def test_changed_weight_of_a_kept_block_raises(build, image):
    model = build()
    out = model(image)
    with torch.no_grad():
        model.stage[2].conv2.weight.mul_(2)
    with pytest.raises(RuntimeError, match='inplace'):
        out.sum().backward()


def test_a_block_behind_that_changes_its_input_in_place_keeps_what_it_saves(build, image):
    models = build(memory=None), build()
    for model in models:
        model.stage[2].inplace = True
    expected, actual = (gradients(model, image) for model in models)
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def test_other_hooks_on_saved_tensors_still_see_the_rest(build, image):
    model, seen = build(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.shape) or (t * 1), lambda t: t):
        out = model(image)
    assert (2, 2, 16, 16) in seen  # of the kept blocks behind replaced ones
    out.sum().backward()


@pytest.mark.parametrize('duplicate', [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_rebuild_their_own_outputs(build, image, duplicate):
    model = build()
    expected = gradients(model, image)
    model.zero_grad()
    twin = duplicate(model)
    for name, value in gradients(twin, image).items():
        assert torch.equal(value, expected[name]), name
    assert all(p.grad is None for p in model.parameters())


def test_materialize_leaves_no_hooks(build):
    plain = materialize(build())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in plain.modules())


def test_an_error_in_the_block_behind_closes_its_context(build, image):
    model = build()
    model.stage[2].conv1 = nn.Conv2d(3, 2, 1)
    with pytest.raises(RuntimeError):
        model(image)
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None


def test_with_activation_checkpoints_around_it(build, image):
    expected = gradients(build(memory=None), image)
    model = build()
    stage = model.stage.forward
    model.stage.forward = lambda x: torch.utils.checkpoint.checkpoint(stage, x, use_reentrant=False)
    for name, value in gradients(model, image).items():
        assert torch.equal(value, expected[name]), name


def test_autocast(build, image):
    with torch.autocast('cpu', dtype=torch.bfloat16):
        expected, actual = (gradients(build(memory=memory), image) for memory in (None, 'rebuild'))
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value)


def test_compiled(build, image):
    model = torch.compile(build(), backend='aot_eager', fullgraph=True)
    expected = gradients(build(), image)
    actual = gradients(model, image)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name if name == 'image' else f'_orig_mod.{name}'], value)


def test_rebuild_with_the_full_block_is_refused(build):
    with pytest.raises(ValueError, match=r"memory='rebuild' isn't possible with FullBlock\(\) and plain autograd; use"):
        build('FullBlock')


def attention() -> nn.Module:
    return nn.Sequential(nn.Sequential(*(Block(8, 2) for _ in range(3))))


def with_plugin() -> nn.Module:
    plugins = [dict(cfg=dict(type='ContextBlock', ratio=1 / 4), position='after_conv3')]
    return nn.Sequential(nn.Sequential(*(ResNetBottleneck(16, 4, plugins=plugins) for _ in range(3))))


@pytest.mark.parametrize(('make', 'operator', 'name'), [
    (attention, 'FullBlock', r'0.1 \(Block\) with FullBlock\(\)'),
    (with_plugin, 'FullBlock', r'0.1 \(Bottleneck\) with FullBlock\(\)'),
    (with_plugin, 'PooledBlock', r'0.1 \(Bottleneck\) with PooledBlock\(.*\)')])
def test_rebuild_of_a_sampled_block_without_a_recipe_is_refused(make, operator, name, snapshot, assert_same_state):
    model = make()
    classes, tensors, *rest = snapshot(model)
    with pytest.raises(ValueError, match=rf"memory='rebuild' isn't possible for {name}: .*; use memory='masks', "
                                         r"'recompute', or None"):
        replace_blocks_(model, dict(plan=dict(type='EveryKth', k=2), operator=dict(type=operator),
                                    gradient=dict(sample=0.5, memory='rebuild')))
    assert not computing_layers(model)
    classes_now, tensors_now, *rest_now = snapshot(model)
    assert (classes_now, rest_now) == (classes, rest)
    assert_same_state(tensors_now, tensors)


def test_unknown_level_is_refused(build):
    with pytest.raises(ValueError, match="unknown memory 'less'; allowed: None, masks, rebuild, recompute"):
        build(memory='less')


@pytest.mark.parametrize('operator', ['FullBlock', 'SlimBlock'])
def test_masks_without_sampling_are_refused(build, operator):
    with pytest.raises(ValueError, match="memory='masks' needs sample, for instance sample=0.125; sample=1 is exact"):
        build(operator, memory='masks')
