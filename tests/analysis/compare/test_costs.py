"""Costs of a baseline and its variants, on tiny digit scenes."""
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.logging import MessageHub, MMLogger
from mmengine.optim import OptimWrapper

from rl_mmdet.analysis.compare import costs, subject
from rl_mmdet.analysis.compare.costs import Cost, measure_costs
from rl_mmdet.analysis.compare.subject import Loaders, Subject
from rl_mmdet.engine import UserError, add_rl_defaults_, build_model, load_config

CONFIGS = Path(__file__).resolve().parents[3] / 'configs' / 'digits'
BASELINE, RL = 'faster-rcnn_r34_fpn_digits.py', 'faster-rcnn_rl-r34-k2_fpn_digits.py'
TIMES = ('step_seconds', 'step_ratios', 'latency_seconds', 'latency_ratios', 'plain_latency_seconds',
         'plain_latency_ratios')
ROUNDS = 2


@pytest.fixture(scope='module')
def load(tmp_path_factory):
    """Load a config of configs/digits on a few tiny scenes, with further options."""
    tiny = {'data_root': str(tmp_path_factory.mktemp('data')), 'model.backbone.base_channels': 4,
            'model.neck.in_channels': [4, 8, 16, 32], 'train_dataloader.batch_size': 2,
            'train_dataloader.dataset.num_images': 6, 'train_dataloader.dataset.image_size': (64, 64),
            'train_dataloader.dataset.scenes.scales': (16, 30), 'val_dataloader.dataset.num_images': 2,
            'val_dataloader.dataset.image_size': (64, 64), 'val_dataloader.dataset.scenes.scales': (16, 30)}
    return lambda name=BASELINE, **options: add_rl_defaults_(load_config(
        str(CONFIGS / name), tiny | {key.replace('__', '.'): value for key, value in options.items()}))


@pytest.fixture(scope='module', autouse=True)
def short_turns():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(costs, 'TURN', 0.)
        yield


@pytest.fixture
def without_peak(monkeypatch):
    """Spare the profiler's seconds."""
    monkeypatch.setattr(subject, 'peak_memory', lambda run, device: 0)


def measure(cfgs, checkpoints=None, say=lambda line: None):
    return measure_costs(cfgs, checkpoints or {}, ROUNDS, say=say)


def subject_of(cfg, checkpoint=None):
    return Subject(cfg, checkpoint, Loaders(), allow_pickle=False)


def counts(cost):
    return {name: value for name, value in vars(cost).items() if name not in TIMES}


@pytest.fixture(scope='module')
def found(load):
    """A baseline with good variants and a broken one."""
    return measure({
        'baseline': load(),
        'RL-v1': load(RL),
        'broken': load(model__neck__in_channels=[4, 8, 16, 31]),
        'skip': load(RL, model__backbone__replacement__operator=dict(type='Skip')),
        'with_cp': load(model__backbone__with_cp=True),
    })


def test_counts_are_the_same_in_another_call(load, found):
    again = measure({'baseline': load(), 'RL-v1': load(RL)})
    assert {name: counts(cost) for name, cost in again.items()} == {name: counts(found[name]) for name in again}


def test_batch_and_image_size_are_those_of_the_data(found):
    assert (found['baseline'].batch, found['baseline'].image_size) == (2, (128, 128))


def test_step_has_more_flops_than_its_forward_pass(found):
    assert 2 < found['baseline'].step_flops / found['baseline'].forward_flops <= 3


@pytest.mark.parametrize('count', ['forward_flops', 'step_flops', 'saved_bytes', 'peak_bytes', 'trainable'])
def test_skip_costs_less_than_the_baseline(found, count):
    assert getattr(found['skip'], count) < getattr(found['baseline'], count)


def test_trainable_parameters_are_the_baselines_less_what_the_report_says(load, found):
    report = build_model(load(RL)).backbone.replacement_report
    assert found['RL-v1'].trainable == found['baseline'].trainable - report.removed_parameters + report.learnable


def test_frozen_parameters_count_but_do_not_train(load, found, without_peak):
    cost = subject_of(load(model__backbone__frozen_stages=1)).counts()
    assert cost['trainable'] < cost['parameters'] == found['baseline'].parameters


def test_optimizer_has_two_moments_and_a_step_per_tensor_for_adamw(load, found):
    learning = [p for p in build_model(load()).parameters() if p.requires_grad]
    assert found['baseline'].optimizer_bytes == sum(2 * 4 * p.numel() + 4 for p in learning)


def test_gradients_are_not_accumulated(load):
    accumulating = subject_of(load(optim_wrapper__accumulative_counts=4))
    accumulating.step()
    assert accumulating.optim.optimizer.state


