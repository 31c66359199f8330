"""What a backbone with replaced blocks says of a training that lacks what it needs."""
import logging

import pytest
import torch
from mmengine.logging import MessageHub, MMLogger

from rl_mmdet.engine.optim import RLOptimWrapperConstructor
from rl_mmdet.models import RLResNet
from rl_mmdet.replacement import recalibrate_norms_, set_step_

REPLACEMENT = dict(plan=dict(type='EveryKth', k=2))


@pytest.fixture
def warnings(monkeypatch):
    """What MMEngine's logger says from now on, in a training of MMEngine."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    logger = MMLogger.get_current_instance()
    logger.addHandler(handler)
    hub = MessageHub.get_current_instance()
    monkeypatch.setattr(hub, '_runtime_info', {'max_iters': 3})
    yield said
    logger.removeHandler(handler)


def test_a_training_without_our_hooks_and_constructor_says_so_once(warnings):
    model, image = RLResNet(50, base_channels=4, norm_eval=True, replacement=REPLACEMENT), torch.randn(2, 3, 64, 64)
    model.train()
    with torch.no_grad():
        model(image)
    model.eval()
    model(image)
    assert warnings == []
    model.train()
    model(image)
    model(image)
    [warning] = warnings
    assert warning.startswith('RLResNet: this training lacks StartHook, LearningStepsHook, '
                              'optim_wrapper.constructor=RLOptimWrapperConstructor')


def test_a_training_with_them_says_nothing(warnings):
    model, image = RLResNet(50, base_channels=4, norm_eval=True, replacement=REPLACEMENT), torch.randn(2, 3, 64, 64)
    RLOptimWrapperConstructor(dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.1, weight_decay=0.1)))(model)
    model.train()
    recalibrate_norms_(model, [image], model)
    set_step_(model, 0)
    model(image)
    assert warnings == []
