"""The shell launchers, with stand-ins for the programs that they start."""
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

TOOLS = Path(__file__).resolve().parents[2] / 'tools'
LAUNCHERS = {'dist_train.sh': ['CONFIG', '8'], 'dist_test.sh': ['CONFIG', 'CHECKPOINT', '8'],
             'slurm_train.sh': ['PARTITION', 'JOB', 'CONFIG', 'WORK_DIR'],
             'slurm_test.sh': ['PARTITION', 'JOB', 'CONFIG', 'CHECKPOINT']}


@pytest.fixture
def launch(tmp_path):
    """Run a launcher elsewhere; the program that it would start prints its arguments, one a line."""
    for program in ('python', 'srun', 'my-python'):
        stand_in = tmp_path / program
        stand_in.write_text('#!/bin/sh\nprintf "%s\\n" "$0" "$@"\n')
        stand_in.chmod(0o755)
    path = f'{tmp_path}:{os.environ["PATH"]}'

    def run(launcher, *args, **env):
        return subprocess.run([str(TOOLS / launcher), *args], cwd=tmp_path, env={'PATH': path, **env},
                              capture_output=True, text=True)
    return run


@pytest.mark.parametrize('launcher', LAUNCHERS)
def test_a_launcher_passes_every_argument_to_the_tool_beside_it_or_shows_its_usage(launch, launcher):
    done = launch(launcher, *LAUNCHERS[launcher][:-1])
    assert done.returncode == 1
    assert done.stdout == ''
    assert done.stderr.startswith('usage: ') and len(done.stderr.splitlines()) == 1
    assert f'{launcher} {" ".join(LAUNCHERS[launcher][:-1])}' in done.stderr
    done = launch(launcher, *LAUNCHERS[launcher], '--cfg-options', 'a=b c')
    words = done.stdout.splitlines()
    assert done.returncode == 0
    assert str(TOOLS / ('train.py' if 'train' in launcher else 'test.py')) in words
    assert words[-2:] == ['--cfg-options', 'a=b c']
    assert words[words.index('--launcher') + 1] == ('slurm' if 'slurm' in launcher else 'pytorch')


def test_dist_train_starts_torchrun_here_or_on_machines_from_the_environment(launch):
    words = launch('dist_train.sh', 'CONFIG', '8').stdout.splitlines()
    assert words[1:8] == ['-m', 'torch.distributed.run', '--nnodes=1', '--node_rank=0', '--master_addr=127.0.0.1',
                          '--master_port=29500', '--nproc_per_node=8']
    words = launch('dist_train.sh', 'CONFIG', '8', NNODES='2', NODE_RANK='1', MASTER_ADDR='10.0.0.1', PORT='1234',
                   PYTHON='my-python').stdout.splitlines()
    assert words[0].endswith('/my-python')
    assert words[3:7] == ['--nnodes=2', '--node_rank=1', '--master_addr=10.0.0.1', '--master_port=1234']


def test_slurm_launchers_ask_for_one_task_per_gpu_on_nodes_or_a_part_of_one(launch):
    words = launch('slurm_train.sh', *LAUNCHERS['slurm_train.sh'], GPUS='16',
                   SRUN_ARGS='--time=10 --mem=4G').stdout.splitlines()
    assert {'--partition=PARTITION', '--job-name=JOB', '--ntasks=16', '--ntasks-per-node=8', '--gres=gpu:8',
            '--cpus-per-task=5', '--time=10', '--mem=4G'} <= set(words)
    assert words[words.index('--work-dir') + 1] == 'WORK_DIR'
    words = launch('slurm_test.sh', *LAUNCHERS['slurm_test.sh'], GPUS='2').stdout.splitlines()
    assert {'--ntasks=2', '--ntasks-per-node=2', '--gres=gpu:2'} <= set(words)


class Nodes:
    """Trainings over two nodes of one process each, which meet on this machine."""

    def __init__(self, config, folder):
        self.config, self.folder = config, folder

    def start(self, work_dir, *options, nodes=2):
        """Start all nodes; nothing of theirs reaches the test's own output."""
        with socket.socket() as free:
            free.bind(('127.0.0.1', 0))
            port = str(free.getsockname()[1])
        command = [str(TOOLS / 'dist_train.sh'), self.config, '1', '--work-dir', str(self.folder / work_dir), *options]
        return [subprocess.Popen(
            command, cwd=self.folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env={
                **os.environ, 'NNODES': str(nodes), 'NODE_RANK': str(rank), 'PORT': port, 'PYTHON': sys.executable})
            for rank in range(nodes)]

    def end(self, processes):
        errors = [process.communicate(timeout=120)[1] for process in processes]
        return [process.returncode for process in processes], errors

    def weights(self, work_dir):
        return torch.load(self.folder / work_dir / 'epoch_4.pth', weights_only=False)['state_dict']


@pytest.mark.slow
def test_a_node_that_dies_ends_the_other_and_the_training_goes_on_with_one_node_or_two(tiny_config, tmp_path):
    nodes, epochs = Nodes(tiny_config(), tmp_path), ('--cfg-options', 'train_cfg.max_epochs=4')
    assert nodes.end(nodes.start('whole', *epochs))[0] == [0, 0]
    for again, count in (('two', 2), ('one', 1)):
        processes = nodes.start(again, '--cfg-options', 'train_cfg.max_epochs=1000')
        while not (tmp_path / again / 'epoch_2.pth').exists():
            assert processes[0].poll() is None
            time.sleep(.02)
        agent = processes[1].pid
        for process in (*Path(f'/proc/{agent}/task/{agent}/children').read_text().split(), agent):
            os.kill(int(process), signal.SIGKILL)
        codes, errors = nodes.end(processes)
        assert codes == [1, -signal.SIGKILL]
        assert sum(line.startswith('[rank 0] error: another process of the run has ended')
                   for line in errors[0].splitlines()) == 1
        for path in (tmp_path / again).glob('epoch_*.pth'):
            torch.load(path, weights_only=False)  # all are whole
            if path.name != 'epoch_2.pth':
                path.unlink()
        (tmp_path / again / 'last_checkpoint').write_text(str(tmp_path / again / 'epoch_2.pth'))
        assert nodes.end(nodes.start(again, '--resume', *epochs, nodes=count))[0] == [0] * count
    wanted = nodes.weights('whole')
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in nodes.weights('two').items())
    assert nodes.weights('one').keys() == wanted.keys()
