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


def test_a_comparison_is_resolved_and_a_second_call_adds_to_it(base, twin, tmp_path):
    more = {'train_cfg.max_epochs': 7}
    found = plan_comparison(tmp_path / 'work', [f'baseline={base}', twin], {'skip': SKIP}, 2, more, command='first')
    name = 'tiny_atss_rl-r34-k2_fpn_digits'
    assert [each.name for each in found.variants] == ['baseline', name, 'skip']
    assert [str(run) for run in found.runs()][:4] == ['baseline, seed 0', f'{name}, seed 0', 'skip, seed 0',
                                                      'baseline, seed 1']
    assert found.config('skip').model.backbone.replacement.operator.type == 'Skip'
    assert found.config('skip').custom_imports.imports == ['rl_mmdet']
    assert found.config('baseline').model.backbone.type == 'ResNet'
    assert {found.config(each.name).train_cfg.max_epochs for each in found.variants} == {7}
    assert found.classes == list('0123456789') and found.metrics() == ['bbox']
    assert found.annotations().is_file()
    again = plan_comparison(tmp_path / 'work', [f'baseline={base}'], {'other': SKIP}, 1, more, command='second')
    assert [each.name for each in again.variants] == ['baseline', name, 'skip', 'other']
    assert again.seeds == 2
    assert again.commands == ['first', 'second']


def test_other_settings_for_the_same_name_or_another_baseline_are_refused_and_nothing_changes(base, twin, tmp_path):
    plan_comparison(tmp_path / 'work', [base, twin])
    before = {path: path.read_bytes() for path in (tmp_path / 'work').rglob('*') if path.is_file()}
    with pytest.raises(UserError, match=r'was begun there with train_cfg\.max_epochs=\d+, now it is 7'):
        plan_comparison(tmp_path / 'work', [base, twin], options={'train_cfg.max_epochs': 7})
    with pytest.raises(UserError, match='another baseline, tiny_atss_r34_fpn_digits'):
        plan_comparison(tmp_path / 'work', [twin, base])
    assert before == {path: path.read_bytes() for path in (tmp_path / 'work').rglob('*') if path.is_file()}


@pytest.mark.parametrize(('file', 'complaint'), [
    ('thesis.tex', 'files in it that no comparison made'), ('comparison.json', 'not the record of a comparison')])
def test_a_folder_that_no_comparison_made_is_refused(base, twin, tmp_path, file, complaint):
    with pytest.raises(UserError, match='there is no comparison in it'):
        Comparison(tmp_path / 'work')
    (tmp_path / 'work').mkdir()
    (tmp_path / 'work' / file).write_text(json.dumps(dict(format='other/9')))
    with pytest.raises(UserError, match=complaint):
        plan_comparison(tmp_path / 'work', [base, twin])
    assert [path.name for path in (tmp_path / 'work').iterdir()] == [file]


@pytest.mark.parametrize(('arguments', 'complaint'), [
    (dict(variants={}), 'nothing to compare with the baseline'),
    (dict(variants={'a/b': {}}), "'a/b' can't be the name of a variant"),
    (dict(variants={'base': {}}), 'base is there twice'),
    (dict(variants={'x': {'model.backbone.depth.much': 3}}), 'x: --cfg-options'),
    (dict(variants={'x': SKIP | {'model.backbone.replacement.plan.k': 1}}), 'x: model: .*k must be an integer'),
    (dict(seeds=0), '--seeds must be at least 1, got 0'),
    (dict(variants={'x': {'val_dataloader.dataset.num_images': 5}}),
     'x has another val set than the baseline.*: num_images is 5, the baseline'),
    (dict(variants={'x': {'val_dataloader.dataset.metainfo': {'classes': ['a']}}}), r'another val .*: metainfo\.cl'),
    (dict(variants={'x': {'val_evaluator.metric': 'segm'}}), "metric .*: metric is 'segm', the baseline's 'bbox'"),
    (dict(variants={'x': {'val_evaluator.ann_file': 'other.json'}}), "another metric .*: ann_file is 'other.json'"),
    (dict(options={'val_evaluator.type': 'VOCMetric'}), 'val_evaluator must be a CocoMetric, got VOCMetric'),
    (dict(options={'val_evaluator.metric': 'proposal'}), "'proposal'; what can be compared: bbox, segm"),
    (dict(options={'val_evaluator': [dict(type='CocoMetric', ann_file='a')] * 2}), 'has several CocoMetrics; give one'),
    (dict(options={'val_evaluator.ann_file': None}), 'val_evaluator.ann_file is missing'),
    (dict(options={'val_evaluator.iou_thrs': [0.5]}), 'val_evaluator.iou_thrs: COCO AP is compared'),
    (dict(options={'train_dataloader.dataset': dict(_delete_=True, type='CocoDataset', ann_file='none.json')}),
     'base: .*none.json doesn.t exist'),
    (dict(configs=[]), 'no config file is given'),
])
def test_what_cannot_be_compared_ends_with_one_line_before_anything_is_written(base, tmp_path, arguments, complaint):
    with pytest.raises(UserError, match=complaint) as error:
        plan_comparison(tmp_path / 'work', **dict(configs=[f'base={base}'], variants={'skip': SKIP}) | arguments)
    assert '\n' not in str(error.value)
    assert not (tmp_path / 'work').exists()


def test_a_call_that_ended_while_data_were_made_can_be_given_again(base, tmp_path, monkeypatch):
    def ended(cfg, *_):
        (Path(cfg.work_dir) / 'digits').mkdir(parents=True)
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr('rl_mmdet.analysis.compare.comparison.prepare_files', ended)
        plan_comparison(tmp_path / 'work', [base], {'skip': SKIP})
    assert len(plan_comparison(tmp_path / 'work', [base], {'skip': SKIP}).variants) == 2


def test_checkpoints_stand_beside_their_run_wherever_the_config_puts_them(base, tmp_path):
    found = plan_comparison(tmp_path / 'work', [base], {'skip': SKIP},
                            options={'default_hooks.checkpoint.out_dir': str(tmp_path / 'one_for_all')})
    assert not any('out_dir' in found.config(each.name).default_hooks.checkpoint for each in found.variants)


def test_another_test_pipeline_is_allowed(base, tmp_path):
    changes = SKIP | {'val_dataloader.dataset.pipeline.1.scale': (96, 96)}
    assert len(plan_comparison(tmp_path / 'work', [base], {'smaller': changes}).variants) == 2


def test_a_config_of_mmdetection_and_one_of_ours_on_top_of_it_ask_the_same_question(tmp_path):
    ours = Path(__file__).parents[3] / 'configs/rl_resnet/faster-rcnn_rl-r50-k2_fpn_1x_coco.py'
    with pytest.raises(UserError, match=r'faster-rcnn_r50_fpn_1x_coco: .*instances_train2017\.json doesn\'t exist'):
        plan_comparison(tmp_path / 'work', ['mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py', str(ours)],
                        options={'model.backbone.init_cfg': None, 'data_root': f'{tmp_path}/'})


def test_parse_variants_reads_values_as_cfg_options_does():
    found = parse_variants([['a', 'x.y=1', 'x.z=[1,2]', 'x.w=1e-3'], ['b']])
    assert found == {'a': {'x.y': 1, 'x.z': [1, 2], 'x.w': 1e-3}, 'b': {}}
    for given, complaint in (([['x.y=1']], r"got 'x\.y=1'"), ([['a', 'x.y']], r"got 'x\.y'"),
                             ([['a', 'x=1'], ['a', 'x=2']], 'a is there twice')):
        with pytest.raises(UserError, match=complaint):
            parse_variants(given)
