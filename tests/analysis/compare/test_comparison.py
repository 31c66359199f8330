"""What may be compared, and the folder it is compared in."""
import json
from pathlib import Path

import pytest

from rl_mmdet.analysis.compare import Comparison, parse_variants, plan_comparison
from rl_mmdet.engine import UserError

SKIP = {'model.backbone.type': 'RLResNet', 'model.backbone.replacement.plan.type': 'EveryKth',
        'model.backbone.replacement.plan.k': 2, 'model.backbone.replacement.operator.type': 'Skip'}


@pytest.fixture
def base(tiny_config):
    return tiny_config('atss_r34_fpn_digits.py')


@pytest.fixture
def twin(tiny_config):
    return tiny_config()


def test_plan_resolves_files_and_variants_and_orders_the_runs_by_seed(base, twin, tmp_path):
    found = plan_comparison(tmp_path / 'work', [f'baseline={base}', twin], {'skip': SKIP}, seeds=2, command='typed')
    assert [each.name for each in found.variants] == ['baseline', 'tiny_atss_rl-r34-k2_fpn_digits', 'skip']
    assert [str(run) for run in found.runs()][:4] == ['baseline, seed 0', 'tiny_atss_rl-r34-k2_fpn_digits, seed 0',
                                                      'skip, seed 0', 'baseline, seed 1']
    assert found.config('skip').model.backbone.replacement.operator.type == 'Skip'
    assert found.config('skip').custom_imports.imports == ['rl_mmdet']
    assert found.config('baseline').model.backbone.type == 'ResNet'
    assert found.classes == list('0123456789')
    assert found.metrics() == ['bbox']
    assert found.annotations().is_file()
    assert found.commands == ['typed']


def test_options_change_every_config(base, twin, tmp_path):
    found = plan_comparison(tmp_path / 'work', [base, twin], options={'train_cfg.max_epochs': 7})
    assert {found.config(each.name).train_cfg.max_epochs for each in found.variants} == {7}


def test_a_second_call_adds_variants_and_seeds_and_keeps_the_others(base, twin, tmp_path):
    plan_comparison(tmp_path / 'work', [f'base={base}', f'twin={twin}'], seeds=3, command='first')
    found = plan_comparison(tmp_path / 'work', [f'base={base}'], {'skip': SKIP}, seeds=1, command='second')
    assert [each.name for each in found.variants] == ['base', 'twin', 'skip']
    assert found.seeds == 3
    assert found.commands == ['first', 'second']


def test_other_settings_for_the_same_name_are_refused_and_nothing_changes(base, twin, tmp_path):
    plan_comparison(tmp_path / 'work', [base, twin])
    before = {path: path.read_bytes() for path in (tmp_path / 'work').rglob('*') if path.is_file()}
    with pytest.raises(UserError, match=r'was begun there with train_cfg\.max_epochs=\d+, now it is 7'):
        plan_comparison(tmp_path / 'work', [base, twin], options={'train_cfg.max_epochs': 7})
    assert before == {path: path.read_bytes() for path in (tmp_path / 'work').rglob('*') if path.is_file()}


def test_the_folder_of_another_baseline_is_refused(base, twin, tmp_path):
    plan_comparison(tmp_path / 'work', [base, twin])
    with pytest.raises(UserError, match='another baseline, tiny_atss_r34_fpn_digits'):
        plan_comparison(tmp_path / 'work', [twin, base])


def test_a_folder_with_other_files_is_refused(base, twin, tmp_path):
    (tmp_path / 'work').mkdir()
    (tmp_path / 'work' / 'thesis.tex').write_text('x')
    with pytest.raises(UserError, match='files in it that no comparison made'):
        plan_comparison(tmp_path / 'work', [base, twin])
    assert [path.name for path in (tmp_path / 'work').iterdir()] == ['thesis.tex']


def test_a_record_of_another_format_is_refused(base, twin, tmp_path):
    (tmp_path / 'work').mkdir()
    (tmp_path / 'work' / 'comparison.json').write_text(json.dumps(dict(format='other/9')))
    with pytest.raises(UserError, match='not the record of a comparison'):
        plan_comparison(tmp_path / 'work', [base, twin])


def test_a_folder_without_comparison_has_nothing_to_report(tmp_path):
    with pytest.raises(UserError, match='there is no comparison in it'):
        Comparison(tmp_path)


