"""benchmarks/aquarium.py, bccd.py, fit_limits.py: every row of their tables is a backbone that trains."""
import argparse
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config, DictAction

from rl_mmdet.engine import build_model, load_config

ROOT = Path(__file__).resolve().parents[2]
with pytest.MonkeyPatch.context() as patched:
    patched.setattr(sys, 'path', [str(ROOT / 'benchmarks'), *sys.path])
    import aquarium
    import bccd
    import fit_limits


@pytest.mark.parametrize(('script', 'name'), [
    pytest.param(script, name, marks=[] if name in ('light-fit-fade', 'slim') else pytest.mark.slow)
    for script in (aquarium, bccd) for name in script.VARIANTS])
def test_a_variants_backbone_trains(script, name):
    reader = argparse.ArgumentParser()
    reader.add_argument('--cfg-options', nargs='*', action=DictAction)
    options = reader.parse_args(['--cfg-options', *script.VARIANTS[name]]).cfg_options
    cfg = load_config(str(ROOT / script.CONFIG), options)
    cfg.model.backbone.init_cfg = None
    backbone = build_model(Config(dict(model=cfg.model.backbone, default_scope='mmdet')))
    backbone.train()
    sum(out.sum() for out in backbone(torch.zeros(2, 3, 32, 32))).backward()


@pytest.mark.slow
@pytest.mark.parametrize(('operator', 'change'), fit_limits.trials())
def test_a_rows_fit_can_begin(operator, change):
    assert fit_limits.replaced_backbone(operator, change).replacement_report.replaced


@pytest.mark.parametrize(('script', 'missing'), [('aquarium.py', '--data, --work-dir, --weights'),
                                                 ('bccd.py', '--data, --work-dir'),
                                                 ('fit_limits.py', '--data, --weights, --out')])
def test_what_is_missing_is_said_in_a_line(run_script, script, missing):
    status, captured = run_script(ROOT / 'benchmarks' / script)
    assert (status, captured.err.count('\n')) == (2, 1)
    assert captured.err.startswith(f'error: the following arguments are required: {missing}')
