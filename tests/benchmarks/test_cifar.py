"""benchmarks/cifar.py as a user calls it, on a few images."""
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from cifar_runs.networks import ARMS, ONLY_FOR, build
from cifar_runs.training import Recipe, Step
from rl_mmdet.replacement import computing_layers

PROGRAM = Path(__file__).resolve().parents[2] / 'benchmarks/cifar.py'


@pytest.fixture
def run(run_script, write_images):
    return partial(run_script, PROGRAM, '--data', write_images(), '--device', 'cpu', '--small', '--epochs', 1,
                   '--train-images', 8, '--test-images', 10, '--out', 'new/cifar')


def read():
    return json.loads(Path('new/cifar.json').read_text())


@pytest.mark.parametrize(('network', 'replaced'), [
    ('resnet20', ['layer1.1', 'layer2.1', 'layer3.1']),
    pytest.param('resnet32', ['layer1.1', 'layer2.1', 'layer3.1'], marks=pytest.mark.slow),
    pytest.param('vit', ['blocks.1', 'blocks.5', 'blocks.9'], marks=pytest.mark.slow),
    pytest.param('resnet110', [f'layer{stage}.{block}' for stage in (1, 2, 3) for block in (1, 5, 9, 13)],
                 marks=pytest.mark.slow)])
def test_trains_every_arm_and_writes_page_and_data(run, network, replaced):
    status, _ = run('--models', network)
    assert status == 0
    rows = {row['arm']: row for row in read()['rows']}
    assert list(rows) == [arm for arm in ARMS if ONLY_FOR.get(arm, network) == network]
    assert all(0 <= row['accuracy'] <= 1 and len(row['seconds']) == 1 for row in rows.values())
    assert all(row['replaced'] == ([] if ARMS[arm] is None else replaced) for arm, row in rows.items())
    learn = {arm: row['parameters'] for arm, row in rows.items()}
    assert learn['skip'] == learn['shared'] == learn['rl-v1'] - 2 * len(replaced) < learn['rl-v2'] < learn['baseline']
    flops = {arm: row['flops'] for arm, row in rows.items()}
    assert flops['skip'] < flops['rl-v2'] < flops['rl-v2-coupled'] < flops['rl-v1'] < flops['baseline']
    assert flops['rl-v2-every-1'] == flops['rl-v2-coupled']
    assert flops['baseline'] == flops['shared'] == flops['rl-v1-coupled'] == flops['shorter'] > flops['narrower']
    page = Path('new/cifar.md').read_text()
    assert all(f'\n| {arm} | 1 | ' in page for arm in rows)
    assert '| time of an epoch |' in page and 'Not finished' not in page


def test_a_shorter_training_costs_what_one_with_blocks_left_out_costs(run):
    status, _ = run('--models', 'resnet20', '--arms', 'baseline', 'skip', 'shorter', '--train-images', 16, '--batch', 2,
                    '--epochs', 2)
    assert status == 0
    rows = {row['arm']: row for row in read()['rows']}
    assert rows['skip']['epochs'] == 2 > rows['shorter']['epochs'] == round(8 * rows['shorter']['epochs']) / 8
    cost = {arm: row['flops'] * row['epochs'] for arm, row in rows.items()}
    assert cost['shorter'] == pytest.approx(cost['skip'], abs=rows['shorter']['flops'] / 16)
    costs = [line.split(' | ')[5] for line in Path('new/cifar.md').read_text().splitlines() if line.startswith('| ')]
    assert costs[0] == 'cost' and float(costs[2]) == 1 > float(costs[3])


def test_goes_on_with_what_is_there_and_names_what_is_not_finished(run):
    arguments = ('--models', 'vit', '--arms', 'baseline', 'skip', '--resume')
    run(*arguments, '--seeds', 2)
    first = read()['rows']
    status, captured = run(*arguments, '--seeds', 3, '--minutes', 1e-9)
    assert status == 0 and captured.out.count('out of time') == 2
    rows = read()['rows']
    assert rows[:4] == first and [row.get('error') for row in rows[4:]] == ['TimeoutError: out of time'] * 2
    page = Path('new/cifar.md').read_text()
    assert '\n| skip | 2 | ' in page and ' to ' in page.split('| skip | 2 |')[1].splitlines()[0]
    assert '- vit, skip, seed 2: TimeoutError: out of time' in page
    status, _ = run(*arguments, '--epochs', 2)
    assert 'error: --resume: new/cifar.json is of other settings' in status
    assert read()['rows'] == rows


@pytest.mark.parametrize('arm', ['rl-v1', 'rl-v2'])
@pytest.mark.parametrize(('network', 'share'), [('resnet32', 0.25), ('vit', 1)])
def test_pairs_have_a_part_of_sgds_rate(network, share, arm):
    model, _ = build(network, arm, 0, 4, 2)
    groups = Step(model, Recipe('cpu', 1, 64, 4, pair_rate=0.25), 10).optimizer.param_groups
    pairs = [layer.coeff for layer in computing_layers(model).values()]
    assert all(a is b for a, b in zip(groups[2]['params'], pairs, strict=True))
    assert groups[2]['lr'] == pytest.approx(share * groups[0]['lr']) and groups[2]['weight_decay'] == 0
    assert sum(len(group['params']) for group in groups) == len(list(model.parameters()))


@pytest.mark.slow
def test_trainings_side_by_side_are_processes(run):
    status, _ = run('--models', 'resnet32', '--arms', 'baseline', 'rl-v1', '--jobs', 2)
    assert status == 0
    assert {row['arm']: 'accuracy' in row for row in read()['rows']} == {'baseline': True, 'rl-v1': True}
    assert 'Times are left out: 2 trainings ran side by side' in Path('new/cifar.md').read_text()


@pytest.mark.parametrize(('arguments', 'said'), [
    (('--data', 'missing.npz'), '--data missing.npz: no such file; give an npz with the arrays train_bytes, '),
    (('--data', 'other.npz'), '--data other.npz: it is no npz with an array train_bytes; needed: '),
    (('--train-images', 17), '--train-images 17: '),
    (('--models', 'resnet50'), "choose from 'resnet32', 'resnet20', 'vit', 'resnet110'"),
    (('--arms', 'rl'), "choose from 'baseline', 'rl-v1'"),
    (('--models', 'resnet20', '--arms', 'rl-v1-attention'), 'fits none of --models resnet20; allowed: rl-v1-'),
    (('--device', 'cuda'), 'torch finds no GPU here; allowed: cpu'),
    (('--jobs', 0), "'0' is no integer of at least 1"),
    (('--minutes', -1), "'-1' is no number above 0")])
def test_wrong_input_is_one_line_and_nothing_is_written(run, monkeypatch, arguments, said):
    monkeypatch.setattr('torch.cuda.is_available', lambda: False)
    np.savez('other.npz', images=np.zeros(1))
    status, captured = run(*arguments)
    assert status == 2
    assert captured.err.startswith('error: ') and said in captured.err
    assert captured.err.count('\n') == 1
    assert not Path('new').exists()
