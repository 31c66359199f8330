"""What would be saved, before training: the numbers are those of the real batch."""
import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config

from rl_mmdet.analysis import count_flops, saved_bytes, savings_table
from rl_mmdet.analysis.savings import step_cost, variants_of

PIPELINE = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=(224, 90), keep_ratio=True)]
RESNET = dict(type='ResNet', depth=34, base_channels=4, norm_eval=True, frozen_stages=1)
SWIN = dict(type='SwinTransformer', embed_dims=12, depths=(1, 1, 3, 1), num_heads=(1, 1, 1, 1))


def config(backbone):
    return Config(dict(model=dict(type='FasterRCNN', backbone=backbone), train_dataloader=dict(
        batch_size=3, dataset=dict(type='RepeatDataset', dataset=dict(type='CocoDataset', pipeline=PIPELINE)))))


def real(backbone, size):
    """FLOPs and bytes of a step on a whole batch."""
    model, images = MODELS.build(backbone), torch.zeros(3, 3, *size)
    model.train()

    def step():
        outputs = [out for out in model(images) if out.requires_grad]
        torch.autograd.backward(outputs, [torch.zeros_like(out) for out in outputs])
    return count_flops(step), saved_bytes(model, lambda: model(images))


@pytest.mark.parametrize(('backbone', 'rl', 'size', 'accuracy'), [
    (RESNET, 'RLResNet', (96, 224), 1e-6), (SWIN, 'RLSwin', (448, 672), 0.02)], ids=['ResNet', 'Swin'])
@pytest.mark.parametrize('settings', [{}, dict(replacement=dict(plan=dict(type='EveryKth', k=2), gradient=dict(
    every=1)))], ids=['baseline', 'replaced'])
def test_they_are_those_of_the_real_batch(backbone, rl, size, accuracy, settings):
    found = step_cost(config(backbone), settings, size, 3)
    assert found[1:] == pytest.approx(real(dict(backbone, type=rl, **settings), size), rel=accuracy)


def test_the_table_is_for_the_configs_own_images_and_says_what_to_write():
    table, lines = savings_table(config(RESNET))
    assert table.title == "the backbone's training step, 3 images of 96×224"
    assert list(table.columns[0].cells) == ['baseline', *(line.split(':')[0] for line in lines)]
    assert lines[1] == ("RL-v2, SlimBlock: replacement=dict(plan=dict(type='EveryKth', k=2), "
                        "operator=dict(type='SlimBlock'))")


def test_what_a_backbone_does_not_take_is_said_and_the_rest_counted():
    table, lines = savings_table(config(SWIN))
    assert list(table.columns[0].cells) == ['baseline', 'RL-v1', 'RL-v2, SlimBlock']
    assert len([line for line in lines if ': not here, ' in line]) == 4


def test_a_configs_own_settings_are_compared_too():
    cfg = config(dict(RESNET, type='RLResNet', fold_norm=True, replacement=dict(plan=dict(type='EveryKth', k=4))))
    replacement = dict(plan=dict(type='EveryKth', k=4))
    found = dict(variants_of(cfg))
    assert (found['this config'], found['RL-v1']) == (dict(fold_norm=True, replacement=replacement),
                                                      dict(replacement=replacement))
