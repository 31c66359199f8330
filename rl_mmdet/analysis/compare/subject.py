"""A detector with all that it takes to measure it: its optimizer, and real batches."""
import copy
import math
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.optim import AmpOptimWrapper, OptimWrapper, build_optim_wrapper
from mmengine.runner import Runner, set_random_seed
from torch import Tensor, nn

from ...engine import UserError, build_model, load_checkpoint_, take_found_
from ...engine.config import for_one_process, type_name, without_workers
from ...engine.preflight.guard import quiet
from ...engine.preflight.model import pretrained_inits
from ...engine.search import searched_module
from ...replacement import materialize, set_step_
from ...replacement.flops import count_flops
from ...replacement.saved_bytes import saved_bytes
from ..cost import mean_over_steps, peak_memory, trainable_parameters

PEAK_OF = {'cuda': "torch's CUDA allocator", 'cpu': "torch's CPU allocator"}
AMP = ('loss_scale', 'dtype', 'use_fsdp')
"""Settings of an optimizer wrapper that only one for mixed precision has."""
SCALING = 20
"""Most steps that a dynamic loss scale may need to come down to where the gradients are finite."""


class Subject:
    """One detector with its optimizer and a real batch for training and for prediction.

    Args:
        cfg, checkpoint, allow_pickle: see :func:`measure_costs`.
        loaders: where the batches come from.
    """

    def __init__(self, cfg: Config, checkpoint: Path | None, loaders: 'Loaders', allow_pickle: bool) -> None:
        self.device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
        self.model = _build(cfg, checkpoint, allow_pickle).to(self.device)
        self.loaded = [buffer.clone() for buffer in self.model.buffers()]
        self.optim = self._build_optim(cfg)
        self.steps = 0
        self.training_batch = loaders.first_batch(cfg, 'train')
        self.image = loaders.first_batch(cfg, 'val', batch_size=1, batch_sampler=None)
        self.augments = bool(getattr(self.model.data_preprocessor, 'batch_augments', None))

    def _build_optim(self, cfg: Config) -> OptimWrapper:
        settings = dict(copy.deepcopy(cfg.optim_wrapper), accumulative_counts=1)
        if type_name(settings) == 'AmpOptimWrapper' and self.device.type == 'cpu':
            settings = {key: value for key, value in settings.items() if key not in AMP} | dict(type='OptimWrapper')
        wrapper = build_optim_wrapper(self.model, settings)
        for group in wrapper.optimizer.param_groups:
            group['lr'] = 0.
        return wrapper

    def _batch(self) -> dict[str, Any]:
        """The training batch; a new one each time for preprocessors that change boxes in place."""
        return copy.deepcopy(self.training_batch) if self.augments else self.training_batch

    def step(self) -> dict[str, Tensor]:
        """The next training step, with the same batch at every call; replaced blocks take turns in learning."""
        set_step_(self.model, self.steps)
        self.steps += 1
        return self._step()

    def _step(self) -> dict[str, Tensor]:
        set_random_seed(0)
        return self.model.train_step(self._batch(), self.optim)

    def forward(self) -> dict[str, Any]:
        """The first part of :meth:`step`, up to the losses."""
        set_random_seed(0)
        with self.optim.optim_context(self.model):
            return self.model(**self.model.data_preprocessor(self._batch(), True), mode='loss')

    def counts(self) -> dict[str, Any]:
        """What doesn't depend on the machine's speed, by the fields of :class:`Cost`."""
        self.model.train()
        self._make_first_steps()
        step_flops = mean_over_steps(self.model, lambda: count_flops(self._step))
        set_step_(self.model, 0)  # each block's memory is the same in all steps but one
        inputs = self.model.data_preprocessor(self._batch(), True)['inputs']
        return dict(
            trainable=trainable_parameters(self.model),
            step_flops=step_flops,
            saved_bytes=saved_bytes(self.model, self.forward),
            peak_bytes=peak_memory(self._step, self.device),
            peak_of=PEAK_OF[self.device.type],
            batch=len(inputs),
            image_size=tuple(inputs.shape[-2:]))

    def _make_first_steps(self) -> None:
        """The first step is different: it makes the optimizer's state. A loss scale may be too high for several."""
        for _ in range(SCALING if isinstance(self.optim, AmpOptimWrapper) else 1):
            for name, value in self.step().items():
                if not math.isfinite(value := torch.as_tensor(value).detach().item()):
                    raise UserError(f'a training step\'s {name} is {value}')
            if self.optim.optimizer.state:
                return

    def predictor(self) -> nn.Module:
        """The model as it was loaded, materialized and ready to predict."""
        with torch.no_grad():
            for buffer, loaded in zip(self.model.buffers(), self.loaded, strict=True):
                buffer.copy_(loaded)
        return materialize(self.model.eval())

    @torch.no_grad()
    def predict(self, model: nn.Module) -> None:
        model.test_step(self.image)


def _build(cfg: Config, checkpoint: Path | None, allow_pickle: bool) -> nn.Module:
    """The detector with the checkpoint's weights, or as it is before training, but for pretrained weights."""
    set_random_seed(0)
    cfg = Config(dict(default_scope=cfg.get('default_scope'), model=for_one_process(cfg.model)))
    take_found_(cfg, checkpoint and str(checkpoint), allow_pickle)
    model = build_model(cfg, allow_pickle)
    if searched_module(model) is not None:
        raise UserError('what it costs is not known before its search has found a plan; train it first')
    for name, _ in list(pretrained_inits(model)):
        model.get_submodule(name).init_cfg = None
    with quiet():
        model.init_weights()
    if checkpoint is not None:
        load_checkpoint_(model, str(checkpoint), allow_pickle=allow_pickle)
    return model


class Loaders:
    """The first batches, kept: most variants have the baseline's data, and a big dataset takes long to open."""

    def __init__(self) -> None:
        self.known: list[tuple[dict, dict[str, Any]]] = []

    def first_batch(self, cfg: Config, phase: str, **changes: Any) -> dict[str, Any]:
        """A batch of one's own, loaded with seed 0 and in this process."""
        settings = without_workers(cfg[f'{phase}_dataloader']) | changes
        if not any(known == settings for known, _ in self.known):
            set_random_seed(0)
            with quiet():
                self.known.append((settings, next(iter(Runner.build_dataloader(settings, seed=0)))))
        return copy.deepcopy(next(batch for known, batch in self.known if known == settings))
