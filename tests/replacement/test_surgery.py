"""Surgery: replacing in place, going back to plain weights, and refusing without a trace."""
import copy

import pytest
import timm
import torch
from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet

from rl_mmdet.replacement import computing_layers, materialize, replace_blocks_
from rl_mmdet.replacement.fusions import ScalarFusion
from rl_mmdet.replacement.gradient import Gradient
from rl_mmdet.replacement.operators import FullBlock
from rl_mmdet.replacement.plans import Blocks, EveryKth
from rl_mmdet.replacement.registry import OPERATORS

PLAN = dict(type='Blocks', blocks={'layer1': [1], 'layer2': [2, 3]})


class OwnOperator(FullBlock):
    """Of a user, registered from a file of theirs."""

    def __init__(self, **kwargs) -> None:
        super().__init__()
        self.given = kwargs


# What happens

def test_an_operator_of_ones_own_may_take_any_arguments(toy_net, monkeypatch):
    monkeypatch.setitem(OPERATORS.module_dict, 'OwnOperator', OwnOperator)
    net = toy_net()
    replace_blocks_(net, dict(plan=PLAN, operator=dict(type='OwnOperator', strength=3)))
    assert net.layer1[1].operator.given == dict(strength=3)


def test_replace_puts_computing_layers_at_the_named_places_and_leaves_the_others(toy_net):
    net = toy_net()
    kept = net.layer2[1]
    before = copy.deepcopy(kept.state_dict())
    settings = replace_blocks_(net, dict(plan=PLAN)).settings
    assert list(computing_layers(net)) == ['layer1.1', 'layer2.2', 'layer2.3']
    assert net.layer2[1] is kept
    assert all(torch.equal(value, before[key]) for key, value in kept.state_dict().items())
    assert settings == dict(plan="Blocks({'layer1': [1], 'layer2': [2, 3]})", operator='FullBlock()',
                            fusion="ScalarFusion(init=0.5)",
                            gradient="Gradient(mode='detached', every=8)", start='Average()')


def test_replace_takes_ready_objects_and_classes(toy_net):
    net = toy_net()
    replace_blocks_(net, dict(plan=Blocks({'layer2': [1]}), fusion=ScalarFusion(0.25), operator=FullBlock(),
                              gradient=Gradient('coupled')))
    assert net.layer2[1].coeff.tolist() == [0.25, 0.25]
    assert net.layer2[1].gradient.mode == 'coupled'
    net = toy_net().double()
    replace_blocks_(net, dict(plan=dict(type=EveryKth, k=4)))
    assert list(computing_layers(net)) == ['layer1.1', 'layer2.1']
    assert net.layer2[1].coeff.dtype == torch.float64


def test_replace_does_not_change_the_config(toy_net):
    config = dict(plan=dict(type='EveryKth', k=4), fusion=dict(type='ScalarFusion', init=0.3))
    before = copy.deepcopy(config)
    replace_blocks_(toy_net(), config)
    assert config == before


# What is refused, and that the model is then untouched

REFUSED = {
    'not_a_dict': ('EveryKth', TypeError, r"replacement must be a dict such as dict\(plan=.*got 'EveryKth'"),
    'no_plan': ({}, ValueError, r'replacement: plan is missing; for instance plan=dict\('),
    'unknown_setting': (dict(plan=PLAN, plans=1), ValueError,
                        "replacement: unknown setting 'plans'; allowed: plan, fusion, operator, gradient"),
    'plan_unknown_type': (dict(plan=dict(type='EveryNth', k=2)), ValueError,
                          r"replacement\.plan: unknown type 'EveryNth'; allowed: .*Blocks.*EveryKth"),
    'plan_not_a_dict': (dict(plan=4), TypeError, r"replacement\.plan must be a dict such as .*, got 4"),
    'plan_unknown_argument': (dict(plan=dict(type='EveryKth', k=2, ofset=1)), ValueError,
                              r"replacement\.plan: EveryKth has no argument 'ofset'; allowed: k, offset; if it is "
                              'inherited from the settings of another type, add _delete_=True'),
    'plan_missing_argument': (dict(plan=dict(type='EveryKth')), ValueError,
                              r"replacement\.plan: EveryKth needs the argument 'k'"),
    'plan_wrong_k': (dict(plan=dict(type='EveryKth', k=1)), ValueError,
                     r'replacement\.plan: EveryKth: k must be an integer of at least 2, got 1'),
    'plan_first_block': (dict(plan=dict(type='Blocks', blocks={'layer2': [1, 0]})), ValueError,
                         r"layer2 block 0 can't be replaced: no kept block before it .*layer1: \[1\]"),
    'plan_last_block': (dict(plan=dict(type='Blocks', blocks={'layer2': [1, 5]})), ValueError,
                        r"layer2 block 5 can't be replaced: no kept block after it .*layer1: \[1\]"),
    'plan_replaces_nothing': (dict(plan=dict(type='EveryKth', k=9, offset=8)), ValueError,
                              r'EveryKth\(k=9, offset=8\) replaces no block of this model; .*layer1: \[1\]'),
    'fusion_unknown_type': (dict(plan=PLAN, fusion=dict(type='Mean')), ValueError,
                            r"replacement\.fusion: unknown type 'Mean'; allowed: .*ScalarFusion"),
    'operator_unknown_type': (dict(plan=PLAN, operator=dict(type='Half')), ValueError,
                              r"replacement\.operator: unknown type 'Half'; allowed: .*FullBlock"),
}


