"""The demo, without its trainings."""
from pathlib import Path

from rl_mmdet.analysis import compare
from rl_mmdet.analysis.demo import run_demo

ROOT = Path(__file__).resolve().parents[2]


def test_its_summary_tells_what_each_costs_in_80_columns(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(compare, 'carry_out', lambda comparison, *_, show: show(compare.collect(comparison)))
    run_demo(ROOT / 'configs' / 'digits', ROOT / 'tools', tmp_path / 'demo')
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    rows = [line.replace('│', '').split() for line in lines if line.startswith('│')]
    assert [row[:4] for row in rows] == [['baseline', '1.00', '1.00', '1.00'], ['RL-v1', '0.65', '1.00', '1.01'],
                                         ['RL-v2', '0.65', '0.73', '0.80']]
    assert rows[0][4] == '1.00' and all(0.2 < float(row[4]) < 5 for row in rows)
