"""A training that was stopped goes on, from where it was, and ends as if nothing had been."""
import itertools
import os
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.optim import LinearLR, OptimWrapper
from mmengine.registry import HOOKS
from mmengine.runner import IterBasedTrainLoop
from torch import nn

from rl_mmdet.engine import ResumeHook, UserError, begin_or_resume_, checkpoints_in

TRAIN = Path(__file__).resolve().parents[2] / 'tools' / 'train.py'
NAMES = itertools.count()
FLIP = '''
train_dataloader['dataset'].update(num_images=4, pipeline=[
    dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True),
    dict(type='Resize', scale=(64, 64), keep_ratio=True), dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs')])
default_hooks = dict(checkpoint=dict(max_keep_ckpts=1))
'''
BY_EPOCH = FLIP + '''
train_cfg = dict(max_epochs=3, val_begin=9)
randomness = dict(seed=None)
'''
BY_ITERATION = FLIP + '''
train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=5, val_interval=2)
train_dataloader['sampler'] = dict(type='InfiniteSampler')
default_hooks['checkpoint'].update(by_epoch=False, interval=4)
param_scheduler = [dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=4)]
custom_hooks = [dict(type='EMAHook')]
'''


@HOOKS.register_module()
class SignalHook(Hook):
    """Sends this process a signal, in a certain iteration of training or in the validation after it."""
    priority = 'VERY_HIGH'

    def __init__(self, number: int, iteration: int, val: bool = False) -> None:
        self.number, self.iteration, self.val = number, iteration, val

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self._send(runner, False)

    def before_val_iter(self, runner, batch_idx, data_batch=None):
        self._send(runner, True)

    def _send(self, runner, val):
        if (runner.iter, val) == (self.iteration, self.val):
            os.kill(os.getpid(), self.number)


@pytest.fixture
def train(run_script):
    """tools/train.py, with a name of its own for each run."""
    def run(config, work, *more, options=()):
        name = f'resume_{next(NAMES)}'
        return run_script(TRAIN, config, '--work-dir', work, *more, '--cfg-options', f'experiment_name={name}',
                          f'visualizer.name={name}', *options)
    return run


def final(path):
    checkpoint = torch.load(path, weights_only=False)
    return {**checkpoint['state_dict'], **checkpoint.get('ema_state_dict', {})}, checkpoint['meta']


@pytest.mark.parametrize(('text', 'stop', 'options', 'saved', 'last'), [
    (BY_EPOCH, dict(number=15, iteration=2), (), ['epoch_1.pth', 'interrupted.pth'], 'epoch_3.pth'),
    (BY_ITERATION, dict(number=2, iteration=2, val=True), (), ['interrupted.pth'], 'iter_5.pth'),
    pytest.param(BY_EPOCH, dict(number=2, iteration=3), ('train_dataloader.num_workers=2', ),
                 ['epoch_1.pth', 'interrupted.pth'], 'epoch_3.pth', marks=pytest.mark.slow),
    pytest.param(BY_EPOCH, dict(number=15, iteration=3),
                 ('train_dataloader.num_workers=2', 'train_dataloader.persistent_workers=True'),
                 ['epoch_1.pth', 'interrupted.pth'], 'epoch_3.pth', marks=pytest.mark.slow),
    pytest.param(BY_ITERATION, dict(number=15, iteration=2),
                 ('train_dataloader.sampler.type=DefaultSampler', ), ['interrupted.pth'], 'iter_5.pth',
                 marks=pytest.mark.slow),
], ids=['within an epoch, without a seed', 'in a validation, with EMA', 'at the end of an epoch', 'workers that stay',
        'an iteration loop with epochs'])
def test_a_training_that_is_told_to_stop_saves_and_ends_like_the_undisturbed_one(
        train, tiny_config, tmp_path, text, stop, options, saved, last):
    config = tiny_config(more=text)
    hooks = text.count('custom_hooks') * "dict(type='EMAHook'), "
    stopped = tiny_config(more=text + f"custom_hooks = [{hooks}dict(type='SignalHook', **{stop!r})]")
    status, output = train(stopped, 'work', options=options)
    assert status == 130
    assert output.err.strip().splitlines()[-1] == (
        f'interrupted after iteration {stop["iteration"] + (not stop.get("val"))}, which is saved in '
        f'{tmp_path}/work/interrupted.pth; go on with --resume')
    assert sorted(path.name for path in Path('work').glob('*.pth')) == saved
    config = tiny_config(more=text)
    status, output = train(config, 'work', '--resume', options=options)
    assert status == 0, output.err[-2000:]
    assert [path.name for path in Path('work').glob('*.pth')] == [last]
    resumed, meta = final(f'work/{last}')
    assert train(config, 'whole', options=(*options, f'randomness.seed={meta["seed"]}'))[0] == 0
    whole, other = final(f'whole/{last}')
    assert (meta['epoch'], meta['iter']) == (other['epoch'], other['iter'])
    assert [name for name, value in whole.items() if not torch.equal(resumed[name], value)] == []


