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
    plain = {key: value for key, value in os.environ.items()
             if key not in ('NNODES', 'NODE_RANK', 'PORT', 'MASTER_ADDR', 'PYTHON', 'GPUS', 'GPUS_PER_NODE',
                            'CPUS_PER_TASK', 'SRUN_ARGS')}

    def run(launcher, *args, **env):
        env = {**plain, 'PATH': f'{tmp_path}:{plain["PATH"]}', **env}
        return subprocess.run([str(TOOLS / launcher), *args], cwd=tmp_path, env=env, capture_output=True, text=True)
    return run


@pytest.mark.parametrize('launcher', LAUNCHERS)
def test_missing_arguments_give_the_usage(launch, launcher):
    done = launch(launcher, *LAUNCHERS[launcher][:-1])
    assert done.returncode == 1
    assert done.stdout == ''
    assert done.stderr.startswith('usage: ') and len(done.stderr.splitlines()) == 1
    assert f'{launcher} {" ".join(LAUNCHERS[launcher][:-1])}' in done.stderr


@pytest.mark.parametrize('launcher', LAUNCHERS)
def test_launcher_calls_the_tool_beside_it_with_every_argument(launch, launcher):
    done = launch(launcher, *LAUNCHERS[launcher], '--cfg-options', 'a=b c')
    words = done.stdout.splitlines()
    assert done.returncode == 0
    assert str(TOOLS / ('train.py' if 'train' in launcher else 'test.py')) in words
    assert words[-2:] == ['--cfg-options', 'a=b c']
    assert words[words.index('--launcher') + 1] == ('slurm' if 'slurm' in launcher else 'pytorch')


def test_dist_train_starts_torchrun_on_this_machine(launch):
    words = launch('dist_train.sh', 'CONFIG', '8').stdout.splitlines()
    assert words[1:8] == ['-m', 'torch.distributed.run', '--nnodes=1', '--node_rank=0', '--master_addr=127.0.0.1',
                          '--master_port=29500', '--nproc_per_node=8']


def test_dist_train_on_several_machines_takes_them_from_the_environment(launch):
    done = launch('dist_train.sh', 'CONFIG', '8', NNODES='2', NODE_RANK='1', MASTER_ADDR='10.0.0.1', PORT='1234',
                  PYTHON='my-python')
    words = done.stdout.splitlines()
    assert words[0].endswith('/my-python')
    assert words[3:7] == ['--nnodes=2', '--node_rank=1', '--master_addr=10.0.0.1', '--master_port=1234']


def test_slurm_train_asks_for_one_task_per_gpu(launch):
    done = launch('slurm_train.sh', 'PARTITION', 'JOB', 'CONFIG', 'WORK_DIR', GPUS='16', SRUN_ARGS='--time=10 --mem=4G')
    words = done.stdout.splitlines()
    assert {'--partition=PARTITION', '--job-name=JOB', '--ntasks=16', '--ntasks-per-node=8', '--gres=gpu:8',
            '--cpus-per-task=5', '--time=10', '--mem=4G'} <= set(words)
    assert words[words.index('--work-dir') + 1] == 'WORK_DIR'


def test_slurm_test_on_part_of_a_node_asks_for_that_part(launch):
    words = launch('slurm_test.sh', 'PARTITION', 'JOB', 'CONFIG', 'CHECKPOINT', GPUS='2').stdout.splitlines()
    assert {'--ntasks=2', '--ntasks-per-node=2', '--gres=gpu:2'} <= set(words)
