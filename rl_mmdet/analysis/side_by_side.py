"""A baseline and its replaced twin: trained one after the other, evaluated, tabulated side by side."""
import contextlib
import io
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.runner import Runner
from rich.table import Table

from ..engine import UserError, add_rl_defaults_, load_config
from .cost import trainable_parameters
from .picture import Boxes, save_side_by_side
from .step_time import StepTimes, alternate_steps
from .training_run import TrainingCost, run_training

Say = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """One trained detector.

    Args:
        ap, ap50: COCO AP and AP50 on the validation set, 0 to 1.
        parameters: number of trainable parameters.
        cost: of the whole training.
        work_dir: its logs and checkpoints.
    """
    ap: float
    ap50: float
    parameters: int
    cost: TrainingCost
    work_dir: str


@dataclass(frozen=True)
class Comparison:
    """Two outcomes by name, the baseline first, and their step times."""
    outcomes: dict[str, Outcome]
    steps: StepTimes
    picture: str

    def save(self, path: Path) -> None:
        """Write all figures as JSON."""
        path.write_text(json.dumps(asdict(self), indent=2))

    def table(self) -> Table:
        """The figures side by side."""
        table = Table(title='baseline and Replacement Learning, side by side',
                      caption='seconds in all depend on what else ran; seconds per step were taken in turn')
        table.add_column('')
        for name in self.outcomes:
            table.add_column(name, justify='right')
        table.add_column('second / first', justify='right')
        first, second = self.outcomes.values()

        def row(title: str, values: tuple[float, float], form: str, ratio: float | None = None) -> None:
            ratio = values[1] / values[0] if ratio is None and values[0] else ratio
            table.add_row(title, *(format(value, form) for value in values),
                          '' if ratio is None else f'{ratio:.2f}')

        row('AP', (first.ap, second.ap), '.3f')
        row('AP50', (first.ap50, second.ap50), '.3f')
        row('trainable parameters', (first.parameters, second.parameters), ',')
        row('seconds per step (alternating, one process)', tuple(self.steps.seconds.values()), '.3f',
            self.steps.ratio)
        row('peak memory of the training, resident set, MiB',
            (first.cost.peak_rss / 2**20, second.cost.peak_rss / 2**20), '.0f')
        row('seconds in all (training and its evaluations)', (first.cost.seconds, second.cost.seconds), '.0f')
        return table


def compare_side_by_side(configs: Mapping[str, str], train_tool: str, work_dir: Path, say: Say) -> Comparison:
    """Train, evaluate and compare two detectors. Finished and half-finished trainings found are made use of.

    Args:
        configs: two config files by name, the baseline first.
        train_tool: path of tools/train.py.
        work_dir: everything is written below it.
        say: gets one line whenever there is progress.

    Raises:
        UserError: a training failed, or ended without a checkpoint.
    """
    cfgs = {name: add_rl_defaults_(load_config(path, work_dir=str(work_dir / name)))
            for name, path in configs.items()}
    costs = {}
    for name, path in configs.items():
        say(f'{name}: training {path} (its start takes some 20 s, and once the making of the data)')
        command = [train_tool, path, '--work-dir', cfgs[name].work_dir, '--resume']
        costs[name] = run_training(command, Path(cfgs[name].work_dir), lambda line, name=name: say(f'{name}: {line}'))
    outcomes, runners = {}, {}
    for name, cfg in cfgs.items():
        say(f'{name}: evaluating the last checkpoint')
        runner = runners[name] = _load_trained(cfg)
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
            metrics = runner.test()
        outcomes[name] = Outcome(metrics['coco/bbox_mAP'], metrics['coco/bbox_mAP_50'],
                                 trainable_parameters(runner.model), costs[name], cfg.work_dir)
    picture = work_dir / 'detections.png'
    say('drawing detections')
    _draw(picture, runners)
    say('measuring steps, alternating')
    with contextlib.redirect_stdout(io.StringIO()):
        steps = {name: _step(runner) for name, runner in runners.items()}
    return Comparison(outcomes, alternate_steps(steps), str(picture))


def _load_trained(cfg: Config) -> Runner:
    marker = Path(cfg.work_dir, 'last_checkpoint')
    if not marker.is_file():
        raise UserError(f'{cfg.work_dir}: the training left no checkpoint; delete the folder and start again')
    cfg = cfg.copy()
    cfg.load_from, cfg.resume, cfg.log_level = marker.read_text().strip(), False, 'ERROR'
    cfg.work_dir = str(Path(cfg.work_dir, 'evaluation'))
    return Runner.from_cfg(cfg)


def _step(runner: Runner) -> Callable[[], object]:
    """One training step on a fixed real batch."""
    loader = runner.build_dataloader(runner.cfg.train_dataloader, seed=0)
    batch = next(iter(loader))
    wrapper = runner.build_optim_wrapper(runner.cfg.optim_wrapper)
    model = runner.model.train()
    return lambda: model.train_step(batch, wrapper)


@torch.no_grad()
def _draw(path: Path, runners: Mapping[str, Runner], count: int = 4, score: float = 0.4) -> None:
    dataset = next(iter(runners.values())).test_dataloader.dataset
    chosen = sorted(random.Random(0).sample(range(len(dataset)), min(count, len(dataset))))
    classes = dataset.metainfo['classes']
    infos = [dataset.get_data_info(index) for index in chosen]
    truth: list[Boxes] = [[(i['bbox'], classes[i['bbox_label']], None) for i in info['instances']] for info in infos]
    columns = {'ground truth': truth}
    for name, runner in runners.items():
        batch = dict(inputs=[], data_samples=[])
        for index in chosen:
            for key, value in dataset[index].items():
                batch[key].append(value)
        samples = runner.model.eval().test_step(batch)
        columns[name] = [_boxes(sample.pred_instances, classes, score) for sample in samples]
    save_side_by_side(path, [info['img_path'] for info in infos], columns)


def _boxes(instances: object, classes: tuple[str, ...], score: float) -> Boxes:
    found = instances[instances.scores > score].cpu().numpy()
    return [(box, classes[label], float(s)) for box, label, s in zip(found.bboxes, found.labels, found.scores,
                                                                      strict=True)]
