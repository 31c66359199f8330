"""The model of a run: build it, and find what its settings and the weights that it begins with get wrong."""
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import nn
from torch.distributed import is_initialized

from ...folding.fold_norm import FoldingConv2d
from ...models.timm_models import norms_with_more
from ...replacement import computing_layers
from ...replacement.start import LoadReport
from ..config import for_one_process, type_name
from ..errors import UserError
from ..reading import safe_reading
from .guard import built

SHARDED = ('ColossalAIStrategy', 'DeepSpeedStrategy', 'FSDPStrategy', 'FullyShardedDataParallel',
           'MMFullyShardedDataParallel')
"""MMEngine's strategies and wrappers that may keep weights in pieces."""


def build_model(cfg: Config, allow_pickle: bool = False) -> nn.Module:
    """Build ``cfg.model`` on the CPU without initialising weights.

    Args:
        cfg: a config.
        allow_pickle: see :func:`~rl_mmdet.engine.safe_reading`; some detectors load a teacher while they are built.

    Raises:
        UserError: what the model's classes refuse, without the chain of classes that it went through.
    """
    init_default_scope(cfg.get('default_scope') or 'mmdet')
    if cfg.get('model') is None:
        raise UserError('config: it has no model')
    alone = cfg.get('launcher', 'none') == 'none' or is_initialized()  # else mmcv's SyncBN finds no group yet
    with safe_reading(allow_pickle):
        return built(cfg, 'model', lambda cfg: MODELS.build(cfg.model if alone else for_one_process(cfg.model)),
                     must=True)


def resume_checkpoint(cfg: Config) -> str | None:
    """The checkpoint that a run with this config will be resumed from, or None."""
    setting, path = first_checkpoint(cfg)
    return path if setting == 'resume' else None


def check_distributed(cfg: Config, model: nn.Module) -> None:
    """Refuse what several processes can't do with replaced or folded blocks, or MMEngine can't do at all.

    Where weights lie in pieces in several processes, a computing layer can't read its neighbours' and a folded
    convolution not its norm's. MMEngine saves in the first process only, where ZeroRedundancyOptimizer waits for what
    the others should send. Coupled neighbours inside mmdet's reentrant checkpoints get their gradient in two backward
    passes.
    """
    for setting in ('strategy', 'model_wrapper_cfg'):
        kind = type_name(cfg.get(setting) or {})
        if kind in SHARDED and (computing_layers(model) or any(isinstance(m, FoldingConv2d) for m in model.modules())):
            raise UserError(f'{setting}.type={kind!r}: not with replaced or folded blocks, which read the weights of '
                            'the blocks and layers beside them: FSDP and ZeRO-3 keep those in pieces, and DeepSpeed\'s '
                            'other stages aren\'t tested; use MMEngine\'s Runner and DDP')
    optimizer = (cfg.get('optim_wrapper') or {}).get('optimizer') or {}
    if type_name(optimizer) == 'ZeroRedundancyOptimizer':
        raise UserError("optim_wrapper.optimizer.type='ZeroRedundancyOptimizer': MMEngine's Runner hangs when it saves "
                        'it; put its optimizer_type there')
    several = cfg.get('launcher', 'none') != 'none'
    if several and cfg.get('sync_bn') and norms_with_more(model):
        raise UserError(f'sync_bn={cfg.sync_bn!r}: it would drop the activations inside timm\'s norms, such as '
                        f'{norms_with_more(model)[0]}; leave it out')
    coupled = [name for name, layer in computing_layers(model).items()
               if layer.with_cp and layer.gradient.mode == 'coupled']
    wrapper = cfg.get('model_wrapper_cfg') or {}
    if several and coupled and not wrapper.get('static_graph'):
        raise UserError("replacement.gradient mode 'coupled' with with_cp=True on several GPUs needs a static graph: "
                        "add --cfg-options model_wrapper_cfg.type=MMDistributedDataParallel "
                        "model_wrapper_cfg.static_graph=True, or use mode 'detached'")


def check_start(model: nn.Module, loaded: Sequence[LoadReport]) -> None:
    """A start that is fitted to the removed blocks needs their weights; without a fade, a replaced model's own do."""
    fitted = [layer.start for layer in computing_layers(model).values() if layer.start.keeps_block]
    loaded = [report for report in loaded if any(report.held.values())]
    if fitted and not loaded:
        raise UserError(f"replacement.start: {fitted[0]} needs a trained baseline's weights, and none are loaded; "
                        "set model.backbone.init_cfg=dict(type='Pretrained', checkpoint=FILE) or load_from=FILE, or "
                        'leave start out')
    if any(start.fade for start in fitted) and not loaded[-1].initialised:
        raise UserError(f'replacement.start: {fitted[0]} needs the removed blocks, and the checkpoint is a replaced '
                        "model's own, which has none; load a baseline's, or set start.fade=0 to train on from it")


def pretrained_inits(model: nn.Module) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The ``init_cfg`` of every module that loads a checkpoint, with the module's name; a UserError for other texts."""
    for name, module in model.named_modules():
        inits = getattr(module, 'init_cfg', None) or []
        for init in inits if isinstance(inits, (list, tuple)) else [inits]:
            pretrained = isinstance(init, Mapping) and type_name(init) in ('Pretrained', 'PretrainedInit')
            if not isinstance(init, Mapping) or pretrained and not isinstance(init.get('checkpoint'), str):
                raise UserError(f'model.{name}.init_cfg must be a dict such as dict(type=\'Pretrained\', '
                                f'checkpoint=FILE), got {init!r}')
            if pretrained:
                yield name, init


def first_checkpoint(cfg: Config) -> tuple[str, str | None]:
    """The setting because of which a run begins with a checkpoint, and the checkpoint's path, or None."""
    return 'resume' if cfg.get('resume') else 'load_from', cfg.get('load_from')
