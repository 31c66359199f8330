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
