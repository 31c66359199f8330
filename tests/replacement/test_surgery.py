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

PLAN = dict(type='Blocks', blocks={'layer1': [1], 'layer2': [2, 3]})


@pytest.fixture
def replaced(toy_net, randomise_):
    def build(**settings) -> nn.Module:
        net = toy_net()
        replace_blocks_(net, dict(plan=PLAN, **settings))
        return randomise_(net)
    return build


# What happens

def test_replace_puts_computing_layers_at_the_named_places(toy_net):
    net = toy_net()
    replace_blocks_(net, dict(plan=PLAN))
    assert list(computing_layers(net)) == ['layer1.1', 'layer2.2', 'layer2.3']


def test_replace_leaves_the_kept_blocks_as_they_are(toy_net):
    net = toy_net()
    kept = net.layer2[1]
    before = copy.deepcopy(kept.state_dict())
    replace_blocks_(net, dict(plan=PLAN))
    assert net.layer2[1] is kept
    assert all(torch.equal(value, before[key]) for key, value in kept.state_dict().items())


def test_replace_defaults_are_scalar_fusion_full_block_and_detached(toy_net):
    settings = replace_blocks_(toy_net(), dict(plan=PLAN)).settings
    assert settings['fusion'] == "ScalarFusion(init=0.5, pretrained='average')"
    assert settings['operator'] == 'FullBlock()'
    assert settings['gradient'] == "Gradient(mode='detached')"


def test_replace_takes_ready_objects(toy_net):
    net = toy_net()
    replace_blocks_(net, dict(plan=Blocks({'layer2': [1]}), fusion=ScalarFusion(0.25), operator=FullBlock(),
                              gradient=Gradient('coupled')))
    assert net.layer2[1].coeff.tolist() == [0.25, 0.25]
    assert net.layer2[1].gradient.mode == 'coupled'


def test_replace_takes_a_class_as_type(toy_net):
    net = toy_net()
    replace_blocks_(net, dict(plan=dict(type=EveryKth, k=4)))
    assert list(computing_layers(net)) == ['layer1.1', 'layer2.1']


def test_replace_does_not_change_the_config(toy_net):
    config = dict(plan=dict(type='EveryKth', k=4), fusion=dict(type='ScalarFusion', init=0.3))
    before = copy.deepcopy(config)
    replace_blocks_(toy_net(), config)
    assert config == before


def test_replace_initial_weights_are_the_mean_of_the_neighbours(toy_net):
    net = toy_net()
    replace_blocks_(net, dict(plan=PLAN))
    expected = (net.layer2[1].conv1.weight + net.layer2[4].conv1.weight) / 2
    torch.testing.assert_close(net.layer2[2].synthesise()['conv1.weight'], expected)


