"""Two processes of DDP (gloo), whose replaced blocks learn in some steps only, do what one process does."""
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel

from rl_mmdet.replacement import computing_layers, replace_blocks_, set_step_

WORLD, STEPS = 2, 10
RUNS = {'FullBlock': True, 'FullBlock only': True, 'SlimBlock': True, 'FullBlock drawn': False,
        'SlimBlock drawn': False}
"""Whether the steps are counted; else each process draws for itself."""


class Block(nn.Module):
    """A residual unit."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm, self.conv2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.norm(self.conv1(x)).relu())


def train(run: str, rank: int, world: int) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(*(Block() for _ in range(6))))
    replace_blocks_(model, dict(plan=dict(type='EveryKth', k=2), gradient=dict(every=4),
                                operator=dict(type=run.split()[0], **(dict(only='conv1') if 'only' in run else {}))))
    model = model.double().eval()  # or each process has its own statistics
    replica = model if world == 1 else DistributedDataParallel(model, find_unused_parameters=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    images = torch.randn(STEPS, 2 * WORLD, 3, 6, 6).double()
    torch.manual_seed(1 + rank)
    for step in range(STEPS):
        if RUNS[run]:
            set_step_(model, step)
        optimizer.zero_grad()
        replica(images[step].chunk(world)[rank]).square().mean().backward()
        optimizer.step()
    return model


def work(rank: int, folder: Path) -> None:
    """One process: train every run, and leave the states in ``folder``."""
    torch.set_num_threads(1)
    distributed.init_process_group('gloo', init_method=f'file://{folder}/rendezvous', rank=rank, world_size=WORLD,
                                   timeout=timedelta(seconds=60))
    torch.save({run: train(run, rank, WORLD).state_dict() for run in RUNS}, folder / f'rank{rank}.pt')
    distributed.destroy_process_group()


@pytest.fixture(scope='module')
def states(tmp_path_factory) -> list[dict]:
    """The states that the two processes left; forked, for they need nothing that isn't here."""
    folder = tmp_path_factory.mktemp('ddp')
    start_processes(work, (folder,), WORLD, start_method='fork')
    return [torch.load(folder / f'rank{rank}.pt') for rank in range(WORLD)]


@pytest.mark.parametrize('run', RUNS)
def test_processes_stay_equal_and_what_is_replaced_learns(states, run, assert_same_state):
    assert_same_state(states[0][run], states[1][run])
    model = train(run, 0, 1)
    assert len(computing_layers(model)) == 2
    for key, value in model.state_dict().items():
        if RUNS[run]:
            torch.testing.assert_close(states[0][run][key], value, rtol=1e-8, atol=1e-10, msg=key)
        if key.endswith('scale'):
            assert states[0][run][key].any(), key
        if key.endswith('coeff'):
            assert (states[0][run][key] - 0.5).abs().min() > 1e-9, key