def test_where_a_checkpoint_cannot_be_written_the_last_one_stays(train, tiny_config, monkeypatch, tmp_path):
    write = Path.write_bytes

    def full(path, data):
        if path.name == 'epoch_2.pth.part':
            write(path, data[:100])
            raise OSError(28, 'No space left on device')
        return write(path, data)

    monkeypatch.setattr(Path, 'write_bytes', full)
    status, output = train(tiny_config(more=FLIP + 'train_cfg = dict(max_epochs=2, val_begin=9)'), 'work')
    assert status == 1
    assert output.err.strip().splitlines()[-1] == (
        f"error: {tmp_path}/work/epoch_2.pth: can't be written (No space left on device)")
    assert [path.name for path in Path('work').glob('*.pth*')] == ['epoch_1.pth']
    assert Path('work/last_checkpoint').read_text() == f'{tmp_path}/work/epoch_1.pth'
    assert final('work/epoch_1.pth')[1]['iter'] == 2


@pytest.fixture
def work(tmp_path):
    """A work dir with the checkpoints of three epochs."""
    folder = tmp_path / 'work'
    folder.mkdir()
    for epoch in (1, 2, 3):
        torch.save(dict(meta=dict(epoch=epoch, iter=10 * epoch, seed=7), message_hub={}, state_dict={}),
                   folder / f'epoch_{epoch}.pth')
    (folder / 'last_checkpoint').write_text(f'{folder}/epoch_3.pth')
    return folder


def resumed(folder, given='auto', **settings):
    """The file from which a run goes on, and the texts."""
    cfg = Config(dict(work_dir=str(folder), **settings))
    texts = begin_or_resume_(cfg, given)
    return cfg, texts


def test_the_newest_checkpoint_is_found_whatever_became_of_its_marker(work, tmp_path):
    (work / 'backbone.pth').write_text('not of this training')
    (work / 'best_coco_bbox_mAP_epoch_9.pth').write_text('without an optimizer')
    for text in (f'{work}/epoch_3.pth', '', f'{work}/epoch_1.pth', None):
        (work / 'last_checkpoint').unlink() if text is None else (work / 'last_checkpoint').write_text(text)
        assert resumed(work)[0].load_from == str(work / 'epoch_3.pth')
    os.utime(work / 'epoch_1.pth')  # a copy has new times
    assert resumed(work)[0].load_from == str(work / 'epoch_3.pth')
    shutil.copy(work / 'epoch_1.pth', work / 'interrupted.pth')
    assert resumed(work)[0].load_from == str(work / 'interrupted.pth')


def test_who_has_gone_back_goes_on_from_there(work):
    for number, time in ((1, 10), (2, 40), (3, 30)):  # saved 1 to 3, went back to 1, saved 2 again
        os.utime(work / f'epoch_{number}.pth', (time, time))
    assert resumed(work)[0].load_from == str(work / 'epoch_3.pth')
    (work / 'last_checkpoint').write_text('elsewhere/epoch_2.pth')
    assert [path.name for path in checkpoints_in(work)] == ['epoch_2.pth', 'epoch_1.pth', 'epoch_3.pth']


def test_with_workers_an_iteration_based_training_counts_its_own_passes_over_the_data():
    hook, runner = ResumeHook(), SimpleNamespace(epoch=0, train_loop=object.__new__(IterBasedTrainLoop))
    hook.batches = SimpleNamespace(epoch=3)
    hook.before_train_epoch(runner)
    assert hook.batches.epoch == 3


def test_every_process_draws_numbers_of_its_own_and_the_same_again(monkeypatch):
    def drawn(rank: int, iteration: int) -> list[float]:
        monkeypatch.setattr('rl_mmdet.engine.hooks.resume.get_rank', lambda: rank)
        ResumeHook().before_train_iter(SimpleNamespace(seed=7, iter=iteration), 0)
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]
    draws = [drawn(rank, iteration) for rank in (0, 1) for iteration in (0, 1)]
    assert len({number for each in draws for number in each}) == 12
    assert drawn(1, 0) == draws[2]


def test_folders_with_a_number_for_a_name_are_no_checkpoints(tmp_path):
    (tmp_path / '7').mkdir()
    assert resumed(tmp_path)[0].resume is False


def test_a_moved_work_dir_is_not_looked_for_where_it_was(work, tmp_path):
    shutil.copytree(work, tmp_path / 'moved')
    cfg, texts = resumed(tmp_path / 'moved')
    assert (cfg.resume, cfg.load_from) == (True, str(tmp_path / 'moved' / 'epoch_3.pth'))
    assert 'after iteration 30' in texts[0]