def test_checkpointing_activations_saves_less_but_computes_more(found):
    assert found['with_cp'].saved_bytes < found['baseline'].saved_bytes
    assert found['with_cp'].forward_flops == found['baseline'].forward_flops
    assert found['with_cp'].step_flops > found['baseline'].step_flops


def test_baselines_ratios_are_one_in_the_rounds_with_every_good_variant(found):
    cost = found['baseline']
    assert cost.step_ratios == cost.latency_ratios == cost.plain_latency_ratios == [1.] * (3 * ROUNDS)
    assert [len(getattr(cost, name)) for name in TIMES] == [3 * ROUNDS] * len(TIMES)


def test_variants_ratios_are_over_the_baseline_of_the_same_round(found):
    base, cost = found['baseline'], found['RL-v1']
    for kind in ('step', 'latency'):
        seconds = zip(getattr(cost, f'{kind}_seconds'), getattr(base, f'{kind}_seconds')[:ROUNDS], strict=True)
        assert getattr(cost, f'{kind}_ratios') == [own / other for own, other in seconds]


def test_materialized_model_is_timed_where_it_is_another_one(found):
    assert found['RL-v1'].plain_latency_seconds != found['RL-v1'].latency_seconds
    assert len(found['RL-v1'].plain_latency_ratios) == ROUNDS
    assert found['with_cp'].plain_latency_seconds == found['with_cp'].latency_seconds


def test_broken_variant_becomes_one_line_and_the_others_are_measured(found):
    assert isinstance(found['broken'], str) and 'RuntimeError' in found['broken'] and '\n' not in found['broken']
    assert all(isinstance(cost, Cost) for name, cost in found.items() if name != 'broken')
    assert list(found)[0] == 'baseline'


def test_broken_baseline_is_a_user_error(load):
    with pytest.raises(UserError, match="first can't be measured: RuntimeError"):
        measure({'first': load(model__neck__in_channels=[4, 8, 16, 31]), 'good': load()})


def test_loss_that_is_not_finite_is_refused(load):
    with pytest.raises(UserError, match="training step's loss is nan"):
        measure({'baseline': load(model__rpn_head__loss_cls__loss_weight=float('nan'))})


@pytest.fixture
def built(monkeypatch):
    """The models that are built and their state then."""
    models, build = [], subject._build

    def keep(*args):
        model = build(*args)
        models.append((model, {key: value.clone() for key, value in model.state_dict().items()}))
        return model

    monkeypatch.setattr(subject, '_build', keep)
    return models


def test_models_are_left_as_they_were(load, without_peak, built, assert_same_state):
    measure({'baseline': load(), 'RL-v1': load(RL)})
    assert len(built) == 2
    for model, before in built:
        assert_same_state(model.state_dict(), before)


def test_checkpoint_is_loaded(load, assert_same_state, randomise_, tmp_path):
    saved = randomise_(build_model(load())).state_dict()
    torch.save(dict(state_dict=saved), tmp_path / 'saved.pth')
    assert_same_state(subject_of(load(), tmp_path / 'saved.pth').model.state_dict(), saved)


def test_checkpoint_of_another_detector_is_refused(load, tmp_path):
    torch.save(dict(state_dict=build_model(load()).state_dict()), tmp_path / 'saved.pth')
    with pytest.raises(UserError, match="baseline can't be measured.*don't fit the model"):
        measure({'baseline': load('atss_r34_fpn_digits.py')}, {'baseline': tmp_path / 'saved.pth'})


def test_mixed_precision_is_measured_without_on_a_cpu(load, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    plain = subject_of(load(optim_wrapper__type='AmpOptimWrapper', optim_wrapper__loss_scale='dynamic'))
    assert type(plain.optim) is OptimWrapper
    assert plain.notes == ['mixed precision needs a GPU; measured in float32']


def test_measuring_the_baseline_alone_changes_nothing_else(load, without_peak, found, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = load()
    data, text = Path(cfg.data_root), cfg.pretty_text
    before = {path: path.stat().st_mtime_ns for path in data.rglob('*')}
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    shared = [list(cls._instance_dict) for cls in (MessageHub, MMLogger)]
    cost = measure({'baseline': cfg})['baseline']
    assert cost.step_ratios == [1.] * ROUNDS
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states
    assert [list(cls._instance_dict) for cls in (MessageHub, MMLogger)] == shared
    assert {path: path.stat().st_mtime_ns for path in data.rglob('*')} == before
    assert not list(tmp_path.iterdir())
    assert cfg.pretty_text == text


def test_pretrained_weights_are_not_loaded(load):
    cfg = load()
    cfg.model.backbone.init_cfg = dict(type='Pretrained', checkpoint='torchvision://resnet34')
    assert subject_of(cfg).model.backbone.init_cfg is None
