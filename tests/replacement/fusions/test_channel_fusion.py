"""ChannelFusion: a pair per output channel of a weight, per head of a table, per vector as a whole."""
import pytest
import torch

from rl_mmdet.replacement.fusions import ChannelFusion


def by_hand(coeff: torch.Tensor, pairs: dict) -> dict:
    """Channel by channel."""
    made, column = {}, 0
    for name, (before, after) in pairs.items():
        like = before if before is not None else after
        made[name] = torch.zeros_like(like)
        vector, table = like.ndim == 1, name == 'table'
        for c in range(1 if vector else like.shape[-1] if table else like.shape[0]):
            at = ... if vector else (slice(None), c) if table else c
            for factor, side in zip(coeff[:, column].tolist(), (before, after), strict=True):
                if side is not None:
                    made[name][at] += factor * side[at]
            column += 1
    assert column == coeff.shape[1]
    return made


@pytest.mark.parametrize('one_sided', [True, False])
@pytest.mark.parametrize('grad', [True, False])
def test_equation(pairs_of, start_of, one_sided, grad):
    pairs, coeff = pairs_of(one_sided=one_sided), torch.randn(2, 4 + 1 + 6 + 1 + 2, dtype=torch.float64)
    with torch.set_grad_enabled(grad):
        made = ChannelFusion().fuse({'coeff': coeff}, pairs)
    for name, expected in by_hand(coeff, pairs).items():
        torch.testing.assert_close(made[name], expected)
    assert {name: p.shape for name, p in start_of(ChannelFusion()).items()} == {'coeff': coeff.shape}


@pytest.mark.parametrize('one_sided', [True, False])
def test_least_squares_recovers_planted_coefficients(pairs_of, one_sided):
    pairs, coeff = pairs_of(one_sided=one_sided), torch.randn(2, 14, dtype=torch.float64)
    if one_sided:  # what no tensor is there for comes out as 0
        coeff[1, 5:11], coeff[0, 11] = 0, 0
    fit = ChannelFusion().fit(by_hand(coeff, pairs), pairs, least_squares=True)
    torch.testing.assert_close(fit.parameters['coeff'], coeff, rtol=1e-10, atol=1e-10)
    assert fit.residual < 1e-10


def test_least_squares_with_noise_is_lstsq_channel_by_channel(pairs_of):
    pairs = pairs_of(one_sided=False)
    targets = {name: torch.randn_like(pair[0]) for name, pair in pairs.items()}
    coeff = ChannelFusion().fit(targets, pairs, least_squares=True).parameters['coeff']
    channel = torch.stack([side[2].flatten() for side in pairs['conv.weight']], 1)
    expected = torch.linalg.lstsq(channel, targets['conv.weight'][2].flatten()[:, None]).solution[:, 0]
    torch.testing.assert_close(coeff[:, 2], expected)
    head = torch.stack([side[:, 1] for side in pairs['table']], 1)
    torch.testing.assert_close(coeff[:, 13], torch.linalg.lstsq(head, targets['table'][:, 1:]).solution[:, 0])
