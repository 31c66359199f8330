"""ScalarFusion: the equation."""
import torch

from rl_mmdet.replacement.fusions import ScalarFusion

A, B = 0.7, -1.3


def test_equation(pairs_of, start_of, mixed):
    fusion = ScalarFusion()
    assert {name: tuple(p.shape) for name, p in start_of(fusion).items()} == {'coeff': (2,)}
    made = fusion.fuse({'coeff': torch.tensor([A, B], dtype=torch.float64)}, pairs_of())
    for name, expected in mixed([(A, B)] * 5, pairs_of()).items():
        torch.testing.assert_close(made[name], expected)
