"""A first pair of configs for one's own COCO data, as rl-mmdet init writes them."""
import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from rl_mmdet.engine import UserError, build_model, check_training, load_config, write_new_configs

ROOT = Path(__file__).resolve().parents[2]
FROM_SCRATCH = str(ROOT / 'configs' / 'coco_subset' / 'faster-rcnn_r50_fpn_2e_coco-subset.py')
FASTER_RCNN = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'


def coco(images, names=('cat', 'dog')):
    return dict(images=[dict(id=i, file_name=f'{i}.png', width=64, height=64) for i in range(images)],
                annotations=[dict(id=i, image_id=i, category_id=3, bbox=[8, 8, 30, 30], area=900, iscrowd=0)
                             for i in range(images)],
                categories=[dict(id=3 + i, name=name) for i, name in enumerate(names)])


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write pets/annotations/<name>.json and return its path from the folder that is made the current one."""
    monkeypatch.chdir(tmp_path)
    Path('pets/annotations').mkdir(parents=True)
    Path('pets/images').mkdir()
    for i in range(4):
        cv2.imwrite(f'pets/images/{i}.png', np.zeros((64, 64, 3), np.uint8))

    def to_file(name, content):
        path = Path('pets/annotations') / f'{name}.json'
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(path)
    return to_file


def test_both_configs_pass_the_preflight_and_differ_in_the_replacement_alone(write):
    new = write_new_configs(FROM_SCRATCH, write('train', coco(4)), write('val', coco(2)), out='configs')
    base, rl = (load_config(path, work_dir='work') for path in new[:2])
    assert 'replaced' not in str(check_training(base))
    assert 'blocks replaced' in str(check_training(rl))
    assert rl.model.backbone.replacement == dict(  # from scratch
        plan=dict(type='EveryKth', k=4), operator=dict(type='SlimBlock', width=0.25), gradient=dict(mode='coupled'))
    assert rl.custom_imports.imports == ['rl_mmdet'] and rl.optim_wrapper.constructor == 'RLOptimWrapperConstructor'
    assert rl.val_dataloader == base.val_dataloader and rl.train_cfg == base.train_cfg
    assert base.model.roi_head.bbox_head.num_classes == 2 and base.model.rpn_head == rl.model.rpn_head
    dataset = base.train_dataloader.dataset
    assert (dataset.data_root, dataset.ann_file, dataset.data_prefix.img) == ('pets/', 'annotations/train.json',
                                                                             'images/')
    assert base.test_evaluator.ann_file == 'pets/annotations/val.json'


def test_a_small_set_gets_a_learning_rate_for_its_batch_and_more_epochs(write):
    new = write_new_configs(FASTER_RCNN, write('train', coco(400)), write('val', coco(2)))
    cfg, rl = map(load_config, new[:2])
    assert cfg.train_dataloader.batch_size == cfg.auto_scale_lr.base_batch_size == 2
    assert cfg.optim_wrapper.optimizer == dict(type='SGD', lr=0.0025, momentum=0.9, weight_decay=0.0001)
    assert (cfg.train_cfg.max_epochs, cfg.train_cfg.val_interval, cfg.default_hooks.checkpoint.interval) == (36, 3, 3)
    assert [each.end for each in cfg.param_scheduler] == [500, 36]
    assert cfg.param_scheduler[1].milestones == [24, 33]
    assert cfg.model.backbone.init_cfg.checkpoint == 'torchvision://resnet50'
    recipe = load_config(str(ROOT / 'configs' / '_base_' / 'rl_v2_pretrained.py')).replacement
    assert rl.model.backbone.fold_norm
    assert rl.model.backbone.replacement == dict(recipe, plan=dict(type='EveryKth', k=4))


@pytest.mark.parametrize(('base', 'rate'), [('rtmdet/rtmdet_m_8xb32-300e_coco.py', 0.004 * 32 / 256),
                                            ('retinanet/retinanet_r50_fpn_1x_coco.py', 0.01 * 2 / 16)])
def test_the_learning_rate_is_for_the_images_in_the_bases_name_or_in_its_auto_scale_lr(write, base, rate):
    new = write_new_configs(f'mmdet::{base}', write('train', coco(40)), write('val', coco(2)))
    assert load_config(new.baseline).optim_wrapper.optimizer.lr == pytest.approx(rate)


@pytest.mark.parametrize(('base', 'heads'), [
    ('cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py', 3),
    ('yolox/yolox_s_8xb8-300e_coco.py', 1),
    ('detectors/detectors_cascade-rcnn_r50_1x_coco.py', 3),  # has no norm to fold
])
def test_every_head_gets_the_classes_and_another_backbone_its_replacement(write, base, heads):
    new = write_new_configs(f'mmdet::{base}', write('train', coco(4)), write('val', coco(4)))
    cfg = load_config(new.rl)
    cfg.model.backbone.update(init_cfg=None)
    cfg.model.backbone.replacement.start = None
    model = build_model(cfg)
    classes = [getattr(module, 'num_classes', 1) for module in model.modules()]
    assert [number for number in classes if number != 1] == [2] * heads  # the region proposals have one class
    assert model.backbone.replacement_report.replaced


def test_a_head_that_weighs_its_classes_gets_as_many_weights(write):
    data = coco(4)
    for each in data['annotations']:
        each['segmentation'] = [[8, 8, 38, 8, 38, 38]]
    new = write_new_configs('mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco.py', write('train', data),
                            write('val', data))
    model = load_config(new.baseline).model
    assert model.panoptic_head.num_things_classes == model.panoptic_fusion_head.num_things_classes == 2
    assert model.panoptic_head.loss_cls.class_weight == [1, 1, .1]


@pytest.mark.parametrize(('train', 'val', 'options', 'complaint'), [
    (coco(4), coco(4, ['dog', 'cat']), {}, 'both need the same categories in the same order'),
    ('{"images": [', coco(4), {}, '--coco: .*train.json: truncated, or not a JSON file'),
    (coco(4), {**coco(4), 'categories': [dict(id=3)]}, {}, "val.json: category 3 has no 'name'"),
    ({**coco(4), 'annotations': []}, coco(4), {}, '0 annotations and the categories .*; at least one'),
    (coco(4), coco(4), dict(images=['elsewhere']), "--images elsewhere: 0.png, the first image of .* isn't in"),
    (coco(4), coco(4), dict(images=['a', 'b', 'c']), '--images: one folder, or two .* got 3'),
    (coco(4), coco(4), dict(base='mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'), 'learns masks'),
    (coco(4), dict(coco(4), annotations=[dict(id=1, image_id=0, category_id=3, bbox=[8, 8, 30, 30], area=900)]), {},
     "annotation 1 has no 'iscrowd'"),
    (coco(4), coco(4), dict(base='mmdet::pascal_voc/faster-rcnn_r50_fpn_1x_voc0712.py'), 'must have one CocoDataset'),
])
def test_what_does_not_fit_is_refused_and_nothing_is_written(write, train, val, options, complaint):
    with pytest.raises(UserError, match=complaint) as refusal:
        write_new_configs(**dict(base=FASTER_RCNN, train=write('train', train), val=write('val', val), out='new')
                          | options)
    assert '\n' not in str(refusal.value)
    assert not Path('new').exists()


def test_configs_that_are_there_stay(write):
    Path('pets_rl.py').write_text('mine')
    with pytest.raises(UserError, match='pets_rl.py: exists already'):
        write_new_configs(FASTER_RCNN, write('train', coco(4)), write('val', coco(4)))
    assert Path('pets_rl.py').read_text() == 'mine' and not Path('pets_baseline.py').exists()
