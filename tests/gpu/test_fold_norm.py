"""Folded norms in mixed precision: as near to single precision as the model without folding."""
import pytest
import torch

from rl_mmdet.folding import fold_norm_

pytestmark = pytest.mark.gpu

SCALE = 65536.
"""Loss scale that MMEngine's AmpOptimWrapper begins with."""
LARGEST = 512.
"""Of the scaled gradients of weights: what cuDNN has in float16 on its way there may be a hundred times as large."""


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
        build('r50', operator=dict(type=operator), gradient=dict(every=1), base_channels=16, fold_norm=fold).to(
            device, memory_format=layout) for fold in (False, False, True))
    expected = outcome(exact, x, step, None, 1.)
    largest = max(value.abs().max().item() for name, value in expected.items() if value.ndim == 4 and 'grad' in name)
    factor = LARGEST / (SCALE * largest)  # of the loss
    wanted, actual = (outcome(model, x, step, dtype, SCALE * factor) for model in (plain, folded))
    for name in expected:
        assert torch.isfinite(wanted[name]).all(), f'{name} without folding'
        assert torch.isfinite(actual[name]).all(), name
    error, usual = (distance(found, expected) for found in (actual, wanted))
    assert error <= 3 * usual
    assert usual < 0.2


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=['bf16', 'fp16'])
def test_gradients_of_norms_may_be_beyond_the_largest_number_in_fp16(dtype, device):
    """Those of β, which are sums, and the inner products of weights that those of γ are made of."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(1, 64, 32, 32, generator=generator).to(device) / 5
    model = torch.nn.Sequential(torch.nn.Conv2d(64, 8, 1, bias=False), torch.nn.BatchNorm2d(8)).eval()
    with torch.no_grad():
        model[0].weight.normal_(0, 8, generator=generator)
        model[1].running_mean.normal_(0, 8, generator=generator)
        model[1].running_var.uniform_(2, 8, generator=generator)
    model.to(device)
    found = []
    for lower in (False, True):
        model.zero_grad()
        if lower:
            fold_norm_(model)
        with torch.autocast(device.type, dtype, enabled=lower):
            out = model(x)
        out.backward(torch.full_like(out, 100))
        found.append([parameter.grad.clone() for parameter in model.parameters()])
    expected, actual = found
    assert all(gradient.min() > 65504 for gradient in (expected[2], expected[1].abs().max()))
    for value, exact in zip(actual, expected, strict=True):
        assert (value - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize('name', ['r50', 'mobilenetv2'])
def test_in_double_precision_folding_changes_no_gradient(name, build, step, image, device, assert_same):
    x = image.double().to(device, memory_format=torch.channels_last)
    frozen = dict(norm_eval=True) if name == 'r50' else dict(backbone=dict(
        type='MobileNetV2', widen_factor=0.25, norm_eval=True))
    plain, folded = (build(name, gradient=dict(every=1), fold_norm=fold, **frozen).double().to(
        device, memory_format=torch.channels_last) for fold in (False, True))
    assert_same(step(folded, x), step(plain, x))