def test_replace_frozen_stage_is_left_alone(toy_net):
    net = toy_net()
    net.layer1.requires_grad_(False)
    replace_blocks_(net, dict(plan=dict(type='EveryKth', k=2)))
    assert list(computing_layers(net)) == ['layer2.1', 'layer2.3']


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
                              r"replacement\.plan: EveryKth has no argument 'ofset'; allowed: k, offset"),
    'plan_missing_argument': (dict(plan=dict(type='EveryKth')), ValueError,
                              r"replacement\.plan: EveryKth needs the argument 'k'"),
    'plan_wrong_k': (dict(plan=dict(type='EveryKth', k=1)), ValueError,
                     r'replacement\.plan: EveryKth: k must be an integer of at least 2, got 1'),
    'plan_wrong_offset': (dict(plan=dict(type='EveryKth', k=2, offset=2)), ValueError,
                          r'replacement\.plan: EveryKth: offset must be an integer from 0 to .* 1, got 2'),
    'plan_wrong_blocks': (dict(plan=dict(type='Blocks', blocks=[1])), TypeError,
                          r'replacement\.plan: Blocks: blocks must be a dict'),
    'plan_unknown_stage': (dict(plan=dict(type='Blocks', blocks={'layer5': [1]})), ValueError,
                           r"replacement\.plan: Blocks: there is no stage 'layer5'; .*layer1: \[1\]"),
    'plan_index_out_of_range': (dict(plan=dict(type='Blocks', blocks={'layer1': [3]})), ValueError,
                                r'replacement\.plan: Blocks: layer1 has no block 3, its blocks are 0 to 2'),
    'plan_first_block': (dict(plan=dict(type='Blocks', blocks={'layer2': [1, 0]})), ValueError,
                         r"layer2 block 0 can't be replaced: no kept block before it .*layer1: \[1\]"),
    'plan_last_block': (dict(plan=dict(type='Blocks', blocks={'layer2': [1, 5]})), ValueError,
                        r"layer2 block 5 can't be replaced: no kept block after it .*layer1: \[1\]"),
    'plan_replaces_nothing': (dict(plan=dict(type='EveryKth', k=9, offset=8)), ValueError,
                              r'EveryKth\(k=9, offset=8\) replaces no block of this model; .*layer1: \[1\]'),
    'fusion_unknown_type': (dict(plan=PLAN, fusion=dict(type='Mean')), ValueError,
                            r"replacement\.fusion: unknown type 'Mean'; allowed: .*ScalarFusion"),
    'fusion_not_a_dict': (dict(plan=PLAN, fusion='ScalarFusion'), TypeError,
                          r"replacement\.fusion must be a dict such as dict\(type='ScalarFusion'\)"),
    'fusion_unknown_argument': (dict(plan=PLAN, fusion=dict(start=1)), ValueError,
                                r"replacement\.fusion: ScalarFusion has no argument 'start'; allowed: init"),
    'fusion_wrong_pretrained': (dict(plan=PLAN, fusion=dict(pretrained='mean')), ValueError,
                                r"replacement\.fusion: .*unknown pretrained='mean'; allowed: average, least"),
    'fusion_wrong_init': (dict(plan=PLAN, fusion=dict(init='half')), ValueError,
                          r"replacement\.fusion: ScalarFusion: init must be a finite number, got 'half'"),
    'operator_unknown_type': (dict(plan=PLAN, operator=dict(type='Half')), ValueError,
                              r"replacement\.operator: unknown type 'Half'; allowed: .*FullBlock"),
    'operator_unknown_argument': (dict(plan=PLAN, operator=dict(type='FullBlock', x=1)), ValueError,
                                  r"replacement\.operator: FullBlock has no argument 'x'; allowed: "),
    'gradient_unknown_mode': (dict(plan=PLAN, gradient=dict(mode='both')), ValueError,
                              r"replacement\.gradient: unknown mode 'both'; allowed: detached, coupled"),
    'gradient_unknown_argument': (dict(plan=PLAN, gradient=dict(kind='x')), ValueError,
                                  r"replacement\.gradient: Gradient has no argument 'kind'; allowed: mode"),
    'gradient_not_a_dict': (dict(plan=PLAN, gradient='coupled'), TypeError,
                            r"replacement\.gradient must be a dict such as .*mode='detached'.*'coupled'"),
}


@pytest.mark.parametrize(('replacement', 'error', 'match'), REFUSED.values(), ids=REFUSED)
def test_replace_wrong_setting_is_named(toy_net, replacement, error, match):
    with pytest.raises(error, match=match):
        replace_blocks_(toy_net(), replacement)


@pytest.mark.parametrize(('replacement', 'error'), [case[:2] for case in REFUSED.values()], ids=REFUSED)
def test_replace_wrong_setting_leaves_the_model_untouched(toy_net, snapshot, replacement, error):
    net = toy_net()
    modules, tensors, learns, hooks = snapshot(net)
    with pytest.raises(error):
        replace_blocks_(net, replacement)
    after = snapshot(net)
    assert (after[0], after[2], after[3]) == (modules, learns, hooks)
    assert list(after[1]) == list(tensors)
    assert all(torch.equal(after[1][key], value) for key, value in tensors.items())


def test_replace_frozen_block_raises(toy_net):
    net = toy_net()
    net.layer2.requires_grad_(False)
    with pytest.raises(ValueError, match=r"layer2 block 2 can't be replaced: its stage is frozen"):
        replace_blocks_(net, dict(plan=dict(type='Blocks', blocks={'layer2': [2]})))


def test_replace_block_without_shape_equal_neighbour_raises():
    chain = nn.Sequential(*(nn.TransformerEncoderLayer(4, 1, size) for size in (4, 6, 4, 4, 4)))
    with pytest.raises(ValueError, match=r'linear1.weight \(6, 4\) has no tensor of .*wide: \[2, 3\]'):
        replace_blocks_(nn.ModuleDict({'wide': chain}), dict(plan=dict(type='Blocks', blocks={'wide': [1]})))


def test_replace_model_without_chains_raises():
    with pytest.raises(ValueError, match='the model has no chain of blocks'):
        replace_blocks_(nn.Linear(2, 2), dict(plan=dict(type='EveryKth', k=2)))


def test_replace_twice_raises(replaced):
    with pytest.raises(ValueError, match=r'has computing layers already; materialize\(\) it first'):
        replace_blocks_(replaced(), dict(plan=PLAN))


def test_replace_after_materialize_works(replaced):
    plain = materialize(replaced())
    replace_blocks_(plain, dict(plan=dict(type='Blocks', blocks={'layer2': [1]})))
    assert list(computing_layers(plain)) == ['layer2.1']


# Going back

@pytest.mark.parametrize('mode', Gradient.MODES)
@pytest.mark.parametrize('train', [False, True], ids=['eval', 'train'])
def test_materialize_outputs_equal(replaced, image, mode, train):
    net = replaced(gradient=dict(mode=mode)).train(train)
    torch.testing.assert_close(materialize(net)(image), net(image), rtol=1e-5, atol=1e-5)


