"""The options of train.py and test.py, as changes of a config. Each checks that the config can take it."""
import argparse
from copy import deepcopy

from mmdet.engine.hooks.utils import trigger_visualization_hook
from mmengine.config import Config, ConfigDict
from mmengine.device import get_device

from .config import type_name
from .errors import UserError


def enable_amp_(cfg: Config) -> None:
    """``--amp``: automatic mixed precision with a dynamic loss scale."""
    if get_device() in ('cpu', 'mps'):
        raise UserError('--amp: MMEngine\'s AmpOptimWrapper needs a GPU, and none is found here; leave it out')
    wrapper = cfg.get('optim_wrapper')
    if wrapper is None or type_name(wrapper) not in (None, 'OptimWrapper', 'AmpOptimWrapper'):
        raise UserError(f'--amp: optim_wrapper.type must be OptimWrapper, got {wrapper and wrapper.type!r}')
    wrapper.type = 'AmpOptimWrapper'
    wrapper.setdefault('loss_scale', 'dynamic')


def enable_auto_scale_lr_(cfg: Config) -> None:
    """``--auto-scale-lr``: scale the learning rate by batch size / ``auto_scale_lr.base_batch_size``."""
    if 'base_batch_size' not in (cfg.get('auto_scale_lr') or {}):
        raise UserError('--auto-scale-lr: the config has no auto_scale_lr.base_batch_size; add '
                        'auto_scale_lr=dict(base_batch_size=16), the batch size that its learning rate is for')
    cfg.auto_scale_lr.enable = True


def enable_visualization_(cfg: Config, args: argparse.Namespace) -> None:
    """``--show`` and ``--show-dir``, through MMDetection's visualisation hook."""
    try:
        trigger_visualization_hook(cfg, args)
    except RuntimeError as error:
        raise UserError(f'--show: {error}') from error


def enable_tta_(cfg: Config) -> None:
    """``--tta``: wrap the model for test-time augmentation; without settings of its own, flip and merge by NMS."""
    if 'tta_model' not in cfg:
        cfg.tta_model = dict(type='DetTTAModel', tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5),
                                                              max_per_img=100))
    if 'tta_pipeline' not in cfg:
        dataset = cfg.test_dataloader.dataset
        while 'dataset' in dataset:
            dataset = dataset['dataset']
        meta = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'flip', 'flip_direction')
        flips = [dict(type='mmdet.RandomFlip', prob=1.), dict(type='mmdet.RandomFlip', prob=0.)]
        cfg.tta_pipeline = deepcopy(dataset.pipeline)
        cfg.tta_pipeline[-1] = dict(type='TestTimeAug', transforms=[flips, [dict(type='mmdet.PackDetInputs',
                                                                                 meta_keys=meta)]])
    model, cfg.model = cfg.model, cfg.tta_model
    cfg.model.module = model
    cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline


def dump_predictions_(cfg: Config, path: str) -> None:
    """``--out``: also write the predictions to a pickle file, for offline evaluation."""
    if not path.endswith(('.pkl', '.pickle')):
        raise UserError(f'--out {path}: must end in .pkl or .pickle')
    evaluators = cfg.get('test_evaluator') or []
    dump = ConfigDict(type='mmdet.DumpDetResults', out_file_path=path)
    cfg.test_evaluator = [*(evaluators if isinstance(evaluators, (list, tuple)) else [evaluators]), dump]
