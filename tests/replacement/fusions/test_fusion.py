"""What all fusions share: where they start, that gradients are right, and what is refused."""
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rl_mmdet.replacement import computing_layers, replace_blocks_
from rl_mmdet.replacement.fusions import ScalarFusion, TransformFusion

every_fusion = pytest.mark.parametrize('fusion', [ScalarFusion, TransformFusion])


@every_fusion
@pytest.mark.parametrize(('more', 'factor'), [({}, 0.5), (dict(init=-1.5), -1.5)])
def test_start_is_the_average_of_the_neighbours_times_two_init(pairs_of, start_of, mixed, fusion, more, factor):
    fusion, pairs = fusion(**more), pairs_of()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            made = fusion.fuse(start_of(fusion), pairs)
        assert list(made) == list(pairs)
        for name, expected in mixed([(factor, factor)] * 5, pairs).items():
            torch.testing.assert_close(made[name], expected)


@every_fusion
def test_its_parameters_learn_and_have_the_models_dtype(toy_net, fusion):
    net = toy_net().bfloat16()
    replace_blocks_(net, dict(plan=dict(type='EveryKth', k=2), fusion=fusion()))
    for layer in computing_layers(net).values():
        assert all(p.requires_grad and p.dtype == torch.bfloat16 for p in layer.own_parameters().values())


@every_fusion
@pytest.mark.parametrize('one_sided', [True, False])
def test_gradients_of_parameters_and_neighbours(pairs_of, start_of, fusion, one_sided):
    fusion = fusion(**({'rank': 1} if fusion is TransformFusion else {}))
    shapes = {'conv.weight': (2, 2, 3, 1), 'norm.weight': (2,), 'fc.weight': (3, 2), 'fc.bias': (3,), 'table': (4, 2)}
    pairs, start = pairs_of(shapes, one_sided), start_of(fusion, shapes)
    given = [torch.randn(value.shape, dtype=torch.float64) for value in start.values()]
    places = [(name, side) for name in pairs for side in (0, 1) if pairs[name][side] is not None]
    given += [pairs[name][side] for name, side in places]

    def fused(*values):
        of = dict(zip(places, values[len(start):], strict=True))
        parameters = dict(zip(start, values, strict=False))
        return tuple(fusion.fuse(parameters, {n: (of.get((n, 0)), of.get((n, 1))) for n in pairs}).values())

    assert torch.autograd.gradcheck(fused, [value.requires_grad_() for value in given], fast_mode=True)


class Calls(TorchDispatchMode):
    """The operations that are called, views included."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_more_tensors_take_hardly_more_calls():
    """Each is a launch on a GPU. In backward every tensor has a sum of its own, for each of a and b."""
    def called(count):
        sides = [[torch.randn(3, 3, requires_grad=True) for _ in range(count)] for _ in range(2)]
        pairs = {f'{number}.weight': pair for number, pair in enumerate(zip(*sides, strict=True))}
        with Calls() as calls:
            made = ScalarFusion().fuse(dict(coeff=torch.full((2,), 0.5, requires_grad=True)), pairs)
            forward = len(calls.names)
            torch.autograd.backward(list(made.values()), [torch.ones(3, 3)] * count)
        return forward, len(calls.names) - forward
    (forward, backward), (more_forward, more_backward) = called(2), called(9)
    assert more_forward == forward
    assert more_backward - backward <= 2 * 7 * 2  # a sum, and a detach of what becomes .grad, for each of both sides


@every_fusion
def test_tensors_that_only_one_neighbour_has_are_made_without_gradient(pairs_of, start_of, fusion):
    pairs = {name: pair for name, pair in pairs_of().items() if None in pair}
    shapes = {name: tuple(next(side for side in pair if side is not None).shape) for name, pair in pairs.items()}
    with torch.no_grad():
        made = fusion().fuse(start_of(fusion(), shapes), pairs)
    torch.testing.assert_close(made['fc.weight'], pairs['fc.weight'][0] / 2)


@pytest.mark.parametrize(('fusion', 'more', 'error', 'message'), [
    (ScalarFusion, dict(adapt=1), TypeError, 'adapt must be True or False, got 1'),
    (TransformFusion, dict(init='a'), ValueError, "init must be a finite number, got 'a'"),
])
def test_wrong_arguments_raise_with_the_fusions_name(fusion, more, error, message):
    with pytest.raises(error, match=f'{fusion.__name__}: {message}'):
        fusion(**more)
