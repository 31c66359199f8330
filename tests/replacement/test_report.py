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


def test_rows_are_every_block_in_order(report):
    assert [row.name for row in report.rows] == (
        [f'layer1.{i}' for i in range(3)] + [f'layer2.{i}' for i in range(6)])


def test_rows_name_the_blocks_class(report):
    assert {row.kind for row in report.rows} == {'Unit'}


def test_rows_replaced_are_the_plans(report):
    assert [row.name for row in report.rows if row.replaced] == ['layer1.1', 'layer2.2', 'layer2.3']


@pytest.mark.parametrize('index', [2, 3])
def test_rows_adjacent_replaced_blocks_name_the_nearest_kept(report, index):
    row = report.rows[3 + index]
    assert (row.before, row.after) == ('layer2.1', 'layer2.4')


def test_rows_kept_block_that_can_be_replaced_has_no_reason(report):
    row = report.rows[4]
    assert (row.replaced, row.before, row.after, row.reason) == (False, None, None, None)


def test_rows_first_block_says_why_not(report):
    assert report.rows[3].reason == 'no kept block before it in its stage'


def test_rows_parameters_of_a_removed_block_are_its_own(toy_net, report):
    expected = sum(p.numel() for p in toy_net().layer2[2].parameters())
    assert report.rows[5].parameters == expected


def test_replaced_is_what_the_blocks_plan_takes(toy_net, report):
    again = replace_blocks_(toy_net(), dict(plan=Blocks(report.replaced)))
    assert again.replaced == report.replaced == {'layer1': [1], 'layer2': [2, 3]}


def test_removed_parameters_equal_the_models_loss(toy_net):
    net = toy_net()
    before = sum(p.numel() for p in net.parameters())
    report = replace_blocks_(net, dict(plan=dict(type='EveryKth', k=2)))
    assert before - report.removed_parameters + report.learnable == sum(p.numel() for p in net.parameters())


def test_learnable_is_two_per_replaced_block(report):
    assert report.learnable == 6


def test_settings_name_all_four_words(report):
    assert list(report.settings) == ['plan', 'fusion', 'operator', 'gradient']


def test_str_first_line_has_the_counts(report):
    assert str(report).splitlines()[0] == (f'3 of 9 blocks replaced by computing layers: '
                                           f'{report.removed_parameters:,} parameters removed, 6 added')


def test_str_has_one_line_per_block(report):
    lines = str(report).splitlines()[1:]
    assert lines[0] == "  layer1.0 (Unit): kept, can't be replaced: no kept block before it in its stage"
    assert lines[1] == '  layer1.1 (Unit): replaced, from layer1.0 and layer1.2; learns 2'
    assert lines[4] == '  layer2.1 (Unit): kept'
    assert len(lines) == 9


@pytest.mark.parametrize(('operator', 'gradient', 'said'), [
    (None, dict(sample=0.5), ', sampled layer by layer'), (None, dict(), ''), (dict(type='Skip'), dict(sample=0.5), ''),
    (dict(type='DepthwiseBlock'), dict(sample=0.5), ', sampled layer by layer')])
def test_str_says_how_the_gradient_is_sampled(toy_net, operator, gradient, said):
    plan = dict(type='Blocks', blocks={'layer2': [1]})
    report = replace_blocks_(toy_net(), dict(plan=plan, operator=operator, gradient=gradient))
    row = report.rows[4]
    assert str(report).splitlines()[5] == (
        f'  layer2.1 (Unit): replaced, from layer2.0 and layer2.2; learns {row.learnable}{said}')
    assert [each.way for each in report.rows if each is not row] == [None] * 8


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
    rows = {row.name: row for row in report.rows if row.replaced}
    assert rows['layer2.1'].others == ('layer2.4',)
    assert rows['layer2.3'].others == ('layer2.0',)
    assert 'from layer2.2 and layer2.4; tensors of another size there from layer2.0' in str(report)
