"""The optimizer-wrapper constructors for models with computing layers."""
from typing import Any

from mmdet.registry import OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.optim import DefaultOptimWrapperConstructor
from torch import nn

from ..replacement import computing_layers, find_chains
from ..replacement.report import describe_blocks


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class RLOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """MMEngine's default constructor, but without weight decay on the fusions' parameters.

    Decay would pull a replaced block's weights to zero (method.md, RL-v1). Everything else, ``paramwise_cfg``
    included, is as in :class:`mmengine.optim.DefaultOptimWrapperConstructor`.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        super().__init__(optim_wrapper_cfg, paramwise_cfg)
        self._one_setting = not self.paramwise_cfg
        if self._one_setting:
            self.paramwise_cfg = dict(custom_keys={})  # asks for nothing, but leads MMEngine through add_params

    def add_params(self, params: list[dict], module: nn.Module, prefix: str = '', **kwargs: Any) -> None:
        if prefix:
            super().add_params(params, module, prefix=prefix, **kwargs)
            return
        fusion = [p for layer in computing_layers(module).values() for p in layer.parameters(recurse=False)]
        own = {id(p) for p in fusion}
        if self._one_setting:
            params.append(dict(params=[p for p in module.parameters() if id(p) not in own]))
            params.extend([dict(params=fusion, weight_decay=0.)] if fusion else [])
            return
        super().add_params(params, module, **kwargs)
        for group in params:
            if id(group['params'][0]) in own:
                group['weight_decay'] = 0.


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class RLLayerDecayOptimWrapperConstructor(RLOptimWrapperConstructor):
    r"""Learning rates that fall layer by layer from a backbone's last block to its stem.

    .. math:: lr_l = lr \cdot r^{\,L + 1 - l}

    for block :math:`l = 1 ... L` of the backbone and its stem, :math:`l = 0`, with the rate :math:`r`; neck and
    heads learn with :math:`lr`. Blocks are counted in the order of the backbone's chains, a replaced one like any
    other: its fusion's parameters learn with the rate of the place where the block stood, and the kept blocks around
    it keep the rate that they have in the baseline. What stands between two blocks counts as the one before it.

    Args:
        optim_wrapper_cfg: the optimizer must state its ``lr``.
        paramwise_cfg: ``layer_decay_rate``, :math:`r`, above 0 and at most 1; everything else as in
            :class:`mmengine.optim.DefaultOptimWrapperConstructor`.

    Raises:
        ValueError: no such rate, no ``lr``, or a model without a backbone that has chains of blocks.

    Source: BEiT, arXiv 2106.08254; for detection ViTDet, arXiv 2203.16527.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        paramwise_cfg = dict(paramwise_cfg or {})
        self.rate = paramwise_cfg.pop('layer_decay_rate', None)
        if isinstance(self.rate, bool) or not isinstance(self.rate, (int, float)) or not 0 < self.rate <= 1:
            raise ValueError('RLLayerDecayOptimWrapperConstructor: paramwise_cfg.layer_decay_rate must be a number '
                             f'above 0 and at most 1, got {self.rate!r}')
        super().__init__(optim_wrapper_cfg, paramwise_cfg)
        if self.base_lr is None:
            raise ValueError('RLLayerDecayOptimWrapperConstructor: optim_wrapper.optimizer.lr is missing')
        self._one_setting = False
        self.paramwise_cfg = self.paramwise_cfg or dict(custom_keys={})

    def add_params(self, params: list[dict], module: nn.Module, prefix: str = '', **kwargs: Any) -> None:
        super().add_params(params, module, prefix=prefix, **kwargs)
        if prefix:
            return
        depths = _depths(module)
        for group in params:
            depth = depths.get(id(group['params'][0]), 0)
            group['lr'] = group.get('lr', self.base_lr) * self.rate ** depth


def _depths(model: nn.Module) -> dict[int, int]:
    """How many layers lie above each parameter of the backbones, by the parameter's id; 1 for the last block."""
    backbones = {name: module for name, module in model.named_modules() if name.rpartition('.')[2] == 'backbone'}
    depths: dict[int, int] = {}
    for backbone in backbones.values():
        report = getattr(backbone, 'replacement_report', None)
        rows = report.rows if report else describe_blocks(find_chains(backbone), {})
        places = {row.name: place for place, row in enumerate(rows, start=1)}
        place = 0
        for name, parameter in backbone.named_parameters() if places else ():
            place = next((places[block] for block in _ancestors(name) if block in places), place)
            depths[id(parameter)] = len(places) + 1 - place
    if not depths:
        raise ValueError('RLLayerDecayOptimWrapperConstructor: the model has no backbone with chains of blocks')
    return depths


def _ancestors(name: str) -> list[str]:
    """The names of the modules that a parameter lies in."""
    parts = name.split('.')
    return ['.'.join(parts[:length]) for length in range(1, len(parts))]
