"""The demo: a baseline, RL-v1 and RL-v2 on digit scenes, and in one table what each costs and how well it detects."""
from pathlib import Path

from rich.console import Console
from rich.table import Table

from . import compare
from .savings import own_settings, step_cost, step_ratios

SIZE, BATCH = (640, 640), 2
"""Of the training step that is counted and timed: that of the trainings is too small to tell much."""
RL_V2 = ('RL-v2', 'model.backbone.type=RLResNet', 'model.backbone.replacement.plan.type=EveryKth',
         'model.backbone.replacement.plan.k=2', 'model.backbone.replacement.operator.type=SlimBlock',
         'model.backbone.replacement.gradient.mode=coupled')
NEXT = '''Next, with data of your own:

  rl-mmdet init --coco TRAIN.json VAL.json     # writes two configs
  rl-mmdet blocks CONFIG --savings             # what each setting would save
  rl-mmdet compare BASE CONFIG --work-dir DIR  # trains both, writes a report'''


def run_demo(configs: Path, tools: Path, folder: Path) -> None:
    """Train a baseline and two variants of it in ``folder``, unless that is done, and print what became of them.

    Args:
        configs: folder of the digit scenes' configs.
        tools: folder of the tools.
        folder: where everything is written.
    """
    given = [f'{name}={configs}/faster-rcnn_{part}_fpn_digits.py'
             for name, part in (('baseline', 'r34'), ('RL-v1', 'rl-r34-k2'))]
    options = {'data_root': f'{folder}/digits/', 'train_dataloader.dataset.num_images': 750}
    comparison = compare.plan_comparison(folder, given, compare.parse_variants([RL_V2]), 1, options)
    compare.carry_out(comparison, compare.Tools(tools), folder, show=lambda contents: _show(comparison, contents))


def _show(comparison: compare.Comparison, contents: compare.Contents) -> None:
    """Print the table, what it means, and what to do next."""
    console = Console(width=80, highlight=False)
    table = Table(title='A training step over the baseline\'s, and AP')
    for column in ('', 'parameters\nthat learn', 'work\n(FLOPs)', 'memory kept\nfor backward', 'time on\nthis machine',
                   'AP'):
        table.add_column(column, justify='left' if not column else 'right')
    cfgs = [comparison.config(variant.name) for variant in contents.variants]
    costs, times = [step_cost(cfg, own_settings(cfg), SIZE, BATCH) for cfg in cfgs], step_ratios(cfgs, SIZE, BATCH)
    for variant, cost, time in zip(contents.variants, costs, times, strict=True):
        ap = variant.scores.get(contents.metrics[0], {}).get('ap')
        table.add_row(variant.name, *(f'{own / base:.2f}' for own, base in zip(cost, costs[0], strict=True)),
                      f'{time:.2f}', f'{ap.mean:.3f}' if ap else '')
    console.print(table)
    console.print(
        'RL-v1: every second block takes a mix of its neighbours\' weights. RL-v2: thin convolutions stand there. '
        'The neighbours learn from these places, too (coupled), as training from scratch needs. '
        f'Parameters, work, memory and time are the backbone\'s, with {BATCH} images of {SIZE[0]}×{SIZE[1]}; the '
        'report times the whole detector on the small images that it was trained on. With one seed and digits, '
        f'differences in AP of less than 0.03 say nothing.\n\nReport: {comparison.folder / "report.html"}\n\n{NEXT}',
        markup=False, soft_wrap=False)
