"""Gated blocks: a block and its computing layer side by side, each step equal to the model that the gates stand for."""
import copy
import itertools
import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mmdet.registry import MODELS
from torch import Tensor, nn

from rl_mmdet.replacement import replace_blocks_
from rl_mmdet.search.gated_block import GatedBlock, gate_, plain_class, ungate_

LEARNED = dict(type='LearnedPlan', budget=dict(params=0.99))
modes = pytest.mark.parametrize('train', [False, True], ids=['eval', 'train'])


@pytest.fixture
def toy(toy_net, randomise_) -> Callable[..., nn.Module]:
    """A searched ToyNet in float64 with random weights; its open blocks are layer1.1 and layer2.1 to layer2.4."""
    def build(fusion: Any = None, **gradient: Any) -> nn.Module:
        net = toy_net()
        replace_blocks_(net, dict(plan=LEARNED, fusion=fusion, gradient=gradient))
        return randomise_(net).double()
    return build


def leaves_for(model: nn.Module) -> list[Tensor]:
    return [torch.zeros((), requires_grad=True) for _ in model.search_space.places]


def weighted(outs: Any) -> Tensor:
    """A loss that every output counts in."""
    outs = [outs] if isinstance(outs, Tensor) else outs
    return sum((out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum() for out in outs)


# Each step is that of an ordinary model

@pytest.mark.parametrize(('train', 'drawn'), [(False, True), (True, True), (True, False)],
                         ids=['eval', 'train', 'not drawn'])
def test_closed_gates_are_the_baseline(searched, randomise_, as_replaced, step, assert_equal, picture, train, drawn):
    model, baseline = randomise_(searched.search()), searched.build()
    baseline.load_state_dict(as_replaced(model, model.state_dict(), {}))
    if drawn:
        leaves = leaves_for(model)
        model.search_space.set_gates([False] * len(leaves), leaves)
    model.train(train), baseline.train(train)
    expected, found = step(baseline, picture), step(model, picture)
    assert not [name for name in found if name.startswith('grad.') and '.replaced.' in name]
    assert_equal(as_replaced(model, found, {}), expected)


@pytest.mark.parametrize(('train', 'mode'), [(False, 'detached'), (True, 'detached'), (True, 'coupled')])
def test_open_gates_are_the_replaced_model(searched, randomise_, as_replaced, gates_of, step, assert_equal, picture,
                                           train, mode):
    """Side by side too: each layer takes its weights from the blocks that are kept now."""
    model = randomise_(searched.search(gradient=dict(mode=mode)))
    replaced = searched.replaced(gradient=dict(mode=mode))
    replaced.load_state_dict(as_replaced(model, model.state_dict(), searched.choice))
    model.search_space.set_gates([False] * len(leaves_for(model)))
    model.search_space.set_gates(gates_of(model, searched.choice), leaves_for(model))
    model.train(train), replaced.train(train)
    expected, found = step(replaced, picture), step(model, picture)
    assert_equal(as_replaced(model, found, searched.choice), expected)
    assert count(found) == count(expected)


def count(found: dict[str, Tensor]) -> int:
    """How many parameters got a gradient: what isn't chosen gets none."""
    return sum(name.startswith('grad.') for name in found)


def test_neighbours_are_those_of_the_last_gates(toy):
    model = toy()
    layers = {index: model.layer2[index].replaced for index in (1, 2, 3, 4)}
    for gates, kept in [((0, 1, 1, 0), {2: (1, 4), 3: (1, 4), 1: (0, 4), 4: (1, 5)}),
                        ((1, 1, 1, 1), {1: (0, 5), 2: (0, 5), 3: (0, 5), 4: (0, 5)}),
                        ((0, 0, 0, 0), {1: (0, 2), 2: (1, 3), 3: (2, 4), 4: (3, 5)})]:
        model.search_space.set_gates([False, *map(bool, gates)])
        for index, (before, after) in kept.items():
            assert layers[index].before is model.layer2[before]
            assert layers[index].after is model.layer2[after]


# The gradient at the gates

GATES = [[0, 0, 0, 0, 0], [1, 0, 1, 0, 1], [0, 1, 1, 1, 0], [1, 1, 1, 1, 1]]


@pytest.mark.parametrize('mode', ['detached', 'coupled'])
@pytest.mark.parametrize('gates', GATES, ids=str)
@modes
def test_gate_gradient_is_that_of_a_real_valued_gate(toy, image, train, gates, mode):
    """By finite differences of h = B + g(C - B), computed by hand with numbers that are neither 0 nor 1."""
    model, gates = toy(mode=mode).train(train), list(map(bool, gates))
    leaves = leaves_for(model)
    model.search_space.set_gates(gates, leaves)
    weighted(model(image.double())).backward()
    found = torch.stack([leaf.grad for leaf in leaves]).double()
    wanted = torch.stack([difference(model, model, gates, number, image.double()) for number in range(len(gates))])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert (wanted.abs() > 1e-3).all()


@torch.no_grad()
def difference(model: nn.Module, run: Callable[[Tensor], Any], gates: list[bool], number: int, x: Tensor,
               eps: float = 1e-4) -> Tensor:
    """dL/dg by central differences, with the gates of all other blocks as they are."""
    losses = []
    for change in (eps, -eps):
        mixed = [float(gate) + change * (index == number) for index, gate in enumerate(gates)]
        for block, gate in zip(model.search_space.blocks, mixed, strict=True):
            block.forward = mixture(block, gate, 'forward')
            block.rfp_forward = mixture(block, gate, 'rfp_forward')
        losses.append(weighted(run(x)))
        for block in model.search_space.blocks:
            del block.forward, block.rfp_forward
    return (losses[0] - losses[1]) / (2 * eps)


def mixture(block: GatedBlock, gate: float, way: str) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        one = getattr(plain_class(block), way)(block, *args, **kwargs)
        other = getattr(block.replaced, way)(*args, **kwargs)
        if isinstance(one, Tensor):
            return one + gate * (other - one)
        return type(one)(b + gate * (c - b) for b, c in zip(one, other, strict=True))
    return run


def test_gate_gradients_of_several_runs_add_up(toy, image):
    model, one = toy().eval(), image.double()
    leaves, single = leaves_for(model), []
    for x in (one, 2 * one):
        model.search_space.set_gates([True, False, True, False, False], each := leaves_for(model))
        weighted(model(x)).backward()
        single.append(torch.stack([leaf.grad for leaf in each]))
    model.search_space.set_gates([True, False, True, False, False], leaves)
    (weighted(model(one)) + weighted(model(2 * one))).backward()
    torch.testing.assert_close(torch.stack([leaf.grad for leaf in leaves]), sum(single))


# Which of the two runs

@pytest.fixture
def calls() -> Callable[[nn.Module, Callable[[], object]], dict[str, int]]:
    """How often the first convolutions of layer2.1 and layer2.2, and of the layers beside them, run."""
    def count(model: nn.Module, run: Callable[[], object]) -> tuple[int, ...]:
        counts: Counter = Counter()
        names = ('layer2.1.conv1', 'layer2.1.replaced.conv1', 'layer2.2.conv1', 'layer2.2.replaced.conv1')
        hooks = [model.get_submodule(name).register_forward_hook(lambda *_, name=name: counts.update([name]))
                 for name in names]
        run()
        for hook in hooks:
            hook.remove()
        return tuple(counts[name] for name in names)
    return count


OPEN = [False, True, False, False, False]


def test_with_gradient_both_run_once(toy, calls, image):
    model = toy()
    model.search_space.set_gates(OPEN, leaves_for(model))
    assert calls(model, lambda: model(image.double())) == (1, 1, 1, 1)


def test_without_gradient_the_chosen_one_runs(toy, calls, image):
    model = toy()
    model.search_space.set_gates(OPEN, leaves_for(model))
    with torch.no_grad():
        assert calls(model, lambda: model(image.double())) == (0, 1, 1, 0)


def test_settled_the_chosen_one_runs(toy, calls, image):
    model = toy()
    leaves = leaves_for(model)
    model.search_space.set_gates(OPEN, leaves, [False, True, True, False, False])
    assert calls(model, lambda: weighted(model(image.double())).backward()) == (0, 1, 1, 0)
    assert [leaf.grad is None for leaf in leaves] == [False, True, True, False, False]


def test_settled_layers_that_are_closed_keep_the_weights_they_had(toy, calls, image):
    """A layer that never runs again needs no neighbours."""
    model = toy()
    model.search_space.set_gates([False, False, True, True, True], settled=[False, True, True, False, False])
    assert model.layer2[2].replaced.after is model.layer2[5]


@pytest.mark.parametrize('grad', [True, False])
def test_before_gates_are_drawn_both_run(toy, calls, image, grad):
    """So that the statistics of both can be recalibrated."""
    model = toy().train()
    before = model.layer2[1].replaced.norm1.running_mean.clone()
    with torch.set_grad_enabled(grad):
        assert calls(model, lambda: model(image.double())) == (1, 1, 1, 1)
    assert not torch.equal(model.layer2[1].replaced.norm1.running_mean, before)


@pytest.mark.parametrize('gates', GATES, ids=str)
def test_what_isnt_chosen_gets_no_gradient(toy, image, gates):
    model = toy(mode='detached')
    model.search_space.set_gates(list(map(bool, gates)), leaves_for(model))
    weighted(model(image.double())).backward()
    for gate, block in zip(gates, model.search_space.blocks, strict=True):
        own = {name: parameter for name, parameter in block.named_parameters() if not name.startswith('replaced.')}
        assert all((parameter.grad is None) == bool(gate) for parameter in own.values())
        assert all((parameter.grad is not None) == bool(gate) for parameter in block.replaced.parameters())


# Outputs and ways forward of all kinds

@pytest.fixture
def trident(randomise_) -> Callable[..., nn.Module]:
    def build(plan: dict | None) -> nn.Module:
        torch.manual_seed(0)
        replacement = plan and dict(plan=plan)
        net = MODELS.build(dict(
            type='RLBackbone', backbone='TridentResNet', depth=50, base_channels=4, num_branch=3, test_branch_idx=1,
            trident_dilations=(1, 2, 3), num_stages=3, strides=(1, 2, 2), dilations=(1, 1, 1), out_indices=(2,),
            replacement=replacement))
        net.init_weights()  # before it, TridentConv's weights are whatever is in memory
        return randomise_(net).double()
    return build


def test_lists_of_outputs(trident, as_replaced, step, assert_equal):
    model, baseline = trident(LEARNED), trident(None)
    baseline.load_state_dict(as_replaced(model, model.state_dict(), {}))
    x = torch.randn(1, 3, 32, 32).double()
    model.train(), baseline.train()
    leaves = leaves_for(model)
    model.search_space.set_gates([False] * len(leaves), leaves)
    expected, found = step(baseline, x), step(model, x)
    assert_equal(as_replaced(model, found, {}), expected)
    assert all(leaf.grad is not None for leaf in leaves)


def test_lists_of_outputs_gate_gradient_is_the_sum_over_them(trident):
    model, x = trident(LEARNED), torch.randn(1, 3, 32, 32).double()
    model.eval()
    for module in model.modules():
        if hasattr(module, 'test_branch_idx'):
            module.test_branch_idx = -1  # all branches
    gates = [place.name in ('layer3.2', 'layer2.1') for place in model.search_space.places]
    leaves = leaves_for(model)
    model.search_space.set_gates(gates, leaves)
    weighted(model(x)).backward()
    wanted = [place.name in ('layer3.1', 'layer3.2', 'layer3.4') for place in model.search_space.places]
    for number, leaf in enumerate(leaves):
        if wanted[number]:
            expected = difference(model, model, gates, number, x)
            torch.testing.assert_close(leaf.grad.double(), expected, rtol=1e-4, atol=1e-6)


class Pair(nn.Module):
    """A block that takes and gives a pair, as a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, pair: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        x, y = pair
        x = x + torch.tanh(self.one(x)) * torch.sigmoid(self.other(x))
        return x, (y + self.other(y) if isinstance(y, Tensor) else y)


@pytest.fixture
def pairs() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(Pair(), Pair(), Pair(), Pair())).double()
    replace_blocks_(model, dict(plan=LEARNED))
    return model


def test_tuples_of_outputs(pairs):
    x = (torch.randn(3, 4).double(), torch.randn(3, 4).double())
    gates, leaves = [False, True], leaves_for(pairs)
    pairs.search_space.set_gates(gates, leaves)
    outs = pairs(x)
    weighted(outs).backward()
    assert isinstance(outs, tuple)
    for number, leaf in enumerate(leaves):
        torch.testing.assert_close(leaf.grad.double(), difference(pairs, pairs, gates, number, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('other', [None, 3], ids=str)
def test_outputs_that_are_no_tensors_pass(pairs, other):
    pairs.search_space.set_gates([False, True], leaves := leaves_for(pairs))
    out, same = pairs((torch.randn(3, 4).double(), other))
    out.sum().backward()
    assert same == other
    assert all(leaf.grad is not None for leaf in leaves)


def test_integer_outputs_pass(pairs):
    class Count(Pair):
        def forward(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            x, y = pair
            return x + torch.tanh(self.one(x)) * torch.sigmoid(self.other(x)), y + 1

    model = nn.Sequential(nn.Sequential(*(Count() for _ in range(4))))
    replace_blocks_(model, dict(plan=LEARNED))
    model.search_space.set_gates([False, True], leaves_for(model))
    out, number = model((torch.randn(3, 4), torch.tensor(0)))
    out.sum().backward()
    assert number == 4


class InPlace(nn.Module):
    """A block that begins with an activation in place, as pre-activation networks have it."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU(inplace=True)
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(x)
        return x + self.other(torch.tanh(self.one(x)))


def test_blocks_that_change_their_input_in_place_are_refused_by_autograd():
    """Both branches would need it as it was."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(*(InPlace() for _ in range(4))))
    replace_blocks_(model, dict(plan=LEARNED))
    model.search_space.set_gates([False, False], leaves_for(model))
    with pytest.raises(RuntimeError, match='is being modified inplace'):
        model(torch.randn(3, 4))


@pytest.fixture
def detectors() -> Callable[..., nn.Module]:
    def build(plan: dict | None, **more: Any) -> nn.Module:
        torch.manual_seed(0)
        replacement = plan and dict(plan=plan)
        model = MODELS.build(dict(type='RLBackbone', backbone='DetectoRS_ResNet', depth=50, base_channels=4,
                                  rfp_inplanes=4, norm_eval=True, replacement=replacement, **more))
        model.init_weights()
        for block in model.modules():
            if hasattr(block, 'rfp_conv') and block.rfp_conv is not None:
                nn.init.normal_(block.rfp_conv.weight, std=0.2)  # mmdet's are 0
        return model.double()
    return build


FEATURES = [torch.linspace(-1, 1, 4 * (32 // s) ** 2).view(1, 4, 32 // s, 32 // s).double() for s in (4, 8, 16, 32)]


def test_other_ways_forward(detectors, randomise_, as_replaced, step, assert_equal):
    x = torch.randn(1, 3, 32, 32).double()
    model, baseline = randomise_(detectors(LEARNED)), detectors(None)
    baseline.load_state_dict(as_replaced(model, model.state_dict(), {}))
    choice = {'layer3': [1, 2], 'layer2': [1]}
    replaced = detectors(dict(type='Blocks', blocks=choice))
    replaced.load_state_dict(as_replaced(model, model.state_dict(), choice))
    for each in (model, baseline, replaced):
        each.train()
    for wanted, expected in (({}, baseline), (choice, replaced)):
        gates = [place.index in wanted.get(place.chain.name, ()) for place in model.search_space.places]
        leaves = leaves_for(model)
        model.search_space.set_gates(gates, leaves)
        found, known = (step(each, x, lambda x, each=each: each.rfp_forward(x, FEATURES)) for each in (model, expected))
        assert_equal(as_replaced(model, found, wanted), known)
        assert all(leaf.grad is not None for leaf in leaves)


def test_other_ways_forward_gate_gradient(detectors, randomise_):
    x = torch.randn(1, 3, 32, 32).double()
    model = randomise_(detectors(LEARNED))
    model.train()
    gates = [place.name in ('layer3.2', 'layer2.1') for place in model.search_space.places]
    leaves = leaves_for(model)
    model.search_space.set_gates(gates, leaves)

    def run(x: Tensor) -> Any:
        return model.rfp_forward(x, FEATURES)

    weighted(run(x)).backward()
    for number, place in enumerate(model.search_space.places):
        if place.name in ('layer2.1', 'layer3.1', 'layer3.2', 'layer4.1'):
            expected = difference(model, run, gates, number, x, 1e-6)
            torch.testing.assert_close(leaves[number].grad.double(), expected, rtol=1e-3, atol=1e-6)


def test_vit_of_blocks_with_tables_of_two_sizes():
    """RLViT's blocks of global and of windowed attention have position tables of different sizes."""
    torch.manual_seed(0)
    model = MODELS.build(dict(type='RLViT', arch=dict(embed_dim=24, num_heads=2, depth=6), img_size=64, window_size=2,
                              drop_path_rate=0., replacement=dict(plan=LEARNED)))
    for gates in itertools.product([False, True], repeat=4):
        if model.search_space.fits(gates):
            model.search_space.set_gates(gates, leaves_for(model))
            weighted(model(torch.randn(1, 3, 64, 64))).backward()


# In mixed precision, with checkpoints

@pytest.mark.parametrize('gates', GATES, ids=str)
@pytest.mark.parametrize('fusion', [dict(type='SharedWeights', side='after'), None], ids=['shared', 'scalar'])
def test_bfloat16_autocast_kept_blocks_get_their_gradient(toy_net, randomise_, image, gates, fusion):
    """Autocast remembers casts of weights: one made without gradient must not serve the kept block that comes later."""
    found = []
    for settled in (True, False):
        net = toy_net()
        replace_blocks_(net, dict(plan=LEARNED, fusion=fusion, gradient=dict(mode='coupled')))
        randomise_(net).eval()
        net.search_space.set_gates(list(map(bool, gates)), leaves_for(net), [settled] * 5)
        with torch.autocast('cpu', torch.bfloat16):
            weighted(net(image).float()).backward()
        found.append({name: p.grad for name, p in net.named_parameters() if p.grad is not None})
    alone, both = found
    assert both.keys() == alone.keys()
    assert [name for name, value in alone.items() if not torch.equal(both[name], value)] == []
    assert {'layer1.0.conv2.weight', 'layer1.2.conv1.weight', 'layer2.0.conv1.weight', 'layer2.5.conv2.weight'} <= {
        name for name, value in both.items() if value.any()}


def test_bfloat16_autocast_gates_get_a_gradient_in_their_own_precision(toy_net, randomise_, image):
    net = toy_net()
    replace_blocks_(net, dict(plan=LEARNED))
    randomise_(net).eval()
    grads = []
    for enabled in (True, False):
        net.search_space.set_gates([False, True, False, False, True], leaves := leaves_for(net))
        with torch.autocast('cpu', torch.bfloat16, enabled=enabled):
            weighted(net(image).float()).backward()
        grads.append(torch.stack([leaf.grad for leaf in leaves]))
    assert grads[0].dtype == torch.float32
    torch.testing.assert_close(grads[0], grads[1], rtol=0.1, atol=0.1 * grads[1].abs().max().item())


@pytest.mark.parametrize('name', ['bottleneck', 'swin', 'vit'])
def test_with_checkpoints_the_same_gradients(name, randomise_, gates_of, picture, search_case):
    case, found = search_case(name), []
    norm = dict(norm_eval=True) if name == 'bottleneck' else {}
    for with_cp in (False, True):
        model = randomise_(case.search(with_cp=with_cp, **norm))
        model.train()
        model.search_space.set_gates(gates_of(model, case.choice), leaves := leaves_for(model))
        weighted(model(picture)).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None}
                     | {f'gate {number}': leaf.grad for number, leaf in enumerate(leaves)})
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-5 * value.abs().max().item() + 1e-7)