@pytest.mark.parametrize(('changes', 'complaint'), [
    ({'val_dataloader.dataset.num_images': 5}, r'another val set than the baseline.*: num_images is 5, the baseline'),
    ({'val_dataloader.dataset.data_root': '/elsewhere/'}, r"another val set .*: data_root is '/elsewhere/'"),
    ({'val_dataloader.dataset.metainfo': {'classes': ['a']}}, r'another val set .*: metainfo\.classes'),
    ({'val_evaluator.metric': 'segm'}, r"another metric .*: metric is 'segm', the baseline's 'bbox'"),
    ({'val_evaluator.ann_file': 'other.json'}, r"another metric .*: ann_file is 'other.json'"),
])
def test_another_evaluation_is_refused_with_the_difference_named(base, tmp_path, changes, complaint):
    with pytest.raises(UserError, match=complaint):
        plan_comparison(tmp_path / 'work', [base], {'other': changes})
    assert not (tmp_path / 'work').exists()


def test_another_test_pipeline_is_allowed(base, tmp_path):
    changes = SKIP | {'val_dataloader.dataset.pipeline.1.scale': (96, 96)}
    assert len(plan_comparison(tmp_path / 'work', [base], {'smaller': changes}).variants) == 2


@pytest.mark.parametrize(('options', 'complaint'), [
    ({'val_evaluator.type': 'VOCMetric'}, 'val_evaluator must be a CocoMetric, got VOCMetric'),
    ({'val_evaluator.metric': 'proposal'}, "val_evaluator.metric is 'proposal'; what can be compared: bbox, segm"),
    ({'val_evaluator.ann_file': None}, 'val_evaluator.ann_file is missing'),
    ({'val_evaluator.iou_thrs': [0.5]}, 'val_evaluator.iou_thrs: COCO AP is compared'),
])
def test_an_evaluation_without_coco_ap_is_refused(base, twin, tmp_path, options, complaint):
    with pytest.raises(UserError, match=complaint):
        plan_comparison(tmp_path / 'work', [base, twin], options=options)
    assert not (tmp_path / 'work').exists()


@pytest.mark.parametrize(('arguments', 'complaint'), [
    (dict(variants={}), 'nothing to compare with the baseline'),
    (dict(variants={'a/b': {}}), "'a/b' can't be the name of a variant"),
    (dict(variants={'base': {}}), 'base is there twice'),
    (dict(variants={'x': {'model.backbone.depth.much': 3}}), 'x: --cfg-options'),
    (dict(variants={'x': SKIP | {'model.backbone.replacement.plan.k': 1}}), 'x: model: .*k must be an integer'),
    (dict(variants={'x': SKIP}, seeds=0), '--seeds must be at least 1, got 0'),
])
def test_wrong_arguments_end_with_one_line_before_anything_is_written(base, tmp_path, arguments, complaint):
    with pytest.raises(UserError, match=complaint) as error:
        plan_comparison(tmp_path / 'work', [f'base={base}'], **arguments)
    assert '\n' not in str(error.value)
    assert not (tmp_path / 'work').exists()


def test_no_config_at_all_is_refused(tmp_path):
    with pytest.raises(UserError, match='no config file is given'):
        plan_comparison(tmp_path / 'work', [])


def test_parse_variants_reads_values_as_cfg_options_does():
    found = parse_variants([['a', 'x.y=1', 'x.z=[1,2]', 'x.w=1e-3'], ['b']])
    assert found == {'a': {'x.y': 1, 'x.z': [1, 2], 'x.w': 1e-3}, 'b': {}}


@pytest.mark.parametrize(('given', 'complaint'), [
    ([['x.y=1']], r"got 'x\.y=1'"),
    ([['a', 'x.y']], r"got 'x\.y'"),
    ([['a', 'x=1'], ['a', 'x=2']], 'a is there twice'),
])
def test_parse_variants_refuses_what_is_no_variant(given, complaint):
    with pytest.raises(UserError, match=complaint):
        parse_variants(given)


def test_a_config_of_mmdetection_and_one_of_ours_on_top_of_it_ask_the_same_question(tmp_path):
    ours = Path(__file__).parents[3] / 'configs/rl_resnet/faster-rcnn_rl-r50-k2_fpn_1x_coco.py'
    with pytest.raises(UserError, match=r'faster-rcnn_r50_fpn_1x_coco: .*instances_train2017\.json doesn\'t exist'):
        plan_comparison(tmp_path / 'work', ['mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py', str(ours)],
                        options={'model.backbone.init_cfg': None, 'data_root': f'{tmp_path}/'})
