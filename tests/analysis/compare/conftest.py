"""A small comparison, and stand-ins for the tools that train and test."""
import textwrap

import pytest

from rl_mmdet.analysis.compare import Tools, plan_comparison
from rl_mmdet.analysis.compare.runs import train_all

TRAIN = """
    import os, sys, time
    work = sys.argv[sys.argv.index('--work-dir') + 1]
    os.makedirs(work, exist_ok=True)
    open(os.path.join(work, 'calls.txt'), 'a').write(' '.join(sys.argv[1:]) + '\\n')
    print('x - INFO - Epoch(train)  [1][ 1/2]  lr: 1 eta: 0:01:00  time: 1 loss: 1.5', flush=True)
    time.sleep(float(os.environ.get('SLOW', 0)))
    if 'twin' in work and 'seed_1' in work and not os.path.exists('mended'):
        sys.exit('error: out of luck')
    open(os.path.join(work, 'epoch_1.pth'), 'w').write('weights')
    open(os.path.join(work, 'last_checkpoint'), 'w').write(os.path.join(work, 'epoch_1.pth'))
"""
TEST = """
    import json, re, sys
    text = open(sys.argv[1]).read()
    text = text[text.index('test_evaluator'):]
    annotations, prefix = (re.search(name + r"=\\s*'([^']*)'", text)[1] for name in ('ann_file', 'outfile_prefix'))
    truth = json.load(open(annotations))
    assert open(sys.argv[2]).read() == 'weights'
    found = [dict(image_id=a['image_id'], category_id=a['category_id'], bbox=a['bbox'], score=.9)
             for a in truth['annotations']]
    if 'worse' in prefix:  # finds fewer, by the seed
        found = found[1 + 2 * ('seed_1' in prefix):]
    json.dump([] if 'twin' in prefix else found, open(prefix + '.bbox.json', 'w'))
"""
SKIP = {'model.backbone.type': 'RLResNet', 'model.backbone.replacement.plan.type': 'EveryKth',
        'model.backbone.replacement.plan.k': 2, 'model.backbone.replacement.operator.type': 'Skip'}


@pytest.fixture(scope='session')
def write_tools():
    """Write the stand-ins into a folder."""
    def write(folder):
        for name, text in (('train', TRAIN), ('test', TEST)):
            (folder / f'{name}.py').write_text(textwrap.dedent(text))
        return Tools(folder)
    return write


@pytest.fixture
def tools(write_tools, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_tools(tmp_path)


@pytest.fixture
def comparison(tiny_config, tmp_path):
    configs = [f'base={tiny_config("atss_r34_fpn_digits.py")}', f'twin={tiny_config()}']
    return plan_comparison(tmp_path / 'work', configs, seeds=2)


@pytest.fixture(scope='session')
def finished(write_tiny_config, write_tools, tmp_path_factory):
    """A comparison to be read only, and what was said: one variant finds nothing and fails once, one finds a part."""
    folder, said = tmp_path_factory.mktemp('comparison'), []
    configs = [f'base={write_tiny_config(folder, "atss_r34_fpn_digits.py")}', f'twin={write_tiny_config(folder)}']
    comparison = plan_comparison(folder / 'work', configs, {'worse': SKIP}, seeds=2, command='typed')
    train_all(comparison, write_tools(folder), said.append)
    return comparison, said