# The module

def test_gate_and_ungate(toy_net, snapshot):
    net = toy_net()
    replace_blocks_(net, dict(plan=dict(type='Blocks', blocks={'layer2': [2]})))
    block, layer, before = net.layer2[1], net.layer2[2], snapshot(net.layer2[1])
    kind = type(block)
    gate_(block, layer)
    assert isinstance(block, kind) and isinstance(block, GatedBlock) and type(block).__name__ == 'Unit'
    assert plain_class(block) is kind
    assert ungate_(block) is layer
    assert type(block) is kind
    after = snapshot(block)
    assert (after[0], after[2], list(after[1])) == (before[0], before[2], list(before[1]))
    assert not hasattr(block, 'gate') and not hasattr(block, 'replaced')


def test_models_that_are_searched_at_once_dont_share_gates(toy, image):
    one, other = toy().eval(), toy().eval()
    one.search_space.set_gates([True] * 5)
    expected = other(image.double())
    one.search_space.set_gates([False] * 5)
    assert torch.equal(one(image.double()), expected)


@pytest.mark.parametrize('way', ['deepcopy', 'pickle'])
def test_copies_are_independent_and_point_into_themselves(searched, randomise_, gates_of, picture, way):
    model = randomise_(searched.search())
    gates = gates_of(model, searched.choice)
    model.search_space.set_gates(gates, leaves_for(model))
    model.eval()
    twin = copied(model, way)
    assert [type(module).__name__ for module in twin.modules()] == [type(m).__name__ for m in model.modules()]
    assert all(torch.equal(one, other) for one, other in zip(twin(picture), model(picture), strict=True))
    assert twin.search_space is not model.search_space
    own = {id(module) for module in twin.modules()}
    layers = [block.replaced for block in twin.search_space.blocks]
    assert all(id(block) in own for layer in layers for block in layer.kept)
    assert not own & {id(module) for module in model.modules()}
    expected = model(picture)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    twin.search_space.set_gates([False] * len(gates))
    assert all(torch.equal(one, other) for one, other in zip(model(picture), expected, strict=True))
    assert [block.gate.replace for block in model.search_space.blocks] == gates
    assert not any(block.gate.replace for block in twin.search_space.blocks)


def copied(model: nn.Module, way: str) -> nn.Module:
    return copy.deepcopy(model) if way == 'deepcopy' else pickle.loads(pickle.dumps(model))
