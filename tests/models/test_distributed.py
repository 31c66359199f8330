"""Two processes of DDP (gloo) do what one process does on the joined batch.

Run as a script, ``test_distributed.py RANK WORLD FOLDER``, this file is one of the processes.
"""
import copy
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from mmdet.registry import MODELS
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

import rl_mmdet.models  # noqa: F401  registers the RL backbones
from rl_mmdet.replacement import computing_layers, recalibrate_norms_, set_step_

WORLD = 2
STEPS = 3
STAGE = dict(num_modules=1, num_branches=1, block='BASIC', num_blocks=(3,), num_channels=(8,))
BACKBONES = {  # BatchNorm in eval mode, or each process has its own statistics; no stochastic depth
    'resnet': dict(type='RLResNet', depth=50, base_channels=4, num_stages=2, strides=(1, 2), dilations=(1, 1),
                   out_indices=(1,), norm_eval=True, zero_init_residual=False),
    'swin': dict(type='RLSwin', embed_dims=8, depths=(2, 3), num_heads=(1, 2), strides=(4, 2), out_indices=(0, 1),
                 window_size=4, drop_path_rate=0.),
    'vit': dict(type='RLViT', arch=dict(embed_dim=24, depth=4, num_heads=2), img_size=32, patch_size=8, window_size=2,
                global_attn_indexes=(0, 3)),
    'convnext': dict(type='RLBackbone', timm='convnext_atto', dims=(8, 8, 16, 16), depths=(1, 1, 3, 1),
                     ls_init_value=0.5),
    'hrnet': dict(type='RLBackbone', backbone='HRNet', norm_cfg=dict(type='GN', num_groups=2), extra=dict(
        stage1=dict(STAGE, block='BOTTLENECK', num_channels=(4,)),
        stage2=dict(STAGE, num_branches=2, num_blocks=(3, 1), num_channels=(4, 8)),
        stage3=dict(STAGE, num_branches=3, num_blocks=(1, 1, 1), num_channels=(4, 8, 8)),
        stage4=dict(STAGE, num_branches=4, num_blocks=(1, 1, 1, 1), num_channels=(4, 8, 8, 8)))),
}
SLIM = dict(type='SlimBlock', width=0.5)
RUNS = {
    'resnet_detached': dict(backbone='resnet', mode='detached'),
    'resnet_coupled_with_cp': dict(backbone='resnet', mode='coupled', with_cp=True),
    'resnet_detached_folded': dict(backbone='resnet', mode='detached', fold_norm=True),
    'resnet_coupled_SlimBlock': dict(backbone='resnet', mode='coupled', operator=SLIM),
    'resnet_detached_SlimBlock': dict(backbone='resnet', mode='detached', operator=SLIM),
    'resnet_detached_every_2': dict(backbone='resnet', mode='detached', every=2),
    'resnet_detached_only_every_2': dict(backbone='resnet', mode='detached', every=2,
                                         operator=dict(type='FullBlock', only='conv2')),
    'resnet_detached_SlimBlock_every_2': dict(backbone='resnet', mode='detached', every=2, operator=SLIM),
    'resnet_detached_Skip': dict(backbone='resnet', mode='detached', operator=dict(type='Skip')),
    'swin_coupled': dict(backbone='swin', mode='coupled'),
    'vit_detached': dict(backbone='vit', mode='detached'),
    'vit_coupled_SlimBlock': dict(backbone='vit', mode='coupled', operator=SLIM),
    'convnext_coupled': dict(backbone='convnext', mode='coupled'),
    'hrnet_detached': dict(backbone='hrnet', mode='detached'),
}


def build(backbone: str, mode: str, operator: dict | None = None, every: int = 1, **more: Any) -> nn.Module:
    """A small backbone with some replaced blocks, in training and in float64."""
    torch.manual_seed(0)
    replacement = dict(plan=dict(type='EveryKth', k=2), operator=operator, gradient=dict(mode=mode, every=every))
    model = MODELS.build(copy.deepcopy(dict(BACKBONES[backbone], replacement=replacement, **more)))
    model.train()
    return model.double()


def images(step: int) -> Tensor:
    return torch.randn(2 * WORLD, 3, 32, 32, generator=torch.Generator().manual_seed(step)).double()


def share(batch: Tensor, rank: int, world: int) -> Tensor:
    return batch.chunk(world)[rank]


def train(model: nn.Module, rank: int, world: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for step in range(STEPS):
        set_step_(model, step)
        outs = model(share(images(step), rank, world))
        optimizer.zero_grad()
        sum(out.square().mean() for out in outs).backward()
        optimizer.step()


def recalibrate(rank: int, world: int, reduce=None) -> nn.Module:
    model = build('resnet', 'detached')
    for layer in computing_layers(model).values():
        layer.norm_stale = True
    batches = [part for step in range(2) for part in images(step).chunk(WORLD)]
    recalibrate_norms_(model, batches[rank::world], model, reduce)
    return model


def average_(tensor: Tensor) -> None:
    distributed.all_reduce(tensor)
    tensor.div_(distributed.get_world_size())


def work(rank: int, world: int, folder: Path) -> None:
    """One process: train every run under DDP, recalibrate, and leave the states in ``folder``."""
    torch.set_num_threads(1)
    distributed.init_process_group('gloo', init_method=f'file://{folder}/rendezvous', rank=rank,
                                   world_size=world, timeout=timedelta(seconds=300))
    states = {}
    for name, settings in RUNS.items():
        # mmdet's blocks checkpoint by reentrant backward passes; a coupled neighbour takes part in several,
        # which DDP takes with static_graph only
        static = settings['mode'] == 'coupled' and 'with_cp' in settings
        model = DistributedDataParallel(build(**settings), static_graph=static)
        train(model, rank, world)
        states[name] = model.module.state_dict()
    states['recalibrated'] = recalibrate(rank, world, average_).state_dict()
    torch.save(states, folder / f'rank{rank}.pt')
    distributed.destroy_process_group()


@pytest.fixture(scope='module')
def states(tmp_path_factory) -> list[dict]:
    """The states that the two processes left."""
    folder = tmp_path_factory.mktemp('ddp')
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path)}  # rl_mmdet is found as it is here
    processes = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(WORLD), str(folder)],
                         env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for rank in range(WORLD)]
    try:
        logs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * WORLD, '\n'.join(logs)
    return [torch.load(folder / f'rank{rank}.pt') for rank in range(WORLD)]


@pytest.mark.parametrize('run', RUNS)
def test_ddp_equals_one_process_on_the_joined_batch(states, run, assert_same_state):
    """In both processes; and what computing layers learn has moved in every one of them."""
    assert_same_state(states[0][run], states[1][run])
    model = build(**RUNS[run])
    start = {name: parameter.clone() for name, parameter in model.named_parameters()
             if name.endswith(('.scale', '.coeff'))}
    train(model, rank=0, world=1)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(states[0][run][key], value, rtol=1e-8, atol=1e-10, msg=key)
    moved = {name for name, value in start.items() if (states[0][run][name] - value).abs().max() > 1e-6}
    layers = () if RUNS[run].get('operator') == dict(type='Skip') else computing_layers(model)
    assert {name.rpartition('.')[0] for name in moved} == set(layers)


def test_ddp_recalibrated_statistics_equal_one_process_on_all_batches(states):
    for key, value in recalibrate(rank=0, world=1).state_dict().items():
        if not key.endswith('num_batches_tracked'):
            torch.testing.assert_close(states[0]['recalibrated'][key], value, rtol=1e-8, atol=1e-10, msg=key)


if __name__ == '__main__':
    work(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
