"""The shell launchers, with stand-ins for the programs that they start."""
import os
import subprocess
from pathlib import Path

import pytest

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
