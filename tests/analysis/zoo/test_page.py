from dataclasses import replace

import pytest

from rl_mmdet.analysis.zoo import Outcome, Result, coverage_page, summary


@pytest.fixture
def outcomes(tiny_config):
    results = [Result('a/1.py', 'runs', 'runs', replaced=4), Result('a/2.py', 'runs', 'fails', 'bad|news'),
               Result('b/1.py', 'runs', 'no replaceable block', 'says none'),
               Result('b/2.py', 'fails', reason='needs the package x'),
               Result('b/3.py', 'fails', reason='needs the package x')]
    types = ('ResNet', 'ResNet', 'ResNeXt', 'ResNeXt', 'ResNeXt')
    return [Outcome(tiny_config(result.config, type=kind), result) for result, kind in zip(results, types, strict=True)]


def test_page_names_its_command_and_the_versions(outcomes):
    page = coverage_page(outcomes, 'python tools/check_zoo.py --workers 2')
    assert 'Made by `python tools/check_zoo.py --workers 2`: mmdet ' in page
    assert 'torch ' in page


def test_summary_counts(outcomes):
    assert summary([*outcomes, _untried(outcomes)]) == (
        "Of 6 configs (2 distinct models) 3 run as they are, 2 don't, and 1 weren't tried. With replaced blocks 1 of "
        'the 3 run, 1 have no block that can be replaced, and 1 fail.')


@pytest.mark.parametrize('row', [
    '| a | 2 | 2 | 1 | 0 | 1 | 1: bad\\|news |', '| b | 3 | 1 | 0 | 1 | 0 | 2: needs the package x |',
    '| ResNet | 2 | 2 | 1 | 0 | 1 | 1: bad\\|news |', '| ResNeXt | 3 | 1 | 0 | 1 | 0 | 2: needs the package x |'])
def test_page_has_a_row_per_folder_and_per_backbone(outcomes, row):
    assert f'\n{row}\n' in coverage_page(outcomes, 'x')


def test_page_lists_what_does_not_run_by_reason(outcomes):
    page = coverage_page(outcomes, 'x')
    assert '- needs the package x (2): `b/2.py`, `b/3.py`' in page
    assert '- says none (1): `b/1.py`' in page
    assert 'doesn\'t run\n\n- bad\\|news (1): `a/2.py`' in page


def test_page_lists_what_was_not_tried(outcomes):
    assert 'Not tried' not in coverage_page(outcomes, 'x')
    assert '## Not tried\n\n- no time (1): `c/1.py`\n' in coverage_page([*outcomes, _untried(outcomes)], 'x')


def _untried(outcomes):
    config = replace(outcomes[0].config, name='c/1.py')
    return Outcome(config, Result('c/1.py', 'not tried', reason='no time'))


def test_page_says_so_when_nothing_fails(outcomes):
    assert '## Replaced, but doesn\'t run\n\nNone.' in coverage_page(outcomes[:1], 'x')
