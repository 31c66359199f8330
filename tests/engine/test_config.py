"""Reading a config with its options, and the defaults for Replacement Learning."""
import pytest
from mmengine.config import Config

from rl_mmdet.engine import UserError, add_import_, add_rl_defaults_, load_config


@pytest.fixture
def config(tmp_path):
    """Write a config file with some text."""
    def write(text: str = 'a = 1') -> str:
        path = tmp_path / 'some_config.py'
        path.write_text(text)
        return str(path)
    return write


def test_the_work_dir_is_the_configs_stem_unless_it_is_given(config):
    assert load_config(config()).work_dir == 'work_dirs/some_config'
    assert load_config(config('work_dir = "here"')).work_dir == 'here'
    assert load_config(config('work_dir = "here"'), work_dir='there').work_dir == 'there'


def test_a_config_of_mmdetection_is_found_by_the_name_it_has_as_a_base():
    cfg = load_config('mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py', {'model.backbone.depth': 18})
    assert (cfg.model.backbone.type, cfg.model.backbone.depth) == ('ResNet', 18)
    assert cfg.work_dir == 'work_dirs/faster-rcnn_r50_fpn_1x_coco'


@pytest.mark.parametrize(('text', 'options', 'complaint'), [
    (None, {}, 'config nothing.py: FileNotFoundError'),
    ('mmdet::faster_rcnn/nothing.py', {}, 'config mmdet::faster_rcnn/nothing.py: '),
    ('a = (', {}, 'SyntaxError'),
    ('a = 1', {'data_root': 'x'}, 'no top-level data_root'),
    ('a = [1]', {'a.b': 2}, '--cfg-options: '),
    ('custom_imports = dict(imports=0)', {}, "custom_imports.imports must be a list of modules such as"),
    ('custom_imports = dict(imports=None)', {}, "custom_imports.imports must be a list of modules such as"),
])
def test_what_cannot_be_read_is_refused_in_one_line(config, text, options, complaint):
    path = 'nothing.py' if text is None else text if '::' in text else config(text)
    with pytest.raises(UserError, match=complaint) as caught:
        load_config(path, options)
    assert '\n' not in str(caught.value)


def test_data_root_option_moves_datasets_and_evaluators(config):
    cfg = load_config(config('''
data_root = 'data/coco/'
train_dataloader = dict(dataset=dict(dataset=dict(data_root=data_root, ann_file='annotations/train.json')))
val_evaluator = dict(ann_file=data_root + 'annotations/val.json', outfile_prefix='./work/data/coco/x')
'''), {'data_root': '/elsewhere'})
    assert cfg.train_dataloader.dataset.dataset == dict(data_root='/elsewhere/', ann_file='annotations/train.json')
    assert cfg.val_evaluator == dict(ann_file='/elsewhere/annotations/val.json', outfile_prefix='./work/data/coco/x')


OF_ALL = ['FiniteLossHook', 'ResumeHook']
OF_REPLACED = [*OF_ALL, 'StartHook', 'LearningStepsHook']


@pytest.mark.parametrize(('replacement', 'given', 'hooks', 'constructor'), [
    (dict(plan=dict(type='EveryKth', k=2)), None, ['Other', *OF_REPLACED], 'RLOptimWrapperConstructor'),
    (dict(plan=dict(type='EveryKth', k=2)), 'LayerDecay', ['Other', *OF_REPLACED], 'LayerDecay'),
    (None, None, ['Other', *OF_ALL], None),
], ids=['replaced', 'with another constructor', 'baseline'])
def test_defaults_are_added_once_to_what_needs_them(replacement, given, hooks, constructor):
    cfg = Config(dict(model=dict(backbone=dict(type='RLResNet', replacement=replacement)),
                      optim_wrapper=dict(constructor=given), custom_hooks=[dict(type='Other')],
                      default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=2))))
    for _ in range(2):
        add_rl_defaults_(cfg)
        assert [hook.type for hook in cfg.custom_hooks] == hooks
        assert cfg.optim_wrapper.constructor == constructor
        assert cfg.default_hooks.checkpoint == dict(type='WholeCheckpointHook', interval=2)


@pytest.mark.parametrize(('hooks', 'checkpoint'), [
    (None, dict(type='WholeCheckpointHook', interval=1)), (dict(checkpoint=None), None),
    (dict(logger=dict(type='LoggerHook')), dict(type='WholeCheckpointHook', interval=1))])
def test_a_training_without_a_word_about_checkpoints_has_whole_ones(hooks, checkpoint):
    cfg = add_rl_defaults_(Config(dict(model=dict()) | (dict(default_hooks=hooks) if hooks else {})))
    assert cfg.default_hooks.checkpoint == checkpoint


@pytest.mark.parametrize('prefix', ['mmdet.', 'rl_mmdet.engine.hooks.'])
def test_a_hook_that_is_named_with_its_scope_or_module_is_there(prefix):
    cfg = Config(dict(model=dict(), custom_hooks=[dict(type=f'{prefix}FiniteLossHook')]))
    assert [hook.type for hook in add_rl_defaults_(cfg).custom_hooks] == [f'{prefix}FiniteLossHook', 'ResumeHook']


@pytest.mark.parametrize(('given', 'names'), [
    (None, ['rl_mmdet']), ('mine', ['mine', 'rl_mmdet']), (['rl_mmdet.models', 'mine'], ['rl_mmdet.models', 'mine'])])
def test_a_config_imports_what_its_types_are_registered_by(given, names):
    cfg = Config(dict(custom_imports=given and dict(imports=given, allow_failed_imports=False)))
    texts = add_import_(cfg)
    assert cfg.custom_imports == dict(imports=names if texts else given, allow_failed_imports=False)
    assert len(texts) == (given is None or given == 'mine') and add_import_(cfg) == []
