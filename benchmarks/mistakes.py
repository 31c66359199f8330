"""What tools/train.py says about configs with a random mistake in them."""
import json
import multiprocessing
import os
import runpy
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path

import cv2
import numpy as np

import rl_mmdet  # noqa: F401  so that the processes below, which are forks, needn't import it
from command_line import Parser, positive
from mutations import mutation
from rl_mmdet.engine import load_config

TRAIN = Path(__file__).resolve().parents[1] / 'tools' / 'train.py'
SECONDS = 900
"""After so long a training is stopped: compiling it takes minutes."""
CONFIG = '''
_base_ = 'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py'
custom_imports = dict(imports=['rl_mmdet'], allow_failed_imports=False)
model = dict(
    backbone=dict(_delete_=True, type='RLResNet', depth=34, base_channels=8, num_stages=4, frozen_stages=1,
                  norm_eval=True, style='pytorch', out_indices=(0, 1, 2, 3),
                  replacement=dict(plan=dict(type='EveryKth', k=2))),
    neck=dict(in_channels=[8, 16, 32, 64], out_channels=16),
    bbox_head=dict(num_classes=1, in_channels=16, feat_channels=16, stacked_convs=1))
data = dict(data_root='ROOT/', metainfo=dict(classes=('kangaroo',)), data_prefix=dict(img='images/'))
resize = dict(type='Resize', scale=(96, 64), keep_ratio=True)
train_pipeline = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True), resize,
                  dict(type='PackDetInputs')]
test_pipeline = [dict(type='LoadImageFromFile'), resize, dict(type='LoadAnnotations', with_bbox=True),
                 dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))]
workers = dict(num_workers=0, persistent_workers=False)
train_dataloader = dict(batch_size=2, dataset=dict(ann_file='train.json', pipeline=train_pipeline, **data), **workers)
val_dataloader = dict(dataset=dict(ann_file='train.json', pipeline=test_pipeline, **data), **workers)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file='ROOT/train.json')
test_evaluator = val_evaluator
train_cfg = dict(max_epochs=1)
optim_wrapper = dict(optimizer=dict(lr=0.001))
param_scheduler = [dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=2)]
'''


def write_data(root: Path, *names: str) -> None:
    """Write six images with a box each, and annotation files of these names."""
    (root / 'images').mkdir()
    images = [dict(id=index, file_name=f'{index}.jpg', width=96, height=64) for index in range(6)]
    boxes = [dict(id=index + 1, image_id=index, category_id=7, bbox=[8, 8, 60, 40], area=2400, iscrowd=0)
             for index in range(6)]
    for image in images:
        cv2.imwrite(str(root / 'images' / image['file_name']), np.full((64, 96, 3), 99, dtype=np.uint8))
    for name in names:
        (root / name).write_text(json.dumps(dict(
            images=images, annotations=boxes, categories=[dict(id=7, name='kangaroo')])))


def outcome(text: str, root: Path) -> tuple[str, str, str]:
    """What becomes of a training with a config: the kind, the line that tells, and what was logged."""
    folder = Path(tempfile.mkdtemp(dir=root))
    (folder / 'config.py').write_text(text)
    process = multiprocessing.get_context('fork').Process(target=_train, args=(folder,))
    process.start()
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
        return 'no end', f'after {SECONDS} s', ''
    log, lines = (folder / 'stdout').read_text(), (folder / 'stderr').read_text().strip().splitlines()
    written = sorted(path.name for path in folder.iterdir() if path.name not in ('config.py', 'stdout', 'stderr'))
    shutil.rmtree(folder)
    if process.exitcode == 0:
        return 'trains', '', log
    if process.exitcode == 1 and lines and lines[-1].startswith('error: ') and not any('Traceback' in x for x in lines):
        return 'begins, and ends with a line' if written else 'a line', lines[-1].removeprefix('error: '), log
    return 'traceback', lines[-1] if lines else f'exit status {process.exitcode}', log


def _train(folder: Path) -> None:
    """Run the tool in ``folder`` with its output in files."""
    os.chdir(folder)
    for stream, name in ((sys.stdout, 'stdout'), (sys.stderr, 'stderr')):
        os.dup2(os.open(name, os.O_CREAT | os.O_WRONLY), stream.fileno())
    sys.argv = [str(TRAIN), 'config.py']
    try:
        runpy.run_path(str(TRAIN), run_name='__main__')
    except SystemExit as stop:
        status = stop.code or 0
    except BaseException:
        traceback.print_exc()
        status = 2
    else:
        status = 0
    sys.stderr.flush()
    os._exit(int(status))


def _shorten(text: str, most: int) -> str:
    """A text for a table's cell."""
    text = ' '.join(text.split()).replace('|', '\\|').replace('`', "'").replace('<', '&lt;')
    return text if len(text) <= most else text[:most] + ' …'


def mutated(count: int, root: Path) -> str:
    """The result page of so many random mistakes, each in a whole config."""
    settings = load_config(str(root / 'base.py'), None, 'work').to_dict()
    counts, rows = Counter(), []
    for seed in range(count):
        text, change, wrong = mutation(settings, seed)
        kind, line, log = outcome(text, root)
        if kind == 'trains' and wrong and wrong not in log:
            kind = 'trains, and a misspelt key is not told'
        counts[kind] += 1
        if kind not in ('trains', 'a line'):
            rows.append(f'| `{_shorten(change, 150)}` | {kind}{": " * bool(line)}{_shorten(line, 220)} |')
        print(seed, change, kind, line, sep=' | ', flush=True)
    return '\n'.join([
        '# Random mistakes in a config', '',
        f'{count} whole configs of a small RetinaNet with an `RLResNet`, six images, one epoch, each with one random '
        'mistake: a key misspelt or left out, a letter wrong in a text, a value of another kind. What `tools/train.py` '
        'does. *Trains*: to the end; a misspelt key is told in the log or is an error. *A line*: the only one, and '
        'nothing was written. *Begins*: it trains until a loss is no number.', '', '| | configs |', '|---|---:|',
        *(f'| {kind} | {number} |' for kind, number in counts.most_common()), '',
        *(['| mistake | what happens |', '|---|---|', *rows, ''] if rows else []),
        f'Made by `python benchmarks/mistakes.py --mutations {count} --out docs/results/mutations.md`.', ''])


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument('--mutations', type=positive, default=1000, help='so many mistakes (default: %(default)s)')
    parser.add_argument('--out', type=Path, help='write the result page')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_data(root, 'train.json')
        (root / 'base.py').write_text(CONFIG.replace('ROOT', folder))
        text = mutated(args.mutations, root)
    if args.out:
        args.out.write_text(text)


if __name__ == '__main__':
    main()