def test_materialize_train_statistics_move_alike(replaced, image):
    net = replaced().train()
    plain = materialize(net)
    net(image)
    plain(image)
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(net.get_buffer(name), buffer, msg=name)


def test_materialize_keys_shapes_and_classes_are_the_baselines(toy_net, replaced):
    def describe(model: nn.Module) -> tuple:
        return ({key: value.shape for key, value in model.state_dict().items()},
                [(name, type(module)) for name, module in model.named_modules()])
    assert describe(materialize(replaced())) == describe(toy_net())


def test_materialize_state_loads_strictly_into_the_baseline(toy_net, replaced, image):
    net, baseline = replaced().eval(), toy_net().eval()
    baseline.load_state_dict(materialize(net).state_dict(), strict=True)
    torch.testing.assert_close(baseline(image), net(image))


def test_materialize_leaves_the_replaced_model_as_it_is(replaced, snapshot, assert_same_state):
    net = replaced()
    before = snapshot(net)
    materialize(net)
    after = snapshot(net)
    assert (after[0], after[2], after[3]) == (before[0], before[2], before[3])
    assert_same_state(after[1], before[1])


def test_materialize_result_is_independent(replaced, image):
    net = replaced().eval()
    plain = materialize(net)
    expected = plain(image)
    with torch.no_grad():
        for tensor in net.state_dict().values():
            tensor.zero_()
    assert torch.equal(plain(image), expected)


def test_materialize_weights_are_leaves_that_learn(replaced):
    parameter = materialize(replaced()).layer2[2].conv1.weight
    assert isinstance(parameter, nn.Parameter)
    assert parameter.is_leaf
    assert parameter.requires_grad


def test_materialize_removes_the_loading_hook(replaced):
    net = replaced()
    assert len(net._load_state_dict_pre_hooks) == 1
    assert len(materialize(net)._load_state_dict_pre_hooks) == 0


def test_materialize_keeps_the_mode_of_every_module(replaced):
    net = replaced().train()
    net.layer2[2].norm1.eval()
    block = materialize(net).layer2[2]
    assert [block.training, block.norm1.training, block.norm2.training] == [True, False, True]


def test_materialize_model_without_computing_layers_is_copied(toy_net, assert_same_state):
    net = toy_net()
    plain = materialize(net)
    assert plain is not net
    assert_same_state(plain.state_dict(), net.state_dict())


def test_materialize_part_of_a_larger_model(replaced, image):
    whole = nn.Sequential(replaced().eval(), nn.Flatten())
    torch.testing.assert_close(materialize(whole)(image), whole(image))


def test_materialize_non_finite_weight_names_the_block(replaced):
    net = replaced()
    with torch.no_grad():
        net.layer2[3].coeff[0] = float('nan')
    with pytest.raises(ValueError, match=r'layer2\.3: the synthesised .* has non-finite values'):
        materialize(net)


def test_materialize_a_computing_layer_alone_raises(replaced):
    with pytest.raises(ValueError, match=r'materialize\(\) takes the whole model'):
        materialize(replaced().layer2[2])


# Models of others

@pytest.fixture
def torchvision_net(randomise_):
    net = ResNet(Bottleneck, [4, 3, 1, 1], num_classes=3)
    report = replace_blocks_(net, dict(plan=dict(type='EveryKth', k=2)))
    return randomise_(net), report


@pytest.fixture
def timm_vit(randomise_):
    net = timm.create_model('vit_tiny_patch16_224', pretrained=False, img_size=32, depth=5, embed_dim=24,
                            num_classes=3)
    report = replace_blocks_(net, dict(plan=dict(type='EveryKth', k=2)))
    return randomise_(net), report


def test_torchvision_resnet_which_blocks_are_replaced(torchvision_net):
    assert torchvision_net[1].replaced == {'layer1': [1], 'layer2': [1]}


@pytest.mark.parametrize('train', [False, True], ids=['eval', 'train'])
def test_torchvision_resnet_materialize_outputs_equal(torchvision_net, train):
    net = torchvision_net[0].train(train)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(materialize(net)(x), net(x), rtol=1e-5, atol=1e-5)


def test_timm_vit_which_blocks_are_replaced(timm_vit):
    assert timm_vit[1].replaced == {'blocks': [1, 3]}


@pytest.mark.parametrize('train', [False, True], ids=['eval', 'train'])
def test_timm_vit_materialize_outputs_equal(timm_vit, train):
    net = timm_vit[0].train(train)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(materialize(net)(x), net(x), rtol=1e-5, atol=1e-5)


def test_timm_vit_every_parameter_learns(timm_vit):
    net = timm_vit[0].train()
    net(torch.randn(2, 3, 32, 32)).square().mean().backward()
    without = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []
