"""Folded norms in mixed precision: as near to single precision as the model without folding."""
import pytest
import torch

pytestmark = pytest.mark.gpu

SCALE = 65536.
"""Loss scale that MMEngine's AmpOptimWrapper begins with."""
SIZE = 64.
"""By what weights and statistics are larger than usual, which changes no output."""
LARGEST = 8192.
"""Of the scaled gradients of folded weights: so near to the largest number in fp16, 65504, that their inner products
with the weights are beyond it."""


@torch.no_grad()
def enlarged(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d) and module.weight is not None:
            module.weight.mul_(SIZE)
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.mul_(SIZE)
            module.running_var.mul_(SIZE ** 2)
    return model


def outcome(model, x, step, dtype, scale):
    """The step under autocast, with gradients as they are without the scale."""
    with torch.autocast(x.device.type, dtype, enabled=dtype is not None):
        found = step(model, x, scale)
    return {name: value / scale if name.startswith('grad.') else value for name, value in found.items()}


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last], ids=['contiguous', 'channels_last'])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=['bf16', 'fp16'])
@pytest.mark.parametrize('operator', ['FullBlock', 'SlimBlock'])
def test_mixed_precision_with_a_loss_scale(operator, dtype, layout, build, step, image, device, distance):
    x = image.to(device).to(memory_format=layout)
    exact, plain, folded = (
        enlarged(build('r50', operator=dict(type=operator), gradient=dict(every=1), base_channels=16, fold_norm=fold))
        .to(device, memory_format=layout) for fold in (False, False, True))
    expected = outcome(exact, x, step, None, 1.)
    largest = max(value.abs().max().item() for name, value in expected.items() if value.ndim == 4 and 'grad' in name)
    factor = LARGEST / (SCALE * SIZE * largest)  # of the loss
    wanted, actual = (outcome(model, x, step, dtype, SCALE * factor) for model in (plain, folded))
    for name in expected:
        assert torch.isfinite(wanted[name]).all(), f'{name} without folding'
        assert torch.isfinite(actual[name]).all(), name
    error, usual = (distance(found, expected) for found in (actual, wanted))
    assert error <= 3 * usual
    assert usual < 0.2


@pytest.mark.parametrize('name', ['r50', 'mobilenetv2'])
def test_in_double_precision_folding_changes_no_gradient(name, build, step, image, device, assert_same):
    x = image.double().to(device, memory_format=torch.channels_last)
    frozen = dict(norm_eval=True) if name == 'r50' else dict(backbone=dict(
        type='MobileNetV2', widen_factor=0.25, norm_eval=True))
    plain, folded = (build(name, gradient=dict(every=1), fold_norm=fold, **frozen).double().to(
        device, memory_format=torch.channels_last) for fold in (False, True))
    assert_same(step(folded, x), step(plain, x))
