"""One training: a network with one arm's replacement, from one seed, to the accuracy after its last epoch."""
import copy
import math
import time
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rl_mmdet.replacement import computing_layers, set_step_
from rl_mmdet.replacement.flops import count_flops

from .images import Data, TrainingImages, normalised
from .networks import AS_CHEAP_AS, build

TEST_BATCH = 1000


@dataclass(frozen=True)
class Run:
    """Which training."""
    network: str
    arm: str
    seed: int


@dataclass(frozen=True)
class Recipe:
    """What all trainings of a page have in common.

    Args:
        device: cpu or cuda.
        epochs: of a training; the arm ``shorter`` has fewer.
        batch: images of a step.
        width: of the networks; see :data:`~cifar_runs.networks.NETWORKS`. The arm ``narrower`` has a smaller one.
        k: of the plan: every k-th block is replaced.
        pair_rate: with SGD, the learning rate of the pairs (a, b) over that of all else. SGD's rate fits weights; a
            pair multiplies thousands of them, and its gradient is a sum over all.
    """
    device: str
    epochs: int
    batch: int
    width: int
    k: int = 4
    pair_rate: float = 0.01


def train(run: Run, recipe: Recipe, data: Data, deadline: float) -> dict[str, Any]:
    """Train, and test after the last epoch.

    Args:
        run, recipe: what and how.
        data: in the memory of the host.
        deadline: by :func:`time.time`; a training that will not be ready by then stops as soon as this is seen.

    Returns:
        A row of the results: the run, its ``epochs``, ``accuracy`` and ``loss`` at the end, ``parameters`` that learn,
        ``flops`` of an image forward and backward, the ``replaced`` blocks, ``seconds`` of each epoch, and ``peak``,
        the bytes of the GPU that were allocated at the peak of the last epoch beyond the images, None on a CPU.

    Raises:
        TimeoutError: it will not be ready by the deadline.
        ArithmeticError: the loss isn't finite.
    """
    if recipe.device == 'cuda':
        torch.backends.cudnn.benchmark = True
    images = TrainingImages(data, recipe.batch, recipe.device, run.seed)
    there = torch.cuda.memory_allocated() if recipe.device == 'cuda' else 0
    model, replaced = build(run.network, run.arm, run.seed, _width(run, recipe), recipe.k)
    flops, steps = flops_of_an_image(model), recipe.epochs * len(images)
    if run.arm == 'shorter':
        steps = max(1, round(steps * _flops(run, recipe, AS_CHEAP_AS[run.arm]) / flops))
    model.to(recipe.device, memory_format=torch.channels_last)
    step = Step(model, recipe, steps)
    seconds: list[float] = []
    begun: list[float] = []
    epochs = math.ceil(steps / len(images))
    for epoch in range(epochs):
        begun.append(time.time())
        _check_time(begun, epochs, deadline)
        if recipe.device == 'cuda':
            torch.cuda.reset_peak_memory_stats()
        begin = _clock(recipe.device)
        losses = [step(*batch, deadline) for batch in islice(images, steps - step.steps)]
        loss = torch.stack(losses).mean().item()
        seconds.append(_clock(recipe.device) - begin)
        if not loss < float('inf'):
            raise ArithmeticError(f'the loss of epoch {epoch + 1} is {loss}')
    peak = torch.cuda.max_memory_allocated() - there if recipe.device == 'cuda' else None
    learning = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return dict(asdict(run), epochs=steps / len(images), accuracy=accuracy(step, data, recipe.device), loss=loss,
                parameters=learning, flops=flops, replaced=replaced, seconds=seconds, peak=peak)


