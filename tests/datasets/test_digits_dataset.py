"""The digit scenes as MMDetection sees them."""
import pytest
from mmdet.registry import DATASETS
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from pycocotools.coco import COCO
from torch import nn

from rl_mmdet.datasets import DigitScenesDataset

PIPELINE = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
            dict(type='PackDetInputs')]


def config(root, split):
    return dict(type='DigitScenesDataset', data_root=str(root), split=split, num_images=3, image_size=[128, 96],
                pipeline=PIPELINE)


@pytest.mark.parametrize('split', ['train', 'val'])
def test_items_have_the_scenes_shape_boxes_masks_and_digits(tmp_path, split):
    with DefaultScope.overwrite_default_scope('mmdet'):
        dataset = DATASETS.build(config(tmp_path, split))
        coco = COCO(dataset.ann_file)
        assert len(dataset) == 3
        for index, item in enumerate(dataset):
            instances = item['data_samples'].gt_instances
            assert item['inputs'].shape == (3, 96, 128)
            assert instances.masks.masks.shape == (len(instances), 96, 128)
            names = [dataset.metainfo['classes'][label] for label in instances.labels]
            annotations = coco.imgToAnns[dataset.get_data_info(index)['img_id']]
            assert names == [coco.cats[a['category_id']]['name'] for a in annotations]
            assert instances.bboxes.tensor.tolist() == [[x, y, x + w, y + h] for x, y, w, h in
                                                        (a['bbox'] for a in annotations)]
    assert len(dataset.metainfo['palette']) == len(dataset.metainfo['classes']) == 10


def test_a_runner_makes_the_files_before_its_evaluator_opens_them(tmp_path):
    annotations = tmp_path / 'digits' / 'annotations' / 'instances_val.json'
    loader = dict(batch_size=1, num_workers=0, dataset=config(tmp_path / 'digits', 'val'),
                  sampler=dict(type='DefaultSampler', shuffle=False))
    runner = Runner(nn.Linear(1, 1), str(tmp_path / 'work'), val_dataloader=loader, val_cfg={}, default_scope='mmdet',
                    val_evaluator=dict(type='CocoMetric', ann_file=str(annotations)), experiment_name='digits_dataset')
    assert not annotations.exists()
    assert len(runner.val_loop.dataloader) == 3


@pytest.mark.parametrize(('wrong', 'message'), [
    (dict(ann_file='elsewhere'), 'ann_file=.*remove it from the config'),
    (dict(data_prefix='elsewhere'), 'data_prefix=.*remove it from the config'),
    (dict(split='test'), "split='test': unknown"),
])
def test_a_wrong_argument_raises_and_nothing_is_written(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        DigitScenesDataset(data_root=str(tmp_path), **wrong)
    assert list(tmp_path.iterdir()) == []
