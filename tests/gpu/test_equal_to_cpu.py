"""What a replaced model computes on a GPU is what it computes on the CPU."""
import copy

import pytest
import torch

from rl_mmdet.replacement import FUSIONS, OPERATORS, computing_layers, materialize, set_step_

pytestmark = pytest.mark.gpu

NAMES = ('r50', 'swin', 'vit', 'mobilenetv2')
OPERATOR = [(name, operator) for name in NAMES for operator in OPERATORS.module_dict]
K = 3


def combinations() -> list[tuple[str, str, dict]]:
    """Each operator on tensors of each fusion, and the whole block also on tensors of other sizes; Skip needs none."""
    made = []
    for name, operator in OPERATOR:
        for fusion in list(FUSIONS.module_dict)[:1 if operator == 'Skip' else None]:
            made.append((name, operator, dict(type=fusion)))
            if operator == 'FullBlock' and fusion != 'OwnWeights':
                made.append((name, operator, dict(type=fusion, adapt=True)))
    return made


@pytest.mark.parametrize(('name', 'operator', 'fusion'), [
    pytest.param(*each, id='-'.join([*each[:2], *map(str, each[2].values())])) for each in combinations()])
def test_outputs_and_gradients(name, operator, fusion, build, step, image, device, assert_same):
    model = build(name, operator=dict(type=operator), fusion=fusion, gradient=dict(mode='coupled')).double()
    twin = copy.deepcopy(model).to(device)
    with torch.no_grad():
        expected, actual = (net(x) for net, x in ((model, image.double()), (twin, image.double().to(device))))
    for one, other in zip(actual, expected, strict=True):
        assert one.device.type == device.type
        torch.testing.assert_close(one.cpu(), other, rtol=1e-8, atol=1e-8)
    assert_same(step(twin, image.double().to(device)), step(model, image.double()))


@pytest.mark.parametrize('name', NAMES)
def test_single_precision(name, build, step, image, device, assert_near):
    model = build(name)
    for layer in computing_layers(model).values():
        layer.turn = True
    twin = copy.deepcopy(model).to(device)
    assert_near(step(twin, image.to(device)), step(model, image))


@pytest.mark.parametrize(('name', 'operator'), OPERATOR)
def test_learning_every_kth_step_and_computing_again_change_no_gradient(name, operator, build, step, image, device,
                                                                       assert_same):
    def make(**gradient):
        return build(name, operator=dict(type=operator), gradient=gradient).double().to(device)

    x = image.double().to(device)
    whole = step(make(every=1, recompute=False), x)
    for recompute in (False, True):
        model = make(every=K, recompute=recompute)
        layers = computing_layers(model)
        first = copy.deepcopy(model.state_dict())
        for number in range(K):
            model.load_state_dict(first)
            set_step_(model, number)
            expected = {name: value * _factor(name, layers) for name, value in whole.items()}
            assert_same(step(model, x), expected)


def _factor(name, layers):
    """By what the gradient of a tensor is multiplied in this step: K or 0 for what a replaced block learns."""
    owner = name.removeprefix('grad.').rpartition('.')[0]
    return K * layers[owner].turn if name.startswith('grad.') and owner in layers else 1


@pytest.mark.parametrize(('name', 'operator'), OPERATOR)
def test_materialized_model(name, operator, build, image, device):
    model = build(name, operator=dict(type=operator)).to(device)
    model.eval()
    plain = materialize(model)
    assert {tensor.device.type for tensor in plain.state_dict().values()} == {device.type}
    with torch.no_grad():
        for one, other in zip(plain(image.to(device)), model(image.to(device)), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * other.abs().max().item())


@pytest.mark.parametrize('operator', ['FullBlock', 'SlimBlock'])
def test_fastest_convolutions_for_images_of_any_size(operator, build, step, device, assert_near):
    """MMEngine's ``cudnn_benchmark=True``."""
    model = build('r50', operator=dict(type=operator), gradient=dict(every=1), fold_norm=True).to(device)
    images = [torch.randn(2, 3, *size, device=device) for size in ((64, 64), (80, 96), (64, 64), (75, 101), (96, 64))]
    expected = [step(model, x) for x in images]
    torch.backends.cudnn.benchmark = True
    try:
        actual = [step(model, x) for x in images]
    finally:
        torch.backends.cudnn.benchmark = False
    for one, other in zip(actual, expected, strict=True):
        assert_near(one, other)
