"""Training stops at the first loss or weight that isn't finite."""
from types import SimpleNamespace

import pytest
import torch

from rl_mmdet.engine import FiniteLossHook, NonFiniteLossError

RUNNER = SimpleNamespace(iter=41)


@pytest.mark.parametrize('bad', [float('nan'), torch.tensor(float('inf')), torch.tensor([-float('inf')])])
def test_non_finite_loss_is_named_with_its_iteration(bad):
    with pytest.raises(NonFiniteLossError, match='iteration 42: loss_bbox='):
        FiniteLossHook().after_train_iter(RUNNER, 0, outputs=dict(loss_cls=torch.tensor(1.), loss_bbox=bad))


def test_finite_losses_pass():
    outputs = dict(loss=torch.tensor(1., requires_grad=True), num=3, maps=torch.tensor([1., float('nan')]))
    for each in (None, {}, outputs):
        FiniteLossHook().after_train_iter(RUNNER, 0, outputs=each)


def test_only_finite_weights_are_saved():
    state = dict(good=torch.ones(2), count=torch.tensor(3))
    FiniteLossHook().before_save_checkpoint(RUNNER, dict(state_dict=state))
    state['bad'] = torch.tensor([1., float('nan')])
    with pytest.raises(NonFiniteLossError, match='the weights bad'):
        FiniteLossHook().before_save_checkpoint(RUNNER, dict(state_dict=state))
