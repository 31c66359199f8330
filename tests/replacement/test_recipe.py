"""Recipes: which blocks have one, that it is what they compute, and that looking leaves a block as it was."""
from functools import partial

import pytest
import torch
from mmdet.models.backbones.res2net import Bottle2neck
from mmdet.models.backbones.resnet import BasicBlock, Bottleneck
from mmdet.models.backbones.resnext import Bottleneck as ResNeXtBottleneck
from timm.layers import GroupNorm
from timm.models.convnext import ConvNeXtBlock
from timm.models.resnet import Bottleneck as TimmBottleneck
from torch import Tensor, nn

from rl_mmdet.replacement.recipe import Recipe, affine, agrees, autocast_now, norm_again, recipe_of

GN = dict(norm_cfg=dict(type='GN', num_groups=2))
WITH = {
    'basic': lambda: BasicBlock(8, 8),
    'bottleneck': lambda: Bottleneck(16, 4),
    'dilated': lambda: Bottleneck(16, 4, dilation=2),
    'resnext': lambda: ResNeXtBottleneck(16, 4, groups=2, base_width=32),
    'timm': lambda: TimmBottleneck(16, 4),
    'GN': lambda: BasicBlock(8, 8, **GN),
    'timm, GN': lambda: TimmBottleneck(16, 4, norm_layer=partial(GroupNorm, num_groups=2)),
}


class Plain(nn.Module):
    """A residual unit of two convolutions, each with a bias; arguments change one thing about it."""

    def __init__(self, norm=nn.BatchNorm2d, act=nn.ReLU, channels: int = 4, factor: float = 1, **conv) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(4, channels, 3, **dict(dict(padding=1), **conv)), norm(channels)
        self.conv2, self.norm2 = nn.Conv2d(channels, 4, 3, padding=1), norm(4)
        self.act = act()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.norm1(self.conv1(x)))
        return self.act(x + self.norm2(self.conv2(out)) * self.factor)


WITH['biased'] = Plain
WITHOUT = {
    'plugin': lambda: Bottleneck(16, 4, plugins=[dict(cfg=dict(type='ContextBlock', ratio=1 / 4),
                                                      position='after_conv3')]),
    'deformable': lambda: Bottleneck(16, 4, dcn=dict(type='DCN', deform_groups=1), conv_cfg=None),
    'stride': lambda: BasicBlock(8, 8, stride=2, downsample=nn.Conv2d(8, 8, 1, stride=2)),
    'res2net': lambda: Bottle2neck(16, 4, scales=2, base_width=32, stage_type='normal'),
    'convnext': lambda: ConvNeXtBlock(8),
    'other activation': lambda: TimmBottleneck(16, 4, act_layer=nn.SiLU),
    'no activation': lambda: Plain(act=nn.Identity),
    'no norms': lambda: Plain(norm=nn.Identity),
    'norm of each example': lambda: Plain(norm=nn.InstanceNorm2d),
    'norm without statistics': lambda: Plain(norm=partial(nn.BatchNorm2d, track_running_stats=False)),
    'other padding': lambda: Plain(padding_mode='reflect'),
    'padding by name': lambda: Plain(padding='same'),
    'even kernel': lambda: nn.Sequential(nn.Conv2d(4, 4, 2), nn.BatchNorm2d(4), nn.ReLU(),
                                         nn.Conv2d(4, 4, 2, padding=1), nn.BatchNorm2d(4)),
}


@pytest.fixture
def random(randomise_):
    """A random block and its parameters by name."""
    def build(make) -> tuple[nn.Module, dict[str, Tensor]]:
        torch.manual_seed(0)
        block = randomise_(make()).double()
        return block, {name: p.detach() for name, p in block.named_parameters()}
    return build


def picture(block: nn.Module) -> Tensor:
    channels = next(m.in_channels for m in block.modules() if isinstance(m, nn.Conv2d))
    return torch.randn(2, channels, 7, 6, generator=torch.Generator().manual_seed(2)).double()


# Which blocks

@pytest.mark.parametrize('kind', WITH)
def test_recipe_is_what_the_block_computes(random, kind):
    block, tensors = random(WITH[kind])
    x, recipe = picture(block), recipe_of(block)
    torch.testing.assert_close(recipe.run(block, tensors, x), block.eval()(x), rtol=1e-12, atol=1e-12)
    assert agrees(recipe, block, tensors, block)


def test_recipe_names_convolutions_and_norms_in_order():
    assert recipe_of(Bottleneck(16, 4)) == Recipe(['conv1', 'conv2', 'conv3'], ['bn1', 'bn2', 'bn3'])
    assert recipe_of(BasicBlock(8, 8, **GN)) == Recipe(['conv1', 'conv2'], ['gn1', 'gn2'])


@pytest.mark.parametrize('kind', WITHOUT)
def test_blocks_without_a_recipe(kind):
    assert recipe_of(WITHOUT[kind]()) is None


# Whether it agrees

