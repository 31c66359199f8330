"""One representative of each kind of mistake in a config: one line with the setting, and nothing is written."""
import json

import pytest

from rl_mmdet.engine import UserError

LOAD = dict(type='LoadImageFromFile')
BOXES = dict(type='LoadAnnotations', with_bbox=True)
PACK = dict(type='PackDetInputs')
PIPELINE = 'train_dataloader.dataset.pipeline'


def pipeline(*transforms):
    return {PIPELINE: list(transforms)}


MISTAKES = {
    # nobody reads it
    'top-level key misspelt': (dict(optim_wraper=dict(type='x')), 'optim_wraper: nobody reads it; did you'),
    'loader misspelt': (dict(trian_dataloader=dict(batch_size=4)), 'trian_dataloader: nobody reads it; did '),
    'backbone setting at the top': (dict(fold_norm=True), r'fold_norm: nobody reads it here; write model='),
    'backbone at the top': (dict(backbone=dict(depth=18)), 'backbone: nobody reads it here; write model='),
    'custom key misspelt': ({'optim_wrapper.paramwise_cfg': dict(custom_keys={'backbone': dict(lr_mul=.1)})},
                            "paramwise_cfg.custom_keys['backbone'].lr_mul: nobody reads it; did you mean lr_mult?"),
    'resuming as in MMDetection 2': (dict(resume_from='x.pth'), 'resume_from: it is of MMDetection 2, and nobody'),
    'of MMDetection 2': (dict(lr_config=dict(policy='step')), 'lr_config: it is of MMDetection 2, and nobody reads'),
    'setting of a test misspelt': ({'model.test_cfg.max_per_imgs': 9}, 'max_per_imgs: nobody reads it; did you mean '),
    'score misspelt': ({'default_hooks.checkpoint.save_best': 'coco/bbox_mAPP'}, "no score is called 'coco/bbox_mAPP'; "
                                                                                 'did you mean coco/bbox_mAP '),
    'prefix misspelt': ({'val_dataloader.dataset.data_prefix.image': 'x/'}, "data_prefix.image: CocoDataset "),
    'setting of NMS misspelt': ({'model.test_cfg.nms.tyype': 'nms'}, 'test_cfg.nms.tyype: nobody reads it'),
    'filter misspelt': ({'train_dataloader.dataset.filter_cfg.min_szie': 1}, 'filter_cfg.min_szie: nobody reads it; '),
    'scaling misspelt': ({'auto_scale_lr.bqse_size': 1}, 'auto_scale_lr.bqse_size: nobody reads it; did you mean '),
    'environment misspelt': ({'env_cfg.qp_cfg': {}}, 'env_cfg.qp_cfg: nobody reads it; did you mean mp_cfg'),
    'coder misspelt': ({'model.bbox_head.bbox_coder.target_mqans': [0.] * 4}, 'bbox_coder.target_mqans: DeltaXYWH'),
    # a value of another kind
    'path': ({'train_dataloader.dataset.ann_file': 0.5}, 'train_dataloader.dataset.ann_file must be a path, got 0.5'),
    'folder': ({'train_dataloader.dataset.data_prefix.img': [1]}, 'dataset.data_prefix.img must be a path, got [1]'),
    'root': ({'train_dataloader.dataset.data_root': 1}, 'train_dataloader.dataset.data_root must be a path, got 1'),
    'backend': ({'visualizer.vis_backends': [dict(type='NeptuneVisBackend')]}, 'NeptuneVisBackend needs the package '),
    'log level': (dict(log_level=[1]), 'log_level: unknown level [1]'),
    'not a count': ({'train_dataloader.batch_size': float('nan')}, 'must be an integer of at least 1, got nan'),
    'empty type': ({'default_hooks.logger.type': ''}, 'default_hooks'),
    'text for a truth value': ({'model.backbone.norm_eval': 'no'}, "norm_eval must be True or False, got the "),
    'dict for a truth value': ({'model.backbone.fold_norm': {}}, 'fold_norm must be True or False, got {}'),
    'count': ({'train_cfg.val_interval': 0}, 'train_cfg.val_interval must be an integer of at least 1, got 0'),
    'no checkpoint': ({'default_hooks.checkpoint.interval': 0}, 'or -1 for no checkpoints, got 0'),
    'style': ({'model.backbone.style': 'x'}, "model.backbone.style must be one of pytorch, caffe, got 'x'"),
    'hook interval': ({'default_hooks.checkpoint.interval': 'x'}, "checkpoint.interval must be int, got 'x'"),
    'huge rate': ({'optim_wrapper.optimizer.lr': 1e30}, 'optim_wrapper.optimizer.lr must be a number of 0 to 1000'),
    'not a number': ({'optim_wrapper.optimizer.weight_decay': float('nan')}, 'weight_decay must be finite, got nan'),
    # unknown types and arguments
    'optimizer': ({'optim_wrapper.optimizer.type': 'SDG'}, "optim_wrapper.optimizer.type: unknown type 'SDG'; did you "
                                                           'mean SGD?'),
    'hook': (dict(custom_hooks=[dict(type='EMAHok')]), "custom_hooks.0.type: unknown type 'EMAHok'; did you"),
    'scheduler': (dict(param_scheduler=[dict(type='LinearRL')]), "param_scheduler.0.type: unknown type 'LinearRL'; "),
    'transform': (pipeline(dict(type='LoadImageFromFil')), "pipeline.0.type: unknown type 'LoadImageFromFil'; "),
    'argument': ({'optim_wrapper.optimizer.nestero': 1},
                 'optim_wrapper.optimizer.nestero: SGD takes no nestero; did you mean nesterov'),
    'seed': (dict(randomness=dict(sead=1)), 'randomness.sead: '),
    'type misspelt': (dict(visualizer=dict(_delete_=True, typ='DetLocalVisualizer')), 'visualizer.typ: nobody reads'),
    'type missing': ({PIPELINE: [dict(scale=(9, 9))]}, f'{PIPELINE}.0.type: it is missing'),
    'type of a loop missing': ({'val_cfg': dict(_delete_=True, _scope_='mmdet')}, 'val_cfg.type: it is missing'),
    'type that is no name': ({'model.bbox_head.loss_cls.type': []}, 'bbox_head.loss_cls.type must be the name of '),
    'workers': ({'train_dataloader.num_workers': .5}, 'num_workers must be an integer of at least 0, got 0.5'),
    'start method': ({'env_cfg.mp_cfg.mp_start_method': -1}, 'env_cfg.mp_cfg.mp_start_method must be '),
    'no settings of processes': ({'env_cfg.mp_cfg': True}, 'env_cfg.mp_cfg must be a dict such as'),
    'threads': ({'env_cfg.mp_cfg.opencv_num_threads': [1]}, 'env_cfg.mp_cfg.opencv_num_threads must be int, got [1]'),
    'window': ({'log_processor.window_size': []}, 'log_processor.window_size must be an integer of at least 1, got []'),
    'name': ({'visualizer.name': [1]}, 'visualizer.name must be a text, got [1]'),
    'empty path': ({'train_dataloader.dataset.ann_file': []}, 'dataset.ann_file must be a path, got []'),
    'no scale': ({'val_dataloader.dataset.pipeline': [LOAD, BOXES, PACK]}, 'model.bbox_head: '),
    # what a part refuses
    'batches': ({'train_dataloader.num_workers': -1}, 'train_dataloader.num_workers must be '),
    'clipping': ({'optim_wrapper.clip_grad': dict(maxnorm=1)}, 'optim_wrapper.clip_grad.maxnorm: '),
    'accumulation': ({'optim_wrapper.accumulative_counts': 'x'}, "optim_wrapper.accumulative_counts='x': "),
    'loop': ({'train_cfg.type': 'EpochBasedTrainLoop', 'train_cfg.max_epoch': 1}, 'train_cfg.max_epoch: Epoch'),
    'model': ({'model.backbone.base_channels': -1}, 'model.backbone.base_channels=-1: '),
    'weights without a file': (
        {'model.backbone.init_cfg': dict(_delete_=True, type='Pretrained')}, 'model.backbone.init_cfg must'),
    'transform settings': (pipeline(LOAD, BOXES, dict(type='Resize', scale=(0, 0)), PACK), f'{PIPELINE}.2='),
    'schedule': (dict(param_scheduler=[dict(type='LinearLR', start_factor=0, by_epoch=False, end=2)]),
                 'param_scheduler.0='),
    # parts that don't fit each other
    'epoch without an end': ({'train_dataloader.sampler': dict(type='InfiniteSampler')}, 'an epoch would have no end'),
    'channels': ({'model.neck.in_channels': [4, 8, 16, 33]}, '[4, 8, 16, 33], but model.backbone gives 4 maps '
                                                             'with [4, 8, 16, 32] channels'),
    'number of maps': ({'model.backbone.out_indices': (1, 2, 3)}, 'model.backbone gives 3 maps'),
    'head': ({'model.bbox_head.in_channels': 9}, 'model.bbox_head.cls_convs.0.conv: '),
    'classes of the head': ({'model.bbox_head.num_classes': 3}, 'model.bbox_head.num_classes=3, but train_data'),
    'classes of the file': ({'train_dataloader.dataset.metainfo': dict(classes=('kangaroo', 'b'))},
                            "metainfo.classes has ['b'], but "),
    'metric': ({'val_evaluator.metric': 'segm'}, "val_evaluator.metric='segm': segm is not in results"),
    'no annotations loaded': (pipeline(LOAD, PACK), 'model'),
}