class Step:
    """Forward, loss, backward and the optimizer's step; the learning rate rises and falls once (one-cycle).

    ResNets learn by SGD with Nesterov's momentum, transformers by AdamW; norms, biases and what fusions learn take no
    weight decay. Labels are smoothed. On a GPU the forward pass runs under autocast to bfloat16.

    Args:
        model: on the device.
        recipe: see :class:`Recipe`.
        total: steps of the training.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, total: int) -> None:
        self.model = model
        self.autocast = torch.autocast(recipe.device, torch.bfloat16, enabled=recipe.device == 'cuda')
        self.steps = 0
        pairs = [layer.coeff for layer in computing_layers(model).values() if 'coeff' in layer.own_parameters()]
        paired = set(pairs)
        rest = [parameter for parameter in model.parameters() if parameter not in paired]
        decayed = [parameter for parameter in rest if parameter.ndim > 1]
        others = [parameter for parameter in rest if parameter.ndim <= 1]
        if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
            rate, decay = 0.4 * recipe.batch / 512, 5e-4
            self.optimizer: torch.optim.Optimizer = torch.optim.SGD(decayed, rate, 0.9, nesterov=True,
                                                                    weight_decay=decay)
        else:
            rate, decay = 1e-3 * (recipe.batch / 512) ** 0.5, 0.05
            self.optimizer = torch.optim.AdamW(decayed, rate, weight_decay=decay)
        self.optimizer.add_param_group(dict(params=others, weight_decay=0.))
        self.optimizer.add_param_group(dict(params=pairs, weight_decay=0.))
        of_pairs = rate * recipe.pair_rate if isinstance(self.optimizer, torch.optim.SGD) else rate
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, [rate, rate, of_pairs], total, pct_start=0.2, cycle_momentum=False)

    def __call__(self, images: Tensor, labels: Tensor, deadline: float) -> Tensor:
        """One step; returns the loss."""
        if time.time() > deadline:
            raise TimeoutError('out of time')
        set_step_(self.model, self.steps)
        self.steps += 1
        loss = F.cross_entropy(self.logits(images), labels, label_smoothing=0.1)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        return loss.detach()

    def logits(self, images: Tensor) -> Tensor:
        with self.autocast:
            return self.model(images).float()


@torch.no_grad()
def accuracy(step: Step, data: Data, device: str) -> float:
    """The part of the test images whose class is the likeliest; the model is in eval mode afterwards."""
    step.model.eval()
    right = torch.zeros((), device=device)
    for images, labels in zip(*(data[f'test_{part}'].split(TEST_BATCH) for part in ('images', 'labels')), strict=True):
        right += (step.logits(normalised(images.to(device))).argmax(1) == labels.to(device)).sum()
    return right.item() / len(data['test_labels'])


def flops_of_an_image(model: nn.Module) -> float:
    """Forward and backward, the mean over the steps of a training: replaced blocks learn in one of several."""
    model = copy.deepcopy(model)
    images = torch.zeros(2, 3, 32, 32)  # BatchNorm needs two
    every = max((layer.gradient.every for layer in computing_layers(model).values()), default=1)

    def count(step: int) -> int:
        set_step_(model, step, staggered=False)
        return count_flops(lambda: model(images).sum().backward())

    learning = count(0)
    between = count(1) if every > 1 else 0
    return (learning + (every - 1) * between) / every / len(images)


def _width(run: Run, recipe: Recipe) -> int:
    """Of the network: the recipe's, or one whose cost comes nearest to that of another arm."""
    if run.arm != 'narrower':
        return recipe.width
    wanted = _flops(run, recipe, AS_CHEAP_AS[run.arm])
    return min(range(1, recipe.width + 1), key=lambda width: abs(_flops(run, recipe, 'baseline', width) - wanted))


def _flops(run: Run, recipe: Recipe, arm: str, width: int | None = None) -> float:
    """Of an image forward and backward, in the run's network with another arm."""
    return flops_of_an_image(build(run.network, arm, run.seed, width or recipe.width, recipe.k)[0])


def _check_time(begun: list[float], epochs: int, deadline: float) -> None:
    """Raise a TimeoutError if the epochs to come, of which the last of ``begun`` is one, will take too long.

    The first epoch isn't looked at: much of it is start.
    """
    done = len(begun) - 1
    if done > 1 and begun[-1] + (epochs - done) * (begun[-1] - begun[1]) / (done - 1) > deadline:
        raise TimeoutError(f'no time for more than {done} of {epochs} epochs')


def _clock(device: str) -> float:
    """Seconds; on a CPU those that this process has had."""
    if device == 'cpu':
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()
