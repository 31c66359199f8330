"""What StartHook does before the first step, once: a fit to the removed blocks, then fresh BatchNorm statistics."""
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmdet.models.detectors import BaseDetector
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from rl_mmdet.engine import StartHook, UserError, add_rl_defaults_, build_model, check_training, load_config
from rl_mmdet.engine.calibration import training_batches
from rl_mmdet.replacement import computing_layers, replace_blocks_
from rl_mmdet.replacement.start import layers_to_fit

START = '''
model['backbone'].update(norm_eval=True, replacement=dict(
    fusion=dict(type='TransformFusion', share=0.5), start=dict(type='FitOutputs', batches=2, steps=4)))
'''


@pytest.fixture
def config(write_tiny_config, tmp_path):
    """Read the config of a tiny detector with this start."""
    def build(**changes) -> Config:
        cfg = load_config(write_tiny_config(tmp_path, more=START), changes, work_dir=str(tmp_path / 'run'))
        return add_rl_defaults_(cfg)
    return build


@pytest.fixture
def checkpoint(write_tiny_config, tmp_path, randomise_) -> str:
    """Its baseline's."""
    model = build_model(load_config(write_tiny_config(tmp_path, 'atss_r34_fpn_digits.py')))
    torch.save(dict(state_dict=randomise_(model).state_dict()), tmp_path / 'baseline.pth')
    return str(tmp_path / 'baseline.pth')


def trained(cfg: Config) -> tuple[Runner, dict[str, Tensor], str]:
    """A run of one epoch, what its layers' parameters were before the first step, and its log."""
    runner, found = Runner.from_cfg(cfg), {}

    class Look(Hook):
        def before_train_epoch(self, runner: Runner) -> None:
            found.update({f'{name}.{key}': value.detach().clone()
                          for name, layer in computing_layers(runner.model).items()
                          for key, value in layer.own_parameters().items()})

    runner.register_hook(Look())
    runner.train()
    return runner, found, next(Path(runner.log_dir).glob('*.log')).read_text()


def test_a_baseline_is_fitted_to_once_and_the_log_says_what_is_left_unexplained(config, checkpoint, tmp_path):
    cfg = config(load_from=checkpoint)
    check_training(cfg)
    runner, fitted, log = trained(cfg)
    assert not layers_to_fit(runner.model)
    assert all(value.any() for key, value in fitted.items() if key.endswith('.up'))  # which start at 0
    assert '5 computing layers fitted to the blocks that they replace in' in log
    assert re.search(r'backbone.layer2.1: [\d.]+ before, [\d.]+ after', log)
    again = trained(config(load_from=checkpoint))[1]
    assert all(torch.equal(value, again[key]) for key, value in fitted.items())
    # neither a replaced model's own weights nor a resumed training are fitted again
    last = (tmp_path / 'run' / 'last_checkpoint').read_text()
    for changes in (dict(), dict(resume=True)):
        own, kept, log = trained(config(load_from=last, **{'train_cfg.max_epochs': 2}, **changes))
        state = torch.load(last, weights_only=False)['state_dict']
        assert all(torch.equal(value, state[key]) for key, value in kept.items())
        assert 'computing layers fitted' not in log
        assert not layers_to_fit(own.model)


def test_removed_blocks_fade_out_and_resuming_in_between_goes_on_as_if_nothing_had_been(config, checkpoint, tmp_path):
    more = {'load_from': checkpoint, 'train_cfg.max_epochs': 2, 'model.backbone.replacement.start.fade': 5}
    whole, _, log = trained(config(**more))
    assert log.count('computing layers fitted') == 1
    first = tmp_path / 'run' / 'epoch_1.pth'  # after 3 of 6 iterations
    assert list(torch.load(first, weights_only=False)['removed_blocks']) == [
        f'backbone.layer{name}' for name in ('1.1', '2.1', '3.1', '3.3', '4.1')]
    assert 'this training lacks' not in log
    assert 'removed_blocks' not in torch.load(tmp_path / 'run' / 'epoch_2.pth', weights_only=False)
    resumed, _, log = trained(config(**more | dict(load_from=str(first), resume=True)))
    assert 'computing layers fitted' not in log
    assert all(torch.equal(value, resumed.model.state_dict()[key]) for key, value in whole.model.state_dict().items())
    assert not layers_to_fit(resumed.model)
    check_training(config(**more | dict(load_from=str(first), resume=True)))
    without = {'model.backbone.replacement.start.fade': 0, 'load_from': str(first), 'resume': True}
    assert not layers_to_fit(trained(config(**more | without))[0].model)
    with pytest.raises(UserError, match=r"needs the removed blocks, and the checkpoint is a replaced model's own"):
        check_training(config(**more | dict(load_from=str(first))))


