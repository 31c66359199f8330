"""DDP on one GPU with NCCL (gloo in a rehearsal) trains as no DDP does.

Run as a script, ``test_distributed.py FOLDER DEVICE``, this file is the only process of DDP.
"""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import rl_mmdet  # noqa: F401  registers the RL backbones
from rl_mmdet.replacement import set_step_

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).resolve().parents[2]
EVERY = 4
OPERATORS = ('FullBlock', 'SlimBlock')


def train(operator: str, device: torch.device, replicate: bool) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS.build(dict(type='RLResNet', depth=50, base_channels=8, replacement=dict(
        plan=dict(type='EveryKth', k=2), operator=dict(type=operator), gradient=dict(every=EVERY))))
    model = model.double().to(device)
    model.train()
    replica = DistributedDataParallel(model, device_ids=[0] if device.type == 'cuda' else None) if replicate else model
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    for step in range(EVERY):
        set_step_(model, step)
        optimizer.zero_grad()
        image = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(step)).double().to(device)
        sum(out.square().mean() for out in replica(image)).backward()
        optimizer.step()
    return model


def test_parameters_after_each_block_has_learned_once(tmp_path, device):
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])])
    subprocess.run([sys.executable, __file__, tmp_path, device.type], check=True, timeout=80,
                   env=dict(NCCL_SOCKET_IFNAME='lo', GLOO_SOCKET_IFNAME='lo') | os.environ | dict(PYTHONPATH=paths))
    for operator in OPERATORS:
        replicated = torch.load(tmp_path / f'{operator}.pt', map_location='cpu')
        for name, value in train(operator, device, False).state_dict().items():
            torch.testing.assert_close(replicated[name], value.cpu(), rtol=1e-8, atol=1e-10, msg=name)


if __name__ == '__main__':
    folder, kind = sys.argv[1:]
    distributed.init_process_group('nccl' if kind == 'cuda' else 'gloo', init_method=f'file://{folder}/rendezvous',
                                   rank=0, world_size=1)
    for each in OPERATORS:
        torch.save(train(each, torch.device(kind), True).state_dict(), Path(folder) / f'{each}.pt')
    distributed.destroy_process_group()
