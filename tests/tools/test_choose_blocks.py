"""tools/choose_blocks.py as a user calls it, on a tiny detector."""
import torch

from rl_mmdet.engine import build_model, load_config


def test_prints_every_block_and_the_plan_to_paste_or_one_line(run_tool, tiny_config, randomise_):
    run, config = run_tool('choose_blocks'), tiny_config('atss_r34_fpn_digits.py')
    torch.save(randomise_(build_model(load_config(config))).state_dict(), 'baseline.pth')
    status, captured = run(config, 'baseline.pth', '--p', '0.25', '--batches', '1')
    assert status == 0
    assert captured.out.count('BasicBlock') == 16
    plan = eval(captured.out.strip().splitlines()[-1].removeprefix('plan='))
    cfg = load_config(tiny_config())
    cfg.model.backbone.replacement.plan = plan
    assert build_model(cfg).backbone.replacement_report.replaced == plan['blocks']
    status, captured = run(config, 'nothing.pth', '--p', '0.25')
    assert status == 1
    assert captured.err.strip() == 'error: nothing.pth: there is no such checkpoint file'
