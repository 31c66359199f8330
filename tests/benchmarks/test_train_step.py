"""benchmarks/train_step.py as a user calls it, on a tiny detector."""
import json
from pathlib import Path

import pytest

PROGRAM = Path(__file__).resolve().parents[2] / 'benchmarks/train_step.py'
TINY = 'faster-rcnn_r34_fpn_digits.py'


@pytest.fixture
def run(run_script):
    """Run it; returns its exit status and what it wrote to stderr."""
    def call(*arguments):
        status, captured = run_script(PROGRAM, *arguments, '--out', 'results/page')
        return status, captured.err
    return call


def read():
    return json.loads(Path('results/page.json').read_text())


@pytest.mark.parametrize(('arguments', 'said'), [
    (('--variants', 'slimm'), "unknown 'slimm'; allowed: baseline, folded, skip, every-1"),
    (('--variants', 'baseline+fold'), 'allowed: baseline, folded'),
    (('--config', 'missing.py'), '--config missing.py: a file is missing'),
    (('--config', 'mmdet::missing.py'), 'mmdet::PATH'),
    (('--rounds', '0'), "'0' is no integer of at least 1"),
])
def test_wrong_input_is_one_line_and_nothing_is_written(run, arguments, said):
    status, written = run(*arguments)
    assert status == 2
    assert written.startswith('error: ') and said in written
    assert written.count('\n') == 1
    assert not Path('results').exists()


@pytest.fixture
def config(tiny_config):
    return tiny_config(TINY, more='model["backbone"]["norm_eval"] = True\n')


def test_page_and_data_of_a_backbone(run, config):
    names = ['skip', 'every-1', 'every-8', 'slim', 'frozen', 'checkpoint', 'folded', 'skip+fold', 'every-8+fold']
    status, _ = run('--config', config, '--size', 64, 64, '--rounds', 2, '--variants', *names)
    assert status == 0
    found, = read()['cases']
    rows = found['rows']
    assert found['left_out'] == {} and found['reason'] == ''
    assert list(rows) == ['baseline', *names]
    assert all(len(row['ratios']) == 2 and row['time'] > 0 for row in rows.values())
    assert set(rows['baseline']['ratios']) == {1.}
    assert set(rows['skip']['shares'].values()) == {1.}
    assert rows['every-1']['shares']['flops'] == 0 < rows['every-8']['shares']['flops']
    assert rows['every-1']['calls'] > rows['every-8']['calls'] > rows['baseline']['calls'] > rows['skip']['calls']
    assert rows['slim']['shares']['flops'] > 0.5
    assert rows['checkpoint']['flops'] > rows['baseline']['flops'] > rows['frozen']['flops']
    weights = 4 * rows['folded']['parameters']  # once for all images: the folded ones
    assert rows['folded']['saved'] - weights < rows['baseline']['saved'] != rows['folded']['saved']
    assert 'flops' in rows['every-8+fold']['shares'] and rows['folded']['shares'] == {}
    page = Path('results/page.md').read_text()
    assert '--rounds 2' in page
    assert '| every-8+fold | ' in page


def test_what_a_backbone_cannot_have_is_left_out_with_the_reason(run, tiny_config):
    status, _ = run('--config', tiny_config(TINY), '--count-only', '--size', 64, 64, '--variants',
                    'skip', 'folded', 'skip+fold')
    found, = read()['cases']
    assert status == 0
    assert list(found['rows']) == ['baseline', 'skip']
    assert 'norm_eval=False' in found['left_out']['folded']
    assert 'left out: folded, skip+fold: ' in Path('results/page.md').read_text()


def test_a_plan_that_chooses_nothing_is_said_on_the_page(run, tiny_config):
    config = tiny_config(TINY, more='model["backbone"]["depth"] = 18\n')
    status, _ = run('--config', config, '--count-only')
    assert status == 0
    assert 'nothing measured: ' in Path('results/page.md').read_text()
