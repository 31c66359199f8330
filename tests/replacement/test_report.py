"""The report: what was replaced, by whom, and why other blocks were not."""
import pytest
import torch
from torch import nn

from rl_mmdet.replacement import replace_blocks_
from rl_mmdet.replacement.plans import Blocks


@pytest.fixture
def report(toy_net):
    plan = dict(type='Blocks', blocks={'layer1': [1], 'layer2': [2, 3]})
    return replace_blocks_(toy_net(), dict(plan=plan))


def test_rows_are_every_block_in_order(toy_net, report):
    assert [row.name for row in report.rows] == [
        *(f'layer1.{i}' for i in range(3)), *(f'layer2.{i}' for i in range(6))]
    assert [row.name for row in report.rows if row.replaced] == ['layer1.1', 'layer2.2', 'layer2.3']
    replaced, kept, first = report.rows[5], report.rows[4], report.rows[3]
    assert (replaced.kind, replaced.before, replaced.after, replaced.learnable) == ('Unit', 'layer2.1', 'layer2.4', 2)
    assert replaced.parameters == sum(p.numel() for p in toy_net().layer2[2].parameters())
    assert (kept.replaced, kept.before, kept.after, kept.reason) == (False, None, None, None)
    assert first.reason == 'no kept block before it in its stage'


def test_replaced_is_what_the_blocks_plan_takes(toy_net, report):
    again = replace_blocks_(toy_net(), dict(plan=Blocks(report.replaced)))
    assert again.replaced == report.replaced == {'layer1': [1], 'layer2': [2, 3]}


def test_parameters_removed_and_added_are_the_models(toy_net):
    net = toy_net()
    before = sum(p.numel() for p in net.parameters())
    report = replace_blocks_(net, dict(plan=dict(type='EveryKth', k=2)))
    assert before - report.removed_parameters + report.learnable == sum(p.numel() for p in net.parameters())
    assert report.learnable == 6


def test_str_has_the_counts_and_one_line_per_block(report):
    lines = str(report).splitlines()
    assert lines[:3] == [
        f'3 of 9 blocks replaced by computing layers: {report.removed_parameters:,} parameters removed, 6 added',
        "  layer1.0 (Unit): kept, can't be replaced: no kept block before it in its stage",
        '  layer1.1 (Unit): replaced, from layer1.0 and layer1.2; learns 2']
    assert lines[5] == '  layer2.1 (Unit): kept'
    assert len(lines) == 10


def test_str_of_another_plan_ends_with_the_choice_as_blocks(toy_net):
    report = replace_blocks_(toy_net(), dict(plan=dict(type='EveryKth', k=2)))
    line = str(report).splitlines()[-1]
    assert line == "  the same choice as a plan: dict(type='Blocks', blocks={'layer1': [1], 'layer2': [1, 3]})"
    assert replace_blocks_(toy_net(), dict(plan=eval(report.as_plan))).replaced == report.replaced


def test_rows_name_the_blocks_further_away_whose_tensors_are_used(toy_net):
    net = toy_net()
    for index, size in enumerate((7, 7, 9, 7, 7, 9)):
        net.layer2[index].table = nn.Parameter(torch.zeros(size))
    report = replace_blocks_(net, dict(plan=Blocks({'layer2': [1, 3]})))
    assert [row.others for row in report.rows if row.replaced] == [('layer2.4',), ('layer2.0',)]
    assert 'from layer2.2 and layer2.4; tensors of another size there from layer2.0' in str(report)
