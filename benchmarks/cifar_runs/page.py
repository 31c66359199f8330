"""The page of results."""
import math
import warnings
from collections.abc import Callable, Sequence
from statistics import mean, median, stdev
from typing import Any

from scipy import stats

from .networks import ARMS, AS_CHEAP_AS, NETWORKS

Rows = list[dict[str, Any]]
LEVEL = 0.95
PLAIN = {'shorter': f'nothing; as many steps as cost what `{AS_CHEAP_AS["shorter"]}` costs',
         'narrower': f'nothing; stages of a width that costs nearly what `{AS_CHEAP_AS["narrower"]}` costs'}


def page(results: dict[str, Any]) -> str:
    """All results so far, a table for each network."""
    settings, arms = results['settings'], {row['arm'] for row in results['rows']}
    lines = [f'# CIFAR-10: what replaced blocks cost in accuracy, width {settings["width"]}, k = {settings["k"]}', '',
             *(f'Made by `{command}`.' for command in results['commands']),
             f'torch {results["torch"]}, {results["device"]}.', '',
             f'{settings["epochs"]} epochs of {settings["train_images"]:,} images in batches of {settings["batch"]}, '
             f'accuracy after the last epoch on {settings["test_images"]:,} images; width {settings["width"]}. The '
             'images are stored as JPEG files, so accuracies aren\'t comparable with published ones; between arms they '
             'are. All arms of a network and a seed start from the same weights, as far as they have them, and see the '
             'same batches, crops and flips. ResNets learn by SGD, the ViT by AdamW, all with one rise and fall of '
             'the learning rate, smoothed labels and, on a GPU, bfloat16 autocast. With SGD, the pairs (a, b) '
             f'have {settings["pair_rate"]:g} times that rate.', '',
             f'Blocks are replaced by `EveryKth(k={settings["k"]})` and:', '',
             *(f'- {arm}: `{replacement}`' for arm, replacement in ARMS.items() if replacement and arm in arms),
             *(f'- {arm}: {text}' for arm, text in PLAIN.items() if arm in arms),
             *(f'- {arm}: what this version doesn\'t have any more' for arm in _in_order(arms) if arm not in ARMS), '',
             'FLOPs are those of an image forward and backward, the mean over the steps of a training; the cost is '
             'FLOPs times epochs, over the baseline\'s. ± is the '
             'standard deviation over seeds; behind differences stands Welch\'s 95 % interval over seeds. Peak '
             'memory, on a GPU, is what a training needs beyond the images. '
             + ('The time of an epoch is the median over epochs and seeds, the first epoch left out, over the '
                'baseline\'s.' if settings['jobs'] == 1 else
                f'Times are left out: {settings["jobs"]} trainings ran side by side on the device.'), '']
    for network in NETWORKS:
        rows = [row for row in results['rows'] if row['network'] == network]
        if rows:
            lines += [f'## {network}', '', *_table([dict(epochs=settings['epochs']) | row for row in rows
                                                    if 'error' not in row], settings['jobs'] == 1)]
    failed = [row for row in results['rows'] if 'error' in row]
    if failed:
        lines += ['## Not finished', '',
                  *(f'- {row["network"]}, {row["arm"]}, seed {row["seed"]}: {row["error"]}' for row in failed)]
    return '\n'.join(lines).rstrip() + '\n'


def _table(rows: Rows, timed: bool) -> list[str]:
    """The lines of a network's table, of the trainings that were finished, and which blocks are replaced."""
    if not rows:
        return ['No training is finished.', '']
    by_arm = {arm: [row for row in rows if row['arm'] == arm] for arm in _in_order({row['arm'] for row in rows})}
    baseline = by_arm.get('baseline', [])
    columns: dict[str, Callable[[Rows], str]] = {
        'seeds': lambda found: str(len(found)),
        'trainable parameters, M': lambda found: f'{found[0]["parameters"] / 1e6:.3f}',
        'epochs': lambda found: f'{found[0]["epochs"]:.3g}',
        'MFLOPs of an image': lambda found: f'{found[0]["flops"] / 1e6:.1f}',
        **({'cost': lambda found: f'{_cost(found) / _cost(baseline):.2f}'} if baseline else {}),
        'accuracy, %': lambda found: _spread(_percent(found)),
        'difference': lambda found: '' if found is baseline else _difference(_percent(baseline), _percent(found)),
    }
    if timed and baseline:
        columns['time of an epoch'] = lambda found: f'{_seconds(found) / _seconds(baseline):.2f}'
    if any(row['peak'] for row in rows):
        columns['peak memory, MB'] = lambda found: f'{median(row["peak"] for row in found) / 1e6:.0f}'
    replaced = next((row['replaced'] for row in rows if row['replaced']), [])
    return [' | '.join(['| arm', *columns]) + ' |', '| :--- |' + ' ---: |' * len(columns),
            *(' | '.join([f'| {arm}', *(cell(found) for cell in columns.values())]) + ' |'
              for arm, found in by_arm.items()), '',
            *([f'Replaced: {", ".join(replaced)}.', ''] if replaced else [])]


def _in_order(arms: set[str]) -> list[str]:
    """As in ARMS, and those that aren't there at the end."""
    return [*(arm for arm in ARMS if arm in arms), *sorted(arms - set(ARMS))]


def _cost(rows: Rows) -> float:
    return rows[0]['flops'] * rows[0]['epochs']


def _percent(rows: Rows) -> list[float]:
    return [100 * row['accuracy'] for row in rows]


def _seconds(rows: Rows) -> float:
    """Of an epoch."""
    return median(seconds for row in rows for seconds in row['seconds'][1:] or row['seconds'])


def _spread(values: Sequence[float]) -> str:
    return f'{mean(values):.2f}' + (f' ± {stdev(values):.2f}' if len(values) > 1 else '')


def _difference(reference: Sequence[float], other: Sequence[float]) -> str:
    """The difference of two means, with its interval where both sides have several values."""
    if not reference:
        return '–'
    said = f'{mean(other) - mean(reference):+.2f}'
    if min(len(reference), len(other)) < 2:
        return said
    with warnings.catch_warnings():  # scipy's, about values that are all the same
        warnings.simplefilter('ignore', RuntimeWarning)
        interval = stats.ttest_ind(other, reference, equal_var=False).confidence_interval(LEVEL)
    return said if math.isnan(interval.low) else f'{said} ({interval.low:+.2f} to {interval.high:+.2f})'
