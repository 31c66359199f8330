"""The fixed sample, run; and that it has something of everything which the result page says runs."""
from pathlib import Path

import pytest

from rl_mmdet.analysis.zoo import check_configs, config_names, read_config, sample
from rl_mmdet.engine import UserError

PAGE = Path(__file__).resolve().parents[3] / 'docs' / 'results' / 'zoo_coverage.md'


@pytest.fixture(scope='module')
def results():
    return {outcome.config.name: outcome.result for outcome in check_configs(sample(), quick=True)}


@pytest.mark.parametrize('name', sample())
def test_a_config_that_runs_also_runs_with_replaced_blocks_or_has_none_to_replace(results, name):
    result = results[name]
    assert result.baseline == 'runs', result.reason
    assert result.rl in ('runs', 'no replaceable block'), result.reason
    assert (result.replaced > 0) == (result.rl == 'runs')


def test_the_sample_has_every_backbone_and_many_folders_that_run():
    folders, backbones = _rows_that_run('By folder'), _rows_that_run('By backbone')
    configs = [read_config(name) for name in sample()]
    assert len(configs) >= 40
    # mmdet's TridentConv leaves its weights uninitialised, so what it computes is left to chance
    assert {config.backbones for config in configs} == backbones - {'TridentResNet'}
    families = {config.family for config in configs}
    assert families <= folders
    assert len(families) >= 45


def test_the_page_has_every_folder_of_configs():
    assert set(_rows('By folder')) == {name.split('/')[0] for name in config_names()}


def test_sample_gives_the_first_names_and_no_more_than_there_are():
    assert sample(3) == sample()[:3]
    with pytest.raises(UserError, match='--sample 1000: must be from 1 to '):
        sample(1000)


def _rows(title):
    """The cells of a table of the page, by the first one."""
    table = PAGE.read_text().split(f'## {title}\n')[1].split('\n## ')[0]
    cells = [[cell.strip() for cell in line.split('|')[1:-1]] for line in table.splitlines() if line.startswith('| ')]
    return {first: rest for first, *rest in cells[1:]}


def _rows_that_run(title):
    return {first for first, (_, baseline, *_) in _rows(title).items() if baseline != '0'}
