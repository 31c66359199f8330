"""Two processes of DDP (gloo) do what one process does on the joined batch.

Run as a script, ``test_distributed.py RANK WORLD FOLDER``, this file is one of the processes.
"""
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from rl_mmdet.models import RLResNet
from rl_mmdet.replacement import computing_layers, recalibrate_norms_

WORLD = 2
STEPS = 3
RUNS = {
    'detached': dict(mode='detached', with_cp=False),
    'coupled': dict(mode='coupled', with_cp=False),
    'detached_with_cp': dict(mode='detached', with_cp=True),
    'coupled_with_cp': dict(mode='coupled', with_cp=True),
}


def build(mode: str, with_cp: bool) -> nn.Module:
    """Two stages, a replaced block in each; norms in eval mode, or each process has its own statistics."""
    torch.manual_seed(0)
    model = RLResNet(depth=50, base_channels=4, num_stages=2, strides=(1, 2), dilations=(1, 1),
                     out_indices=(1,), norm_eval=True, zero_init_residual=False, with_cp=with_cp,
                     replacement=dict(plan=dict(type='EveryKth', k=4), gradient=dict(mode=mode)))
    model.train()
    return model


def images(step: int) -> Tensor:
    return torch.randn(2 * WORLD, 3, 32, 32, generator=torch.Generator().manual_seed(step))


def share(batch: Tensor, rank: int, world: int) -> Tensor:
    return batch.chunk(world)[rank]


def train(model: nn.Module, rank: int, world: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for step in range(STEPS):
        (out,) = model(share(images(step), rank, world))
        optimizer.zero_grad()
        (out.square().sum() / len(out)).backward()
        optimizer.step()


def recalibrate(rank: int, world: int, reduce=None) -> nn.Module:
    model = build('detached', False)
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
                                   world_size=world, timeout=timedelta(seconds=60))
    states = {}
    for name, settings in RUNS.items():
        # mmdet's blocks checkpoint by reentrant backward passes; a coupled neighbour takes part in several,
        # which DDP takes with static_graph only
        static = settings == dict(mode='coupled', with_cp=True)
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
        logs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * WORLD, '\n'.join(logs)
    return [torch.load(folder / f'rank{rank}.pt') for rank in range(WORLD)]


@pytest.mark.parametrize('run', RUNS)
def test_ddp_processes_end_with_equal_weights(states, run, assert_same_state):
    assert_same_state(states[0][run], states[1][run])


@pytest.mark.parametrize('run', RUNS)
def test_ddp_equals_one_process_on_the_joined_batch(states, run):
    model = build(**RUNS[run])
    train(model, rank=0, world=1)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(states[0][run][key], value, rtol=1e-5, atol=1e-5, msg=key)


@pytest.mark.parametrize('run', RUNS)
def test_ddp_steps_move_the_coefficients(states, run):
    assert (states[0][run]['layer2.1.coeff'] - 0.5).abs().min() > 1e-4


def test_ddp_recalibrated_statistics_equal_one_process_on_all_batches(states):
    for key, value in recalibrate(rank=0, world=1).state_dict().items():
        if not key.endswith('num_batches_tracked'):
            torch.testing.assert_close(states[0]['recalibrated'][key], value, rtol=1e-5, atol=1e-5, msg=key)


if __name__ == '__main__':
    work(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
