# DeiT's schedule. Patches are averaged in the place of a class token: a detector has no use for one.
_base_ = ['../_base_/imagenet_mmpretrain.py', 'mmpretrain::deit/deit-base_16xb64_in1k.py']
custom_imports = dict(imports=['rl_mmdet'], allow_failed_imports=False)
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmdet.RLBackbone',
        timm='vit_base_patch16_224',
        norm=True,
        class_token=False,
        global_pool='avg',
        fc_norm=False,
        drop_path_rate=0.1),
    neck=dict(_delete_=True, type='GlobalAveragePooling'))
train_dataloader = dict(pin_memory=True, persistent_workers=True)  # as mmpretrain's tools/train.py sets them
val_dataloader = dict(pin_memory=True, persistent_workers=True)
test_dataloader = val_dataloader
