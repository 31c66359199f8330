"""The optimizer-wrapper constructors for models with computing layers."""
from mmdet.engine.optimizers import LearningRateDecayOptimizerConstructor
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from ..replacement import computing_layers, find_chains
from ..replacement.checks import check_number
from ..replacement.report import describe_blocks


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class RLOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """MMEngine's default constructor, but without weight decay on the fusions' parameters.

    Decay would pull a replaced block's weights to zero. Everything else, ``paramwise_cfg`` included, is as in
    :class:`mmengine.optim.DefaultOptimWrapperConstructor`.
    """

    def __call__(self, model: nn.Module) -> OptimWrapper:
        wrapper = super().__call__(model)
        layers = computing_layers(model).values()
        fusions = {id(p) for layer in layers for p in layer.own_parameters().values()}
        for group in list(wrapper.optimizer.param_groups):
            undecayed = [p for p in group['params'] if id(p) in fusions]
            if len(undecayed) == len(group['params']):
                group['weight_decay'] = 0.
            elif undecayed:
                group['params'] = [p for p in group['params'] if id(p) not in fusions]
                wrapper.optimizer.add_param_group({**group, 'params': undecayed, 'weight_decay': 0.})
        for layer in layers:
            layer.undecayed = True
        return wrapper


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class RLLearningRateDecayOptimizerConstructor(RLOptimWrapperConstructor, LearningRateDecayOptimizerConstructor):
    """MMDetection's layer decay for ConvNeXt, but without weight decay on the fusions' parameters.

    MMDetection's class takes those of a fusion that has several pairs for weights, which are decayed.
    """


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class RLLayerDecayOptimWrapperConstructor(RLOptimWrapperConstructor):
    r"""Learning rates that fall layer by layer from a backbone's last block to its stem.

    .. math:: lr_l = lr \cdot r^{\,L + 1 - l}

    for block :math:`l = 1 ... L` of the backbone and its stem, :math:`l = 0`, with the rate :math:`r`; neck and
    heads learn with :math:`lr`. Blocks are counted in the order of the backbone's chains, a replaced one like any
    other: its fusion's parameters learn with the rate of the place where the block stood, and the kept blocks around
    it keep the rate that they have in the baseline. What stands between two blocks counts as the one before it.

    Args:
        optim_wrapper_cfg: settings of the optimizer and its wrapper.
        paramwise_cfg: ``layer_decay_rate``, :math:`r`, above 0 and at most 1; everything else as in
            :class:`mmengine.optim.DefaultOptimWrapperConstructor`.

    Raises:
        ValueError: no such rate, or a model without a backbone that has chains of blocks.

    Source: BEiT, arXiv 2106.08254; for detection ViTDet, arXiv 2203.16527.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        paramwise_cfg = dict(paramwise_cfg or {})
        self.rate = check_number('RLLayerDecayOptimWrapperConstructor: paramwise_cfg.layer_decay_rate',
                                 paramwise_cfg.pop('layer_decay_rate', None), above=0, most=1)
        paramwise_cfg.setdefault('custom_keys', {})  # with it, MMEngine makes one group of each parameter
        super().__init__(optim_wrapper_cfg, paramwise_cfg)

    def __call__(self, model: nn.Module) -> OptimWrapper:
        depths = _depths(model)
        wrapper = super().__call__(model)
        for group in wrapper.optimizer.param_groups:
            group['lr'] *= self.rate ** depths.get(id(group['params'][0]), 0)
        return wrapper


def _depths(model: nn.Module) -> dict[int, int]:
    """How many layers lie above each parameter of the backbones, by the parameter's id; 1 for the last block."""
    depths: dict[int, int] = {}
    for backbone in (module for name, module in model.named_modules() if name.rpartition('.')[2] == 'backbone'):
        report = getattr(backbone, 'replacement_report', None)
        rows = report.rows if report else describe_blocks(find_chains(backbone), {})
        place = 0
        for name, parameter in backbone.named_parameters() if rows else ():
            place = next((n for n, row in enumerate(rows, start=1) if name.startswith(f'{row.name}.')), place)
            depths[id(parameter)] = len(rows) + 1 - place
    if not depths:
        raise ValueError('RLLayerDecayOptimWrapperConstructor: the model has no backbone with chains of blocks')
    return depths
