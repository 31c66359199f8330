"""What holds for blocks that are run as a whole, whether their norms are folded or look at the batch."""
import pytest
import torch
from mmdet.models.backbones.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rl_mmdet.analysis import count_flops
from rl_mmdet.replacement.folded_block import FoldedBlock
from rl_mmdet.replacement.normed_block import NormedBlock

GN = dict(type='GN', num_groups=2)
WAYS = {'folded': (FoldedBlock, False, None), 'BatchNorm that trains': (NormedBlock, True, None),
        'GroupNorm': (NormedBlock, True, GN)}
"""What runs the block, whether it trains, and its norm."""


@pytest.fixture(params=WAYS)
def way(request) -> tuple:
    return WAYS[request.param]


@pytest.fixture
def build(chain, way):
    _, train, norm = way
    more = {} if norm is None else dict(norm_cfg=norm)

    def net(blocks: tuple = (1,), basic: bool = False, **gradient) -> nn.Module:
        make = (lambda: BasicBlock(16, 16, **more)) if basic else (lambda: Bottleneck(16, 4, **more))
        return chain(make, blocks, train=train, **gradient)
    return net


def picture(batch: int = 2, size: tuple[int, int] = (9, 7)) -> Tensor:
    return torch.randn(batch, 16, *size, generator=torch.Generator().manual_seed(1)).double()


def test_it_is_run_as_a_whole(build, way):
    assert type(build(sample=1)[0][:2](picture()).grad_fn).__name__.startswith(way[0].__name__)


@pytest.mark.parametrize('memory', [None, 'rebuild', 'recompute'])
def test_sample_one_with_replaced_blocks_side_by_side(build, gradients, assert_same, memory):
    expected = gradients(build((1, 2, 3), basic=True, sample=None), picture())
    assert_same(gradients(build((1, 2, 3), basic=True, sample=1, memory=memory), picture()), expected)


@pytest.mark.parametrize('memory', [None, 'rebuild', 'recompute'])
def test_estimate_is_unbiased_with_replaced_blocks_side_by_side(build, gradients, at_every_draw, mean, assert_same,
                                                                memory):
    image = picture(size=(6, 5))
    draws = at_every_draw(build((1, 2), basic=True, sample=1 / 2, memory=memory), image)
    assert len(draws) == 2 ** 4
    assert_same(mean(draws), gradients(build((1, 2), basic=True, sample=None), image))


def test_double_backward_raises(build):
    image = picture().requires_grad_()
    [grad] = torch.autograd.grad(build(sample=1)(image).square().sum(), image, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


@pytest.mark.parametrize('memory', [None, 'rebuild', 'recompute'])
def test_backward_twice_over_a_retained_graph(build, memory):
    model, image = build(sample=1 / 4, memory=memory), picture().requires_grad_()
    loss = model(image).square().sum()
    loss.backward(retain_graph=True)
    once = model[0][1].coeff.grad.clone(), image.grad.clone()
    loss.backward()
    for now, before in zip((model[0][1].coeff.grad, image.grad), once, strict=True):
        torch.testing.assert_close(now, 2 * before)


def test_under_activation_checkpoints_the_same_part_is_drawn_again(build, gradients, assert_same):
    model, image = build(sample=1 / 4), picture()
    torch.manual_seed(5)
    expected = gradients(model, image)
    stage = model[0].forward
    model[0].forward = lambda x: checkpoint(stage, x, use_reentrant=False)
    torch.manual_seed(5)
    assert_same(gradients(model, image), expected)


@pytest.mark.parametrize('sample', [1, 1 / 3])
def test_channels_last_stays(build, gradients, at_every_draw, mean, assert_same, sample):
    image = picture(size=(6, 5)).to(memory_format=torch.channels_last)
    model = build(sample=sample).to(memory_format=torch.channels_last)
    assert model(image.clone().requires_grad_()).is_contiguous(memory_format=torch.channels_last)
    assert_same(mean(at_every_draw(model, image)), gradients(build(sample=None), image))


def test_recompute_computes_the_forward_once_more(build):
    """Whether the block behind needs the output or not; what was computed for it isn't computed again."""
    image, found = picture(batch=1, size=(16, 16)).requires_grad_(), {}
    block = 2 * 256 * (16 * 4 + 9 * 4 * 4 + 4 * 16)
    for memory in ('masks', 'recompute'):
        model = build(sample=1 / 8, memory=memory)
        model(image)
        found[memory] = [count_flops(lambda run=run: run(image).sum().backward()) for run in (model, model[0][1])]
    assert [more - less for more, less in zip(found['recompute'], found['masks'], strict=True)] == [block, block]


def test_what_was_computed_again_is_dropped_after_backward(build, way, monkeypatch):
    jobs, output_again = [], way[0].output_again
    monkeypatch.setattr(way[0], 'output_again', lambda job, *rest: jobs.append(job) or output_again(job, *rest))
    build(sample=1 / 4, memory='recompute')(picture().requires_grad_()).sum().backward()
    assert [job.inner for job in jobs] == [None]
