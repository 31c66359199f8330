"""The table of a baseline and its twin."""
import json

from rich.console import Console

from rl_mmdet.analysis import Comparison, StepTimes, TrainingCost
from rl_mmdet.analysis.side_by_side import Outcome


def comparison():
    baseline = Outcome(.5, .8, 1000, TrainingCost(100., 500 * 2**20, True), 'work/baseline')
    twin = Outcome(.6, .9, 700, TrainingCost(110., 600 * 2**20, True), 'work/RL-v1')
    return Comparison({'baseline': baseline, 'RL-v1': twin}, StepTimes({'baseline': .1, 'RL-v1': .12}, [1.1, 1.3, 1.2]),
                      'picture.png')


def test_table_has_both_models_figures_and_their_ratios():
    console = Console(width=150, record=True)
    console.print(comparison().table())
    rows = {line.split('│')[1].strip(): [cell.strip() for cell in line.split('│')[2:-1]]
            for line in console.export_text().splitlines() if '│' in line}
    assert rows['AP'] == ['0.500', '0.600', '1.20']
    assert rows['AP50'] == ['0.800', '0.900', '1.12']
    assert rows['trainable parameters'] == ['1,000', '700', '0.70']
    assert rows['seconds per step (alternating, one process)'] == ['0.100', '0.120', '1.20']
    assert rows['peak memory of the training, resident set, MiB'] == ['500', '600', '1.20']
    assert rows['seconds in all (training and its evaluations)'] == ['100', '110', '1.10']


def test_save_writes_every_figure(tmp_path):
    comparison().save(tmp_path / 'comparison.json')
    saved = json.loads((tmp_path / 'comparison.json').read_text())
    assert saved['outcomes']['RL-v1']['parameters'] == 700
    assert saved['steps']['ratios'] == [1.1, 1.3, 1.2]
