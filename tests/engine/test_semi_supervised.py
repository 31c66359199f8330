"""A model that holds two detectors, as semi-supervised ones do: our checks, hooks and materialize see both."""
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner

from rl_mmdet.deploy import save_plain_checkpoint
from rl_mmdet.engine import add_rl_defaults_, build_model, build_runner, check_training, load_config
from rl_mmdet.replacement import stale_norms
from rl_mmdet.replacement.start import layers_to_fit

REPLACEMENT = dict(plan=dict(type='EveryKth', k=2), start=dict(type='FitOutputs', batches=1, steps=2))
BRANCHES = ['sup', 'unsup_teacher', 'unsup_student']
META = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'homography_matrix')
PACK = [dict(type='Resize', scale=(64, 64)), dict(type='PackDetInputs', meta_keys=META)]
LABELLED = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True),
            dict(type='MultiBranch', branch_field=BRANCHES, sup=PACK)]
UNLABELLED = [dict(type='LoadImageFromFile'), dict(type='LoadEmptyAnnotations'),
              dict(type='MultiBranch', branch_field=BRANCHES, unsup_teacher=PACK, unsup_student=PACK)]


class Look(Hook):
    """What the run is like just before the first step."""
    priority = 'LOWEST'

    def before_train(self, runner: Runner) -> None:
        self.left = [*layers_to_fit(runner.model), *stale_norms(runner.model)]
        student, teacher = ({key: value.clone() for key, value in model.state_dict().items()}
                            for model in (runner.model.student, runner.model.teacher))
        self.different = [key for key, value in student.items() if not torch.allclose(value, teacher[key])]


def semi(path: str, work_dir: Path, **backbone: object) -> Config:
    """A student and a teacher of the detector in a config, on scenes with labels and the same ones without."""
    cfg = load_config(path, work_dir=str(work_dir))
    cfg.train_cfg, cfg.param_scheduler = dict(type='IterBasedTrainLoop', max_iters=2), None
    cfg.default_hooks.checkpoint.by_epoch = cfg.log_processor.by_epoch = False
    cfg.model.backbone.update(backbone, norm_eval=True)
    preprocessor = dict(type='MultiBranchDataPreprocessor', data_preprocessor=cfg.model.data_preprocessor)
    cfg.model = dict(type='SemiBaseDetector', detector=cfg.model, data_preprocessor=preprocessor,
                     semi_train_cfg=dict(cls_pseudo_thr=.9), semi_test_cfg=dict(predict_on='teacher'))
    scenes, loader = cfg.train_dataloader.dataset, cfg.train_dataloader
    loader.sampler = dict(type='GroupMultiSourceSampler', batch_size=2, source_ratio=[1, 1])
    loader.batch_sampler = None
    loader.dataset = dict(type='ConcatDataset', datasets=[
        dict(scenes, pipeline=LABELLED), dict(scenes, pipeline=UNLABELLED)])
    cfg.custom_hooks = [dict(type='StartHook', num_batches=2), dict(type='MeanTeacherHook')]
    cfg.visualizer.name = cfg.experiment_name = str(work_dir)  # of a name there is one in a process
    cfg.val_dataloader = cfg.val_cfg = cfg.val_evaluator = None
    return cfg


def test_a_student_and_its_teacher_start_from_a_plain_baseline_and_become_plain(
        write_tiny_config, randomise_, tmp_path):
    path = write_tiny_config(tmp_path, 'atss_r34_fpn_digits.py')
    torch.save(randomise_(build_model(load_config(path))).state_dict(), tmp_path / 'baseline.pth')
    cfg = semi(path, tmp_path / 'run', type='RLResNet', replacement=REPLACEMENT)
    cfg.load_from = str(tmp_path / 'baseline.pth')
    check_training(add_rl_defaults_(cfg))
    runner, look = build_runner(cfg), Look()
    runner.register_hook(look)
    runner.train()
    assert (look.left, look.different) == ([], [])
    assert 'this training lacks' not in next(Path(runner.log_dir).glob('*.log')).read_text()

    plain = save_plain_checkpoint(cfg, (tmp_path / 'run' / 'last_checkpoint').read_text(), str(tmp_path / 'plain.pth'))
    assert len(plain.blocks) == 10
    baseline = build_model(semi(path, tmp_path / 'other'))
    baseline.load_state_dict(torch.load(tmp_path / 'plain.pth', weights_only=False)['state_dict'], strict=True)
