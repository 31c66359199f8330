"""The optimizer-wrapper constructor for models with computing layers."""
from typing import Any

from mmdet.registry import OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.optim import DefaultOptimWrapperConstructor
from torch import nn

from ..replacement import computing_layers


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