@pytest.mark.parametrize(('replacement', 'error', 'match'), REFUSED.values(), ids=REFUSED)
def test_replace_wrong_setting_is_named_and_leaves_the_model_untouched(toy_net, snapshot, assert_same_state,
                                                                       replacement, error, match):
    net = toy_net()
    modules, tensors, learns, hooks = snapshot(net)
    with pytest.raises(error, match=match):
        replace_blocks_(net, replacement)
    after = snapshot(net)
    assert (after[0], after[2], after[3]) == (modules, learns, hooks)
    assert_same_state(after[1], tensors)


@pytest.mark.parametrize(('model', 'blocks', 'match'), [
    (lambda net: net.requires_grad_(False), {'layer2': [2]}, "layer2 block 2 can't be replaced: its stage is frozen"),
    (lambda net: nn.ModuleList([nn.Sequential(*(nn.TransformerEncoderLayer(4, 1, n) for n in (4, 6, 4, 4, 4)))]),
     {'0': [1]}, r'linear1.weight \(6, 4\) has no tensor of .*0: \[2, 3\]'),
    (lambda net: nn.Linear(2, 2), {'layer1': [1]}, "there is no stage 'layer1'"),
])
def test_replace_blocks_that_cant_be_replaced_raises(toy_net, model, blocks, match):
    with pytest.raises(ValueError, match=match):
        replace_blocks_(model(toy_net()), dict(plan=dict(type='Blocks', blocks=blocks)))


def test_replace_model_without_chains_raises():
    with pytest.raises(ValueError, match='the model has no chain of blocks'):
        replace_blocks_(nn.Linear(2, 2), dict(plan=dict(type='EveryKth', k=2)))


def test_replace_twice_raises_until_it_is_materialized(replaced):
    with pytest.raises(ValueError, match=r'has computing layers already; materialize\(\) it first'):
        replace_blocks_(replaced(), dict(plan=PLAN))
    plain = materialize(replaced())
    replace_blocks_(plain, dict(plan=dict(type='Blocks', blocks={'layer2': [1]})))
    assert list(computing_layers(plain)) == ['layer2.1']


# Going back

@pytest.mark.parametrize('train', [False, True], ids=['eval', 'train'])
def test_materialize_has_the_same_outputs_and_statistics(replaced, image, train):
    net = replaced().train(train)
    plain = materialize(net)
    torch.testing.assert_close(plain(image), net(image), rtol=1e-5, atol=1e-5)
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(net.get_buffer(name), buffer, msg=name)


def test_materialize_is_the_baseline_with_weights_of_its_own(toy_net, replaced, image):
    net, baseline = replaced().eval(), toy_net().eval()
    plain = materialize(net)
    assert [(n, type(m)) for n, m in plain.named_modules()] == [(n, type(m)) for n, m in baseline.named_modules()]
    baseline.load_state_dict(plain.state_dict(), strict=True)
    expected = net(image)
    assert all(parameter.is_leaf and parameter.requires_grad for parameter in plain.parameters())
    with torch.no_grad():
        for tensor in net.state_dict().values():
            tensor.zero_()
    for each in (plain, baseline):
        torch.testing.assert_close(each(image), expected)


def test_materialize_leaves_the_replaced_model_as_it_is(replaced, snapshot, assert_same_state):
    net = replaced()
    before = snapshot(net)
    plain = materialize(net)
    after = snapshot(net)
    assert (after[0], after[2], after[3]) == (before[0], before[2], before[3])
    assert_same_state(after[1], before[1])
    assert (snapshot(net)[3], snapshot(plain)[3]) == (1, 0)  # the hook that starts from a baseline


def test_materialize_keeps_modes_and_who_learns(toy_net):
    net = toy_net().train()
    net.layer2[2].norm1.eval().requires_grad_(False)
    replace_blocks_(net, dict(plan=PLAN))
    block = materialize(net).layer2[2]
    assert [block.training, block.norm1.training, block.norm2.training] == [True, False, True]
    assert {name for name, p in block.named_parameters() if not p.requires_grad} == {'norm1.weight', 'norm1.bias'}


def test_materialize_model_without_computing_layers_is_copied(toy_net, assert_same_state):
    net = toy_net()
    plain = materialize(net)
    assert plain is not net
    assert_same_state(plain.state_dict(), net.state_dict())


def test_materialize_part_of_a_larger_model(replaced, image):
    whole = nn.Sequential(replaced().eval(), nn.Flatten())
    torch.testing.assert_close(materialize(whole)(image), whole(image))


def test_materialize_what_cant_be_raises(replaced):
    net = replaced()
    with pytest.raises(ValueError, match=r'materialize\(\) takes the whole model'):
        materialize(net.layer2[2])
    with torch.no_grad():
        net.layer2[3].coeff[0] = float('nan')
    with pytest.raises(ValueError, match=r'layer2\.3: the synthesised .* has non-finite values'):
        materialize(net)


# Models of others

def timm_vit() -> nn.Module:
    return timm.create_model('vit_tiny_patch16_224', pretrained=False, img_size=32, depth=5, embed_dim=24,
                             num_classes=3)


@pytest.mark.parametrize(('build', 'replaced'), [
    (lambda: ResNet(Bottleneck, [4, 3, 1, 1], num_classes=3), {'layer1': [1], 'layer2': [1]}),
    (timm_vit, {'blocks': [1, 3]}),
], ids=['torchvision', 'timm'])
@pytest.mark.parametrize('train', [False, True], ids=['eval', 'train'])
def test_models_of_others(randomise_, build, replaced, train):
    net, x = build(), torch.randn(2, 3, 32, 32)
    report = replace_blocks_(net, dict(plan=dict(type='EveryKth', k=2), gradient=dict(every=1)))
    assert report.replaced == replaced
    randomise_(net).train(train)
    torch.testing.assert_close(materialize(net)(x), out := net(x), rtol=1e-5, atol=1e-5)
    out.square().mean().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []
