"""Gated blocks: a block and its computing layer side by side, each step equal to the model that the gates stand for."""
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mmdet.registry import MODELS
from torch import Tensor, nn

from rl_mmdet.replacement import replace_blocks_, set_step_
from rl_mmdet.replacement.flops import count_flops
from rl_mmdet.search.gated_block import GatedBlock, plain_class

LEARNED = dict(type='LearnedPlan', budget=dict(params=0.99))
GATES = [False, True, False, True, True]
"""Of a ToyNet's open blocks, which are layer1.1 and layer2.1 to layer2.4."""


@pytest.fixture
def toy(toy_net, randomise_) -> Callable[..., nn.Module]:
    """A searched ToyNet in float64 with random weights."""
    def build(**gradient: Any) -> nn.Module:
        net = toy_net()
        replace_blocks_(net, dict(plan=LEARNED, gradient=gradient or dict(every=1)))
        return randomise_(net).double()
    return build


def draw(model: nn.Module, gates: list[bool], settled: bool = False) -> list[Tensor]:
    """Set gates; returns what gets their gradients."""
    leaves = [torch.zeros((), requires_grad=True) for _ in gates]
    model.search_space.set_gates(gates, leaves, [settled] * len(gates))
    return leaves


# Each step is that of an ordinary model

def test_closed_gates_are_the_baseline(case, randomise_, as_replaced, step, assert_close, picture):
    model, baseline = randomise_(case.search()), case.build()
    baseline.load_state_dict(as_replaced(model, model.state_dict(), {}))
    draw(model, [False] * len(model.search_space.places))
    model.train(), baseline.train()
    expected, found = step(baseline, picture), step(model, picture)
    assert not [name for name in found if name.startswith('grad.') and '.replaced.' in name]
    assert_close(as_replaced(model, found, {}), expected)


@pytest.mark.parametrize('mode', ['detached', pytest.param('coupled', marks=pytest.mark.slow)])
def test_open_gates_are_the_replaced_model(case, randomise_, as_replaced, gates_of, step, assert_close, picture, mode):
    """Side by side too: each layer takes its weights from the blocks that are kept now."""
    gradient = dict(mode=mode, every=1)
    model, replaced = randomise_(case.search(gradient=gradient)), case.replaced(gradient=gradient)
    replaced.load_state_dict(as_replaced(model, model.state_dict(), case.choice))
    draw(model, [False] * len(model.search_space.places))
    draw(model, gates_of(model, case.choice))
    model.train(), replaced.train()
    expected, found = step(replaced, picture), step(model, picture)
    assert_close(as_replaced(model, found, case.choice), expected)
    assert sum(name.startswith('grad.') for name in found) == sum(name.startswith('grad.') for name in expected)


def test_before_gates_are_drawn_it_is_the_baseline_with_statistics_of_both(toy, image):
    """So that norms of computing layers can be recalibrated."""
    model = toy().train()
    before = model.layer2[1].replaced.norm1.running_mean.clone()
    with pytest.warns(UserWarning, match='no gates were drawn'):
        found = model(image.double())
    assert not torch.equal(model.layer2[1].replaced.norm1.running_mean, before)
    draw(model, [False] * 5)
    assert torch.equal(found, model(image.double()))


@pytest.mark.parametrize('turn', [0, 1])
def test_layers_that_learn_in_every_second_step_do_so_while_searching(toy, step, image, turn):
    """Their coefficients get twice the gradient or none; gates and neighbours get theirs in every step."""
    always, sometimes = toy(every=1).train(), toy(every=2).train()
    leaves = [draw(model, GATES) for model in (always, sometimes)]
    set_step_(sometimes, turn, staggered=False)
    expected, found = step(always, image.double()), step(sometimes, image.double())
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        factor = 2 * (1 - turn) if name.endswith('.coeff') else 1
        torch.testing.assert_close(found[name], factor * value, msg=name)
    assert all(torch.allclose(one.grad, other.grad) for one, other in zip(*leaves, strict=True))


# The gradient at the gates