def test_without_weights_to_fit_to_it_is_refused_before_anything_is_written(config, tmp_path):
    with pytest.raises(UserError, match=r"replacement.start: FitOutputs\(.*needs a trained baseline's weights, and no"):
        check_training(config())
    assert not (tmp_path / 'run').exists()


def test_a_search_refuses_it(config):
    cfg = config()
    cfg.model.backbone.replacement.plan = dict(type='LearnedPlan', budget=dict(params=0.9), iters=4)
    with pytest.raises(UserError, match='is a fit before the first step, and LearnedPlan.* chooses later; leave start'):
        check_training(cfg)


class Same(nn.Module):
    """Preprocesses nothing."""

    def forward(self, data, training):
        return data


class Detector(BaseDetector):
    """A backbone that trains with BatchNorm in eval mode, as far as the hook sees a detector."""
    loss = predict = _forward = None

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        self.data_preprocessor = Same()
        self.seen = 0
        for name, module in modules.items():
            self.add_module(name, module)

    def train(self, mode: bool = True) -> 'Detector':
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def extract_feat(self, inputs):
        self.seen += len(inputs)
        return self.backbone(inputs)


@pytest.fixture
def detector(toy_net):
    """Build a detector with a replaced backbone."""
    def build():
        backbone = toy_net()
        replace_blocks_(backbone, dict(plan=dict(type='EveryKth', k=2)))
        return Detector(backbone=backbone)
    return build


def recalibrate(model, item):
    """Run the hook on 3 batches of 2 from 10 equal items, in front of a training."""
    loader = DataLoader([dict(inputs=item)] * 10, batch_size=2, collate_fn=default_collate)
    StartHook(num_batches=3).before_train(SimpleNamespace(model=model, train_dataloader=loader, seed=0))


def test_stale_statistics_are_recalibrated_once_on_the_asked_number_of_batches(detector):
    model = detector().eval()
    before = {name: layer.norm1.running_mean.clone() for name, layer in computing_layers(model).items()}
    for _ in range(2):
        recalibrate(model, torch.randn(3, 8, 8))
        assert model.seen == 6
    for name, layer in computing_layers(model).items():
        assert not torch.equal(layer.norm1.running_mean, before[name])
        assert not layer.norm_stale
    assert not model.training


def test_a_student_and_its_teacher_see_the_images_of_all_branches(detector):
    pair = Detector(student=detector(), teacher=detector())
    recalibrate(pair, dict(labelled=torch.randn(3, 8, 8), unlabelled=torch.randn(3, 8, 8)))
    assert (pair.seen, pair.student.seen, pair.teacher.seen) == (0, 12, 12)
    assert not any(layer.norm_stale for layer in computing_layers(pair).values())


def test_frames_of_videos_are_images(detector):
    model = detector()
    recalibrate(model, torch.randn(4, 3, 8, 8))
    assert model.seen == 24


@pytest.mark.parametrize(('images', 'expected'), [(10, [2, 2, 2]), (100, [3, 3, 3]), (2, [1, 1, 1])])
def test_all_processes_have_equally_many_batches(monkeypatch, images, expected):
    loader = DataLoader(list(range(images)), batch_size=2)
    monkeypatch.setattr('rl_mmdet.engine.calibration.get_world_size', lambda: 3)
    shares = []
    for rank in range(3):
        monkeypatch.setattr('rl_mmdet.engine.calibration.get_rank', lambda rank=rank: rank)
        shares.append(list(training_batches(SimpleNamespace(train_dataloader=loader, seed=0), 3)))
    assert [len(share) for share in shares] == expected
    assert len({len(torch.cat(share)) for share in shares}) == 1
    assert len(torch.cat(sum(shares, [])).unique()) == min(images, 18)


@pytest.mark.parametrize('num_batches', [0, 1.5, '3'])
def test_wrong_number_of_batches_is_refused(num_batches):
    with pytest.raises(ValueError, match='num_batches must be an integer of at least 1'):
        StartHook(num_batches=num_batches)
