"""The digit scenes as MMDetection sees them."""
import pytest
from mmdet.registry import DATASETS
from mmengine.model import BaseModel
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from rl_mmdet.datasets import DigitScenesDataset

PIPELINE = [
    {'type': 'LoadImageFromFile'},
    {'type': 'LoadAnnotations', 'with_bbox': True, 'with_mask': True},
    {'type': 'PackDetInputs'},
]


class NoModel(BaseModel):

    def forward(self, inputs, data_samples=None, mode='tensor'):
        return {}


def config(root, **changes):
    return {
        'type': 'DigitScenesDataset', 'data_root': str(root), 'num_images': 3,
        'image_size': [128, 96], 'scenes': {'scales': [12, 40]}, 'pipeline': PIPELINE, **changes}


def build(root, **changes):
    with DefaultScope.overwrite_default_scope('mmdet'):
        return DATASETS.build(config(root, **changes))


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    return tmp_path_factory.mktemp('digits')


@pytest.mark.parametrize('split', ['train', 'val'])
def test_items_have_the_scenes_shape_boxes_masks_and_digits(root, split):
    dataset = build(root, split=split)
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


def test_files_are_made_on_construction_even_if_lazy(tmp_path):
    dataset = DigitScenesDataset(data_root=str(tmp_path), num_images=1, lazy_init=True)
    assert (tmp_path / 'annotations' / 'instances_train.json').is_file()
    assert len(dataset.metainfo['palette']) == len(dataset.metainfo['classes']) == 10


@pytest.mark.parametrize('task', ['bbox', 'segm'])
def test_annotations_evaluate_to_one_against_themselves(root, task):
    coco = COCO(build(root).ann_file)
    truth = [{**annotation, 'score': 1.0} for annotation in coco.anns.values()]
    if task == 'segm':
        truth = [{'image_id': a['image_id'], 'category_id': a['category_id'], 'score': 1.0,
                  'segmentation': coco.annToRLE(a)} for a in truth]
    evaluation = COCOeval(coco, coco.loadRes(truth), task)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1)


def test_runner_builds_the_dataset_before_the_evaluator_opens_its_file(tmp_path):
    root = tmp_path / 'digits'
    annotations = root / 'annotations' / 'instances_val.json'
    runner = Runner(
        model=NoModel(),
        work_dir=str(tmp_path / 'work'),
        val_dataloader={'batch_size': 1, 'num_workers': 0, 'dataset': config(root, split='val'),
                        'sampler': {'type': 'DefaultSampler', 'shuffle': False}},
        val_evaluator={'type': 'CocoMetric', 'ann_file': str(annotations)},
        val_cfg={},
        default_scope='mmdet',
        experiment_name='digits_dataset_test')
    assert not annotations.exists()
    assert len(runner.val_loop.dataloader) == 3


@pytest.mark.parametrize(('wrong', 'message'), [
    (dict(ann_file='elsewhere'), 'ann_file=.*remove it from the config'),
    (dict(data_prefix='elsewhere'), 'data_prefix=.*remove it from the config'),
    (dict(scenes=dict(scale=(16, 40))), r"unknown keys \['scale'\]; allowed are .*'scales'"),
    (dict(split='test'), "split='test': unknown"),
])
def test_a_wrong_argument_raises_and_nothing_is_written(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        DigitScenesDataset(data_root=str(tmp_path), **wrong)
    assert list(tmp_path.iterdir()) == []
