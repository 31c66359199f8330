import json

import pytest

from rl_mmdet.analysis.zoo import Outcome, Result, ZooConfig, check_configs, coverage, require_all
from rl_mmdet.engine import UserError


@pytest.fixture
def zoo(monkeypatch, tiny_config):
    """Four configs, two with the same model and one without; returns the names whose models were run, in order."""
    configs = {config.name: config for config in (
        tiny_config('a/1.py'), tiny_config('a/2.py'), tiny_config('b/1.py', depth=101),
        ZooConfig('c/1.py', reason='none'))}
    ran = []

    def run(names, workers, limit, stop_after, quick):
        for name in names if stop_after else ():
            ran.append(name)
            yield Result(name, 'runs', 'runs', replaced=2)
    monkeypatch.setattr(coverage, 'read_config', configs.get)
    monkeypatch.setattr(coverage, 'check_in_parallel', run)
    return ran


NAMES = ['a/1.py', 'a/2.py', 'b/1.py', 'c/1.py']


def test_configs_that_share_a_model_share_its_result(zoo):
    outcomes = check_configs(NAMES)
    assert sorted(zoo) == ['a/1.py', 'b/1.py']
    assert [outcome.config.name for outcome in outcomes] == NAMES
    assert [outcome.result.config for outcome in outcomes] == ['a/1.py', 'a/1.py', 'b/1.py', 'c/1.py']
    assert outcomes[-1].result == Result('c/1.py', 'fails', reason='none')


def test_a_later_run_goes_on_from_the_record(zoo, tmp_path):
    record = tmp_path / 'new' / 'zoo.jsonl'
    first = check_configs(NAMES[:2], record=record)
    record.write_text(record.read_text() + '{"key": "cut o')
    zoo.clear()
    again = check_configs(NAMES, record=record)
    assert zoo == ['b/1.py']
    assert again[:2] == first


def test_results_of_other_versions_do_not_count(zoo, tmp_path):
    record = tmp_path / 'zoo.jsonl'
    check_configs(NAMES, record=record)
    rows = [json.loads(line) | dict(versions=dict(mmdet='1.0')) for line in record.read_text().splitlines()]
    record.write_text('\n'.join(map(json.dumps, rows)) + '\n')
    zoo.clear()
    check_configs(NAMES, record=record)
    assert sorted(zoo) == ['a/1.py', 'b/1.py']


def test_one_of_every_folder_and_backbone_comes_first(zoo, monkeypatch, tiny_config):
    configs = [tiny_config(f'{"ab"[depth > 150]}/{depth}.py', depth=depth) for depth in (34, 50, 101, 152)]
    monkeypatch.setattr(coverage, 'read_config', {config.name: config for config in configs}.get)
    check_configs([config.name for config in configs])
    assert len(zoo) == 4
    assert {name[0] for name in zoo[:2]} == {'a', 'b'}


def test_models_that_there_is_no_time_for_are_not_tried(zoo, tmp_path):
    record = tmp_path / 'zoo.jsonl'
    known = check_configs(NAMES[2:], record=record)
    outcomes = check_configs(NAMES, record=record, stop_after=0)
    assert [outcome.result.baseline for outcome in outcomes] == ['not tried', 'not tried', 'runs', 'fails']
    assert outcomes[2:] == known


def test_progress_names_the_config_and_how_many_share_its_model(zoo):
    lines = []
    check_configs(NAMES, say=lines.append)
    assert lines[0] == '4 configs, 3 distinct models, 2 of them to be run'
    assert any(line.endswith('] a/1.py (of 2): baseline runs, RL runs (2 replaced)') for line in lines)


def test_require_all_names_the_configs_that_fail_only_with_replaced_blocks():
    outcomes = [Outcome(ZooConfig('a/1.py'), Result('a/1.py', 'runs', 'fails', 'no gradient')),
                Outcome(ZooConfig('a/2.py'), Result('a/2.py', 'fails', reason='package')),
                Outcome(ZooConfig('a/3.py'), Result('a/3.py', 'runs', 'no replaceable block', 'none'))]
    with pytest.raises(UserError, match=r'^1 configs run, but not with replaced blocks: a/1.py \(no gradient\)$'):
        require_all(outcomes)
    require_all(outcomes[1:])