@pytest.mark.parametrize(('changes', 'complaint'), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_gives_one_line_and_nothing_is_written(check, tmp_path, changes, complaint):
    with pytest.raises(UserError) as caught:
        check(changes)
    assert complaint in str(caught.value)
    assert '\n' not in str(caught.value)
    assert not any(tmp_path.iterdir())


def test_what_is_right_passes_and_the_log_says_what_nobody_reads_and_what_is_folded(check):
    texts = check({'model.backbone.fold_norm': True, 'model.backbone.norm_eval': True, 'backend_args': None,
                   'loaders': dict(batch_size=-7), 'optim_wrapper.optimizer.lr': 0})
    assert any('fold_norm: 36 of 36 BatchNorms are folded' in text for text in texts)
    assert texts[-1] == 'settings that nobody reads: data_root, loaders'


def test_a_rate_is_scaled_where_a_batch_sampler_makes_the_batches(check, parsed):
    assert parsed.train_dataloader.batch_sampler.type == 'AspectRatioBatchSampler'
    check({'auto_scale_lr.enable': True})


def test_the_type_of_a_class_with_a_dtype_is_no_misspelling(check):
    check({'model.train_cfg.assigner.iou_calculator': dict(type='BboxOverlaps2D')})


def test_a_schedule_by_iterations_knows_the_real_length_of_an_epoch(check):
    check(dict(param_scheduler=[dict(type='LinearLR', start_factor=.1, by_epoch=False, begin=0, end=1),
                                dict(type='CosineAnnealingLR', by_epoch=False, begin=1)]))


def test_what_mmengine_takes_though_annotations_say_otherwise_passes(check):
    check({'param_scheduler': [dict(type='LinearLR', start_factor=.1, begin=0, end=.5, convert_to_iter_based=True)],
           'default_hooks.visualization': dict(type='DetVisualizationHook', backend_args=None)})


def test_an_empty_box_which_mmdetection_leaves_out_passes(check, kangaroos, tmp_path):
    content = json.loads((kangaroos / 'train.json').read_text())
    content['annotations'].append(dict(content['annotations'][0], id=99, bbox=[0, 0, 0, 0], area=0))
    path = tmp_path / 'annotations.json'
    path.write_text(json.dumps(content))
    check({'train_dataloader.dataset.ann_file': str(path)})


def first(kind, **change):
    """Change the first image or annotation."""
    return lambda content: content[kind][0].update(change)


ANNOTATIONS = {
    'truncated': (lambda content: json.dumps(content)[:-40], 'truncated, or not a JSON file'),
    'another form': (lambda content: '[]', "no list 'images'"),
    'no area': (lambda content: content['annotations'][1].pop('area'), "annotation 2 has no 'area'"),
    'ids': (first('annotations', id=2), 'annotation ids that occur more than once: 1, the first is 2'),
    'image ids': (first('images', id=1), 'image ids that occur more than once: 1, the first is 1'),
    'unknown image': (first('annotations', image_id=9), "annotation 1 has the image_id 9, which the file doesn't list"),
    'outside': (first('annotations', bbox=[99, 0, 9, 9]), 'boxes outside of their image: 1, the first in'),
    'not finite': (first('annotations', bbox=[float('nan'), 0, 9, 9]), 'boxes not finite: 1, the first in'),
    'no box': (first('annotations', bbox='0 0 9 9'), "annotation 1 has the bbox '0 0 9 9'; it must be four numbers"),
    'no boxes': (lambda content: content.update(annotations=[]), 'has no box of metainfo.classes'),
    'no box of the class': (lambda content: content.update(annotations=[
        dict(each, category_id=2) for each in content['annotations']], categories=[
            *content['categories'], dict(id=2, name='wallaby')]), 'has no box of metainfo.classes'),
    'no image': (first('images', file_name='none.jpg'), 'none.jpg: there is no such image'),
    'broken image': (first('images', file_name='../train.json'), 'train.json: broken, or no image'),
}


@pytest.mark.parametrize(('change', 'complaint'), ANNOTATIONS.values(), ids=ANNOTATIONS)
def test_a_mistake_in_an_annotation_file_names_file_and_entry(check, kangaroos, tmp_path, change, complaint):
    content = json.loads((kangaroos / 'train.json').read_text())
    changed = change(content)
    path = tmp_path / 'annotations.json'
    path.write_text(changed if isinstance(changed, str) else json.dumps(content))
    with pytest.raises(UserError) as caught:
        check({'train_dataloader.dataset.ann_file': str(path)})
    assert complaint in str(caught.value) and '\n' not in str(caught.value)
    assert not (tmp_path / 'work').exists()