@pytest.mark.parametrize(('train', 'mode'), [(False, 'coupled'), (True, 'detached')])
@pytest.mark.parametrize('gates', [GATES, [not gate for gate in GATES]], ids=str)
def test_gate_gradient_is_that_of_a_real_valued_gate(toy, image, weighted, train, mode, gates):
    """By finite differences of h = B + g(C - B), computed by hand with numbers that are neither 0 nor 1."""
    model = toy(mode=mode, every=1).train(train)
    leaves = draw(model, gates)
    weighted(model(image.double())).backward()
    wanted = [difference(model, lambda: weighted(model(image.double())), gates, number) for number in range(5)]
    torch.testing.assert_close(torch.stack([leaf.grad for leaf in leaves]).double(), torch.stack(wanted), rtol=1e-5,
                               atol=1e-6)
    assert (torch.stack(wanted).abs() > 1e-3).all()


@torch.no_grad()
def difference(model: nn.Module, loss: Callable[[], Tensor], gates: list[bool], number: int) -> Tensor:
    """dL/dg by central differences, with the gates of all other blocks as they are."""
    losses = []
    for change in (1e-4, -1e-4):
        for index, (block, gate) in enumerate(zip(model.search_space.blocks, gates, strict=True)):
            block.forward = mixture(block, gate + change * (index == number), 'forward')
            block.rfp_forward = mixture(block, gate + change * (index == number), 'rfp_forward')
        losses.append(loss())
        for block in model.search_space.blocks:
            del block.forward, block.rfp_forward
    return (losses[0] - losses[1]) / 2e-4


def mixture(block: GatedBlock, gate: float, way: str) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        one, other = getattr(plain_class(block), way)(block, *args), getattr(block.replaced, way)(*args)
        if isinstance(one, Tensor):
            return one + gate * (other - one)
        return type(one)(b + gate * (c - b) for b, c in zip(one, other, strict=True))
    return run


def test_only_an_open_gate_without_an_answer_runs_both(toy, image):
    """Settled, or without gradient, a step costs what the ordinary model's does."""
    model, x = toy(), image.double()
    draw(model, GATES, settled=True)
    alone = count_flops(lambda: model(x))
    leaves = draw(model, GATES)
    with torch.no_grad():
        assert count_flops(lambda: model(x)) == alone
    assert count_flops(lambda: model(x)) == pytest.approx(alone * (1 + 5 / 9), rel=0.1)
    leaves = draw(model, GATES, settled=True)
    model(x).sum().backward()
    assert all(leaf.grad is None for leaf in leaves)


# Outputs and ways forward of all kinds

