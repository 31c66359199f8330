"""Which convolutions are folded: those whose output provably goes to one BatchNorm and nowhere else."""
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rl_mmdet.folding import fold_norm_, unfold_norm_


def plain(net: Any, x: Tensor) -> Tensor:
    return net.norm(net.conv(x))


class Net(nn.Module):
    """A convolution and a norm, and what ``run`` makes of them."""

    def __init__(self, run: Callable = plain, conv: nn.Module | None = None, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.conv, self.norm = conv or nn.Conv2d(4, 4, 1), norm or nn.BatchNorm2d(4)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


class OtherWay(Net):
    """Its backbone also runs it in another way, ``other``."""

    def __init__(self, other: Callable) -> None:
        super().__init__()
        self.other = other

    def half_forward(self, x: Tensor) -> Tensor:
        return self.other(self, x)


class OptionalNorm(Net):
    def forward(self, x: Tensor, norm: bool = True) -> Tensor:
        out = self.conv(x)
        return self.norm(out) if norm else out


class Undecided(nn.Module):
    """Can't be traced."""

    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.inner = inner or Net()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if x.mean() < 100 + torch.rand(()) else x


class OwnConv(nn.Conv2d):
    """Might compute anything."""


class OwnNorm(nn.BatchNorm2d):
    """Might compute anything."""


def no_gradient_halfway(net: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        out = net.conv(x)
    return net.norm(out)


def hooked() -> nn.Module:
    model = Net()
    model.conv.register_forward_hook(lambda *_: None)
    return model


def tied(around: Callable[[Net], nn.Module] = lambda net: net) -> nn.Module:
    first, second = Net(), Net()
    second.conv = first.conv
    return nn.Sequential(around(first), around(second))


def in_two_places(net: Net, x: Tensor) -> Tensor:
    out = net.conv(x)
    return net.norm(out) + out


LEFT_OUT = {
    'in_two_places': lambda: Net(in_two_places),
    'called_twice': lambda: Net(lambda net, x: net.norm(net.conv(x)) + net.conv(x)),
    'both_called_twice': lambda: Net(lambda net, x: net.norm(net.conv(x)) + net.norm(net.conv(-x))),
    'norm_called_twice': lambda: Net(lambda net, x: net.norm(net.conv(x)) + net.norm(x)),
    'between': lambda: Net(lambda net, x: net.norm(net.conv(x).relu())),
    'no_gradient_halfway': lambda: Net(no_gradient_halfway),
    'only_in_training': lambda: Net(lambda net, x: (in_two_places if net.training else plain)(net, x)),
    'only_with_fixed_statistics': lambda: Net(lambda net, x: (in_two_places if net.training and not net.norm.training
                                                              else plain)(net, x)),
    'unknown_in_eval': lambda: Net(lambda net, x: plain(net, x) if net.training or x.sum() > 0 else net.conv(x)),
    'other_way': lambda: OtherWay(lambda net, x: net.conv(x)),
    'other_way_is_unknown': lambda: OtherWay(lambda net, x: net.conv(x) if x.sum() > 0 else x),
    'hooked': hooked, 'tied': tied, 'tied_out_of_sight': lambda: tied(Undecided),
    'padding_same': lambda: Net(conv=nn.Conv2d(4, 4, 3, padding='same')),
    'padding_reflect': lambda: Net(conv=nn.Conv2d(4, 4, 3, padding=1, padding_mode='reflect')),
    'own_conv': lambda: Net(conv=OwnConv(4, 4, 1)), 'own_norm': lambda: Net(norm=OwnNorm(4)),
    'group_norm': lambda: Net(norm=nn.GroupNorm(2, 4)),
    'no_statistics': lambda: Net(norm=nn.BatchNorm2d(4, track_running_stats=False)),
}


@pytest.mark.parametrize('build', LEFT_OUT.values(), ids=LEFT_OUT)
def test_left_out(build, snapshot):
    model = build()
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf'fold_norm: {type(model).__name__} has no ordinary convolution whose output '
                                         'goes to one BatchNorm and nowhere else'):
        fold_norm_(model)
    assert snapshot(model)[0] == before[0]


@pytest.mark.parametrize(('build', 'names'), [
    (Net, ['conv']), (lambda: OtherWay(lambda net, x: plain(net, x).relu()), ['conv']), (OptionalNorm, ['conv']),
    (lambda: nn.Sequential(Undecided(), Net(), Net(in_two_places)), ['0.inner.conv', '1.conv']),
    (lambda: nn.ModuleDict(dict(a=Net(), b=Net(in_two_places))), ['a.conv']),
    (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())), ['0'])])
def test_taken(build, names):
    assert sorted(fold_norm_(build())) == names


def test_looking_for_pairs_changes_nothing(snapshot, assert_same_state):
    model = nn.Sequential(Undecided(), Net()).train()
    model[1].norm.eval()
    model[0].with_cp = True
    random, before = torch.get_rng_state(), snapshot(model)
    fold_norm_(model)
    unfold_norm_(model)
    after = snapshot(model)
    assert (after[0], after[2:]) == (before[0], before[2:])
    assert_same_state(after[1], before[1])
    assert model[0].with_cp
    assert torch.equal(torch.get_rng_state(), random)
