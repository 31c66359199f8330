_base_ = ['../_base_/imagenet_mmpretrain.py', 'mmpretrain::resnet/resnet50_8xb32_in1k.py']
train_dataloader = dict(pin_memory=True, persistent_workers=True)  # as mmpretrain's tools/train.py sets them
val_dataloader = dict(pin_memory=True, persistent_workers=True)
test_dataloader = val_dataloader
