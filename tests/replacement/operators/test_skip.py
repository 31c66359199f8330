"""Skip: the blocks left out."""
import pytest
import torch
from mmdet.models.backbones.resnet import Bottleneck
from timm.models.vision_transformer import Block

from rl_mmdet.replacement import adapt_state_dict, materialize


@pytest.mark.parametrize(('make', 'shape'), [(lambda: Bottleneck(16, 4), (2, 16, 6, 6)),
                                             (lambda: Block(8, 2), (2, 5, 8))], ids=['bottleneck', 'vit'])
def test_gives_its_input_back_and_has_no_state(build, make, shape):
    net, x = build(make, dict(type='Skip')), torch.randn(shape)
    assert not net.blocks[1].state_dict()
    for each in (net, materialize(net)):
        assert torch.equal(each.blocks[1](x), x)
        assert torch.equal(each(x), each.blocks[2](each.blocks[0](x)))
    adapted, report = adapt_state_dict(net, build(make, None).state_dict())
    assert (report.initialised, report.missing, report.left_over) == (['blocks.1'], [], [])
    net.load_state_dict(adapted)
    net.train()(x).sum().backward()
    assert all(p.grad is not None for p in net.parameters())