def test_checkpoints_in_a_folder_of_their_own_are_found(work, tmp_path):
    out = tmp_path / 'out'
    out.mkdir()
    shutil.move(work, out / 'run')
    hooks = dict(checkpoint=dict(type='CheckpointHook', out_dir=str(out)))
    cfg, _ = resumed(tmp_path / 'run', default_hooks=hooks)
    assert cfg.load_from == str(out / 'run' / 'epoch_3.pth')
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'last_checkpoint').write_text(f'{out}/run/epoch_2.pth')
    assert checkpoints_in(tmp_path / 'run') == [out / 'run' / 'epoch_2.pth']


def test_a_file_that_cannot_be_read_is_passed_over_and_named(work):
    for number in (3, 2):
        path = work / f'epoch_{number}.pth'
        path.write_bytes(path.read_bytes()[:300])
    cfg, texts = resumed(work)
    assert cfg.load_from == str(work / 'epoch_1.pth')
    assert [Path(text.split(': ')[1]).name for text in texts[:-1]] == ['epoch_3.pth', 'epoch_2.pth']
    (work / 'epoch_1.pth').write_bytes(b'')
    with pytest.raises(UserError, match=r'epoch_3\.pth: .*no other checkpoint in .* can be read.*--work-dir'):
        resumed(work)


def test_without_a_checkpoint_the_training_begins_from_its_load_from(tmp_path):
    cfg, texts = resumed(tmp_path / 'new', load_from='baseline.pth')
    assert (cfg.resume, cfg.load_from) == (False, 'baseline.pth')
    assert 'there is no checkpoint' in texts[0]


@pytest.mark.parametrize(('own', 'said'), [(None, 0), (7, 0), (5, 1)])
def test_the_seed_is_the_checkpoints(work, own, said):
    cfg, texts = resumed(work, randomness=dict(seed=own, deterministic=True))
    assert cfg.randomness == dict(seed=7, deterministic=True)
    assert sum("randomness.seed: the checkpoint's 7 is kept, not 5" in text for text in texts) == said


def test_what_no_training_has_saved_is_not_resumed(tmp_path):
    torch.save(dict(state_dict={}), tmp_path / 'baseline.pth')
    with pytest.raises(UserError, match=r'baseline\.pth has weights alone.* load_from=.*baseline\.pth$'):
        resumed(tmp_path, str(tmp_path / 'baseline.pth'))


def test_a_new_training_in_a_used_work_dir_is_refused_with_the_two_ways_out(work, tmp_path):
    with pytest.raises(UserError, match=r'epoch_3\.pth\); add --resume to go on with it, or name another --work-dir'):
        resumed(work, None)
    assert resumed(work, None, resume=True)[0].load_from == str(work / 'epoch_3.pth')
    assert resumed(tmp_path / 'new', None)[1] == []


def optimizer(lr, groups=1, weight_decay=0.1):
    """An optimizer wrapper with a warm-up over ten steps, and a parameter in each group, learning ten times less."""
    parameters = [dict(params=[nn.Parameter(torch.ones(1))], lr=lr / 10 ** index) for index in range(groups)]
    wrapper = OptimWrapper(torch.optim.SGD(parameters, lr=lr, weight_decay=weight_decay))
    return wrapper, LinearLR(wrapper, start_factor=0.1, end=10, by_epoch=False)


def rates(wrapper, schedule, steps):
    """The learning rates of all groups in the steps to come."""
    found = []
    for _ in range(steps):
        wrapper.optimizer.step()
        schedule.step()
        found += [group['lr'] for group in wrapper.optimizer.param_groups]
    return found


def load(checkpoint, wrapper, schedule):
    """What MMEngine's Runner.resume does, with the hook."""
    ResumeHook().after_load_checkpoint(SimpleNamespace(_resume=True, optim_wrapper=wrapper), checkpoint)
    wrapper.load_state_dict(checkpoint['optimizer'])
    schedule.load_state_dict(checkpoint['param_schedulers'][0])


@pytest.mark.parametrize('groups', [1, 2])
@pytest.mark.parametrize('factor', [1, 0.1, 3])
def test_a_resumed_training_has_the_learning_rate_of_the_config(groups, factor):
    old, new = optimizer(0.01, groups), optimizer(0.01 * factor, groups, weight_decay=0.2)
    rates(*old, 4)
    load(dict(meta={}, optimizer=old[0].state_dict(), param_schedulers=[old[1].state_dict()]), *new)
    expected = [rate * factor for rate in rates(*old, 12)]
    assert rates(*new, 12) == (expected if factor == 1 else pytest.approx(expected))
    assert new[0].optimizer.param_groups[0]['weight_decay'] == 0.2


def test_an_optimizer_with_other_groups_is_refused_in_one_line():
    old, new = optimizer(0.01, 3), optimizer(0.01, 2)
    with pytest.raises(UserError, match='^resume: the optimizer has 2 groups with 2 parameters here, and 3 with 3 in '
                                        'the checkpoint; .*constructor.*load_from'):
        load(dict(meta={}, optimizer=old[0].state_dict(), param_schedulers=[old[1].state_dict()]), *new)