class Pair(nn.Module):
    """A block that takes and gives a pair, as a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, pair: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        x, y = pair
        x = x + torch.tanh(self.one(x)) * torch.sigmoid(self.other(x))
        return x, (y + self.other(y) if isinstance(y, Tensor) and y.is_floating_point() else y)

    def rfp_forward(self, pair: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        return self.forward((2 * pair[0], pair[1]))


@pytest.fixture
def pairs() -> nn.Module:
    model = nn.Sequential(nn.Sequential(*(Pair() for _ in range(4)))).double()
    replace_blocks_(model, dict(plan=LEARNED, gradient=dict(every=1)))
    return model


@pytest.mark.parametrize('way', ['forward', 'rfp_forward'])
def test_tuples_of_outputs_and_other_ways_forward(pairs, weighted, way):
    def run() -> tuple[Tensor, Tensor]:
        x = (torch.linspace(-1, 1, 12).view(3, 4).double(), torch.ones(3, 4).double())
        for block in pairs[0]:
            x = getattr(block, way)(x)
        return x

    leaves = draw(pairs, [False, True])
    outs = run()
    weighted(outs).backward()
    assert isinstance(outs, tuple)
    for number, leaf in enumerate(leaves):
        wanted = difference(pairs, lambda: weighted(run()), [False, True], number)
        torch.testing.assert_close(leaf.grad.double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('other', [None, 3, torch.tensor(0)], ids=str)
def test_outputs_without_gradient_pass(pairs, other):
    leaves = draw(pairs, [False, True])
    out, same = pairs((torch.randn(3, 4).double(), other))
    out.sum().backward()
    assert same == other
    assert all(leaf.grad is not None for leaf in leaves)


@pytest.mark.slow
@pytest.mark.parametrize('kind', [
    dict(backbone='TridentResNet', num_branch=3, test_branch_idx=1, trident_dilations=(1, 2, 3), num_stages=3,
         strides=(1, 2, 2), dilations=(1, 1, 1), out_indices=(2,)),
    dict(backbone='DetectoRS_ResNet', rfp_inplanes=4, norm_eval=True)], ids=lambda kind: kind['backbone'])
def test_backbones_that_run_their_blocks_in_their_own_way(kind, randomise_, as_replaced, step, assert_close):
    """Lists of branches, and features of a pyramid that come back."""
    choice, x = {'layer2': [1], 'layer3': [1, 2]}, torch.randn(1, 3, 32, 32).double()
    features = [torch.linspace(-1, 1, 4 * (32 // s) ** 2).view(1, 4, 32 // s, 32 // s).double() for s in (4, 8, 16, 32)]

    def build(plan: dict | None) -> nn.Module:
        torch.manual_seed(0)
        model = MODELS.build(dict(type='RLBackbone', depth=50, base_channels=4, **copy.deepcopy(kind),
                                  replacement=plan and dict(plan=plan, gradient=dict(every=1))))
        model.init_weights()  # before it, TridentConv's weights are whatever is in memory
        return randomise_(model).double()

    model, replaced = build(LEARNED), build(dict(type='Blocks', blocks=choice))
    replaced.load_state_dict(as_replaced(model, model.state_dict(), choice))
    model.train(), replaced.train()
    leaves = draw(model, [place.index in choice.get(place.chain.name, ()) for place in model.search_space.places])
    found, expected = (step(each, x, (lambda x, each=each: each.rfp_forward(x, features))
                            if hasattr(each, 'rfp_forward') else None) for each in (model, replaced))
    assert_close(as_replaced(model, found, choice), expected)
    assert all(leaf.grad is not None for leaf in leaves)


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
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(*(InPlace() for _ in range(4))))
    replace_blocks_(model, dict(plan=LEARNED))
    draw(model, [False, False])
    with pytest.raises(RuntimeError, match='is being modified inplace'):
        model(torch.randn(3, 4))


# In mixed precision, with checkpoints, as copies

def test_bfloat16_autocast_kept_blocks_and_gates_get_their_gradient(toy_net, randomise_, image, weighted):
    """Autocast remembers casts of weights: one made without gradient must not serve the kept block that comes later."""
    found, leaves = {}, {}
    for settled, low in ((True, True), (False, True), (False, False)):
        net = toy_net()
        replace_blocks_(net, dict(plan=LEARNED, fusion=dict(type='SharedWeights'), gradient=dict(mode='coupled')))
        randomise_(net).eval()
        leaves[settled, low] = draw(net, GATES, settled)
        with torch.autocast('cpu', torch.bfloat16, enabled=low):
            weighted(net(image).float()).backward()
        found[settled, low] = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    both, alone = found[False, True], found[True, True]
    assert both.keys() == alone.keys()
    assert [name for name, value in alone.items() if not torch.equal(both[name], value)] == []
    exact, rounded = (torch.stack([leaf.grad for leaf in leaves[False, low]]) for low in (False, True))
    torch.testing.assert_close(rounded, exact, rtol=0.1, atol=0.1 * exact.abs().max().item())
    assert rounded.dtype == torch.float32


def test_with_checkpoints_the_same_gradients(bottleneck, randomise_, gates_of, step, picture, assert_close):
    found = []
    for with_cp in (False, True):
        model = randomise_(bottleneck.search(with_cp=with_cp, norm_eval=True))
        model.train()
        leaves = draw(model, gates_of(model, bottleneck.choice))
        found.append(step(model, picture) | {f'gate {number}': leaf.grad for number, leaf in enumerate(leaves)})
    assert_close(found[1], found[0], 1e-4)


def test_copies_are_independent_and_point_into_themselves(case, randomise_, gates_of, picture):
    model = randomise_(case.search()).double()
    model.eval()
    gates, x = gates_of(model, case.choice), picture.double()
    draw(model, gates)
    twin, expected = copy.deepcopy(model), model(x)
    assert all(torch.equal(one, other) for one, other in zip(twin(x), expected, strict=True))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    twin.search_space.set_gates([False] * len(gates))
    assert all(torch.equal(one, other) for one, other in zip(model(x), expected, strict=True))
    assert not any(out.equal(other) for out, other in zip(twin(x), expected, strict=True))
