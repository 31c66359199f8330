"""The time left for a comparison's trainings."""
import json
import re

import pytest

from rl_mmdet.analysis.compare.comparison import Run
from rl_mmdet.analysis.compare.progress import Progress


@pytest.fixture
def runs(tmp_path):
    return [Run(name, seed, tmp_path / f'{name}_{seed}') for seed in (0, 1) for name in ('base', 'twin')]


def finish(run, seconds, tested):
    for folder, part in ((run.folder, seconds), (run.folder / 'evaluation', tested)):
        folder.mkdir(parents=True)
        (folder / 'cost.json').write_text(json.dumps(dict(seconds=part)))
    (run.folder / 'scores.json').write_text('{}')


def minutes(line):
    found = re.search(r'all in about (?:(\d+) h )?(\d+) min', line)
    return None if found is None else 60 * int(found[1] or 0) + int(found[2])


def test_the_estimate_is_right_and_does_not_jump_with_slow_iterations_or_the_next_training(runs):
    """Iterations take 1 to 19 s, 10 on average; a training has 2 epochs of 100 and a test of 100 s."""
    now, said = 0., []
    progress, errors = Progress(runs, said.append, clock=lambda: now), []
    for number, run in enumerate(runs):
        progress.begin(run, 2)
        start, now = now, now + 30  # before the first iteration
        for step in range(200):
            now += 1 + 18 * (step * 7 % 19) / 18
            before = len(said)
            progress.line(f'Epoch(train)  [{step // 100 + 1}][{step % 100 + 1:3}/100]  lr: 1 eta: 9:00:00  loss: 1.5')
            if len(said) > before and (left := minutes(said[-1])) is not None and step + 200 * number > 20:
                true = 4 * 2130 - number * 2130 - (now - start)
                errors.append((left * 60 - true) / (4 * 2130))
        finish(run, now - start, 100)
        now += 100
    assert len(errors) > 100
    assert max(map(abs, errors)) < .08
    assert max(abs(after - before) for before, after in zip(errors, errors[1:], strict=False)) < .06


def test_a_resumed_training_and_those_of_an_earlier_call_count(runs):
    now, said = 1000., []
    finish(runs[0], 500, 100)
    progress = Progress(runs, said.append, clock=lambda: now)
    progress.begin(runs[1], None)
    progress.line('Iter(train) [500/1000]  loss: 1.5')
    assert said == ['[2/4] twin, seed 0: Iter(train) [500/1000] loss 1.500; all in about 25 min']  # 2.5 times 600 s
    progress.line('Iter(val) [1/10]  loss: 1.5')
    assert len(said) == 1  # only a line every 15 seconds


def test_trainings_side_by_side_share_what_is_left(runs):
    finish(runs[0], 600, 0)
    said = []
    progress = Progress(runs, said.append, jobs=2, clock=lambda: 0.)
    progress.begin(runs[1], 1)
    progress.line('Epoch(train) [1][100/200]  loss: 1.5')
    assert minutes(said[0]) == 15