class NormsFirst(Plain):
    """The same modules in another order."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(self.act(self.norm1(x)))
        return x + self.conv2(self.act(self.norm2(out)))


class Scaled(Plain):
    def __init__(self) -> None:
        super().__init__(factor=1.01)


class OtherShape(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[..., :-1]


class ReluAtTheEndOnly(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(x + self.norm2(self.conv2(self.norm1(self.conv1(x)))))


@pytest.mark.parametrize('kind', [NormsFirst, Scaled, OtherShape, ReluAtTheEndOnly])
def test_a_block_that_computes_something_else_does_not_agree(random, kind):
    block, tensors = random(kind)
    recipe = recipe_of(block)
    assert recipe is not None
    assert not agrees(recipe, block, tensors, block)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize('kind', WITH)
def test_agreement_allows_for_rounding(random, kind, dtype):
    block, _ = random(WITH[kind])
    block.to(dtype)
    tensors = {name: p.detach() for name, p in block.named_parameters()}
    assert agrees(recipe_of(block), block, tensors, block)


@pytest.mark.parametrize('train', [True, False])
@pytest.mark.parametrize('kind', ['bottleneck', 'GN'])
def test_agreement_leaves_everything_as_it_was(random, kind, train):
    block, tensors = random(WITH[kind])
    block.train(train)
    next(m for m in block.modules() if isinstance(m, (nn.BatchNorm2d, nn.GroupNorm))).train(not train)
    modes, state = [m.training for m in block.modules()], {n: b.clone() for n, b in block.state_dict().items()}
    rng = torch.get_rng_state()
    assert agrees(recipe_of(block), block, tensors, block)
    assert modes == [m.training for m in block.modules()]
    assert all(torch.equal(state[name], value) for name, value in block.state_dict().items())
    assert torch.equal(rng, torch.get_rng_state())


def test_agreement_does_not_depend_on_autocast(random):
    block, tensors = random(WITH['bottleneck'])
    seen = []

    def run(x: Tensor) -> Tensor:
        seen.append(torch.is_autocast_enabled('cpu'))
        return block(x)

    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert agrees(recipe_of(block), block, tensors, run)
    assert seen == [False]


def test_norms_in_eval_get_their_modes_back():
    block = Bottleneck(16, 4)
    recipe, modes = recipe_of(block), (True, False, True)
    for norm, mode in zip(recipe.norms_of(block), modes, strict=True):
        norm.training = mode
    with pytest.raises(ZeroDivisionError), recipe.norms_in_eval(block):
        assert not any(norm.training for norm in recipe.norms_of(block))
        raise ZeroDivisionError
    assert tuple(norm.training for norm in recipe.norms_of(block)) == modes


# Norms

@pytest.mark.parametrize('more', [{}, dict(affine=False), dict(eps=0.1)])
@pytest.mark.parametrize('train', [True, False])
@pytest.mark.parametrize('norm', [nn.BatchNorm2d, nn.GroupNorm])
def test_norm_again_is_the_norm_but_for_its_statistics(randomise_, norm, train, more):
    x, module = torch.randn(2, 4, 5, 3), norm(*(2, 4) if norm is nn.GroupNorm else (4,), **more).train(train)
    randomise_(module)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    again = norm_again(module, train, x, **affine({f'n.{k}': v for k, v in module.named_parameters()}, 'n'))
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    torch.testing.assert_close(again, module(x))


@pytest.mark.parametrize('make', [WITH['bottleneck'], WITH['resnext'], Plain,
                                  partial(Plain, norm=partial(nn.BatchNorm2d, affine=False, eps=0.1))])
def test_folding_keeps_what_is_computed(random, make):
    block, tensors = random(make)
    block.eval()
    recipe = recipe_of(block)
    expected = out = picture(block)
    folded = [recipe.fold(block, index, tensors) for index in range(len(recipe.convs))]
    for (weight, bias), conv, name, norm in zip(folded, recipe.settings(block), recipe.convs,
                                                recipe.norms, strict=True):
        out = conv.run(out, weight, bias)
        expected = block.get_submodule(norm)(block.get_submodule(name)(expected))
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


def test_foldable_are_blocks_with_all_norms_in_eval_mode():
    block = Bottleneck(16, 4).eval()
    recipe = recipe_of(block)
    assert recipe.foldable(block)
    block.bn2.train()
    assert not recipe.foldable(block)
    assert recipe.local(block)


def test_sync_batch_norm_looks_beyond_this_process_while_it_trains():
    block = nn.SyncBatchNorm.convert_sync_batchnorm(Bottleneck(16, 4)).eval()
    recipe = recipe_of(block)
    assert recipe.local(block) and recipe.foldable(block)
    block.bn3.train()
    assert not recipe.local(block) and not recipe.foldable(block)


def test_autocast_now_is_that_of_the_moment_it_was_asked():
    with torch.autocast('cpu', dtype=torch.bfloat16):
        inside = autocast_now('cpu')
    outside = autocast_now('cpu')
    with inside():
        assert torch.is_autocast_enabled('cpu') and torch.get_autocast_dtype('cpu') == torch.bfloat16
        with outside():
            assert not torch.is_autocast_enabled('cpu')
