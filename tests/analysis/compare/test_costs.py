"""Costs of a baseline and its variants, on tiny digit scenes."""
from pathlib import Path

import pytest
import torch
from mmengine.optim import OptimWrapper

from rl_mmdet.analysis.compare import costs
from rl_mmdet.analysis.compare.costs import Cost, measure_costs
from rl_mmdet.analysis.compare.subject import Loaders, Subject
from rl_mmdet.engine import UserError, add_rl_defaults_, build_model, load_config

CONFIGS = Path(__file__).resolve().parents[3] / 'configs' / 'digits'
BASELINE, RL = 'faster-rcnn_r34_fpn_digits.py', 'faster-rcnn_rl-r34-k2_fpn_digits.py'
TIMES = ('step', 'latency')
ROUNDS = 2


@pytest.fixture(scope='module')
def load(tmp_path_factory):
    """Load a config of configs/digits on a few tiny scenes, with further options."""
    tiny = {'data_root': str(tmp_path_factory.mktemp('data')), 'model.backbone.base_channels': 4,
            'model.neck.in_channels': [4, 8, 16, 32], 'train_dataloader.batch_size': 2,
            'train_dataloader.dataset.num_images': 6, 'train_dataloader.dataset.image_size': (64, 64),
            'val_dataloader.dataset.num_images': 2, 'val_dataloader.dataset.image_size': (64, 64)}
    return lambda name=BASELINE, **options: add_rl_defaults_(load_config(
        str(CONFIGS / name), tiny | {key.replace('__', '.'): value for key, value in options.items()}))


def measure(cfgs, checkpoints=None, said=None):
    return measure_costs(cfgs, checkpoints or {}, ROUNDS, say=[].append if said is None else said.append)


def subject_of(cfg, checkpoint=None):
    return Subject(cfg, checkpoint, Loaders(), allow_pickle=False)


@pytest.fixture(scope='module')
def found(load):
    """A baseline with a good variant and a broken one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(costs, 'TURN', 0.)
        return measure({'baseline': load(), 'broken': load(model__neck__in_channels=[4, 8, 16, 31]),
                        'RL-v1': load(RL)})


def test_counts_are_those_of_a_training_step_on_the_data(load, found):
    cost = found['baseline']
    assert (cost.batch, cost.image_size) == (2, (128, 128))
    assert 0 < cost.saved_bytes < cost.peak_bytes
    learning = [p for p in build_model(load()).parameters() if p.requires_grad]
    assert cost.trainable == sum(p.numel() for p in learning)
    report = build_model(load(RL)).backbone.replacement_report
    assert found['RL-v1'].trainable == cost.trainable - report.removed_parameters + report.learnable


def test_times_are_ratios_to_the_baseline_of_the_same_round(found):
    base, cost = found['baseline'], found['RL-v1']
    for kind in TIMES:
        assert getattr(base, f'{kind}_ratios') == [1.] * ROUNDS
        trained = getattr(base, f'{kind}_seconds')
        assert getattr(cost, f'{kind}_ratios') == [
            own / other for own, other in zip(getattr(cost, f'{kind}_seconds'), trained, strict=True)]


def test_a_broken_variant_becomes_one_line_and_the_others_are_measured(found):
    assert '31' in found['broken'] and '\n' not in found['broken']
    assert isinstance(found['RL-v1'], Cost) and next(iter(found)) == 'baseline'


@pytest.mark.parametrize(('options', 'complaint'), [
    (dict(model__neck__in_channels=[4, 8, 16, 31]), "first can't be measured: .*31"),
    (dict(model__rpn_head__loss_cls__loss_weight=float('nan')), "training step's loss is nan"),
])
def test_a_broken_baseline_is_a_user_error(load, options, complaint):
    with pytest.raises(UserError, match=complaint):
        measure({'first': load(**options), 'good': load()})


def test_a_checkpoint_is_loaded_and_left_as_it_was_by_steps_and_predictions(load, assert_same_state, randomise_,
                                                                            tmp_path):
    saved = randomise_(build_model(load())).state_dict()
    torch.save(dict(state_dict=saved), tmp_path / 'saved.pth')
    subject = subject_of(load(), tmp_path / 'saved.pth')
    assert_same_state(subject.model.state_dict(), saved)
    subject.model.train()
    subject.step()
    subject.predict(subject.predictor())
    assert_same_state(subject.model.state_dict(), saved)
    with pytest.raises(UserError, match="atss can't be measured.*don't fit the model"):
        measure({'atss': load('atss_r34_fpn_digits.py')}, {'atss': tmp_path / 'saved.pth'})


def test_what_one_process_on_a_cpu_cannot_do_is_left_out(load, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    cfg = load(optim_wrapper__type='AmpOptimWrapper', optim_wrapper__loss_scale='dynamic',
               optim_wrapper__accumulative_counts=4, model__backbone__norm_cfg=dict(type='SyncBN'))
    cfg.model.backbone.init_cfg = dict(type='Pretrained', checkpoint='torchvision://resnet34')
    subject = subject_of(cfg)
    assert type(subject.optim) is OptimWrapper
    subject.step()
    assert subject.optim.optimizer.state
