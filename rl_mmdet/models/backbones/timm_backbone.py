"""timm's models as mmdet backbones, with Replacement Learning."""
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any

from mmengine.model import BaseModule
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from ..layouts import own_layout, read_pretrained, translates
from ..timm_models import SCHEME, build_timm_model, norms_with_more, timm_layout, untouched
from .replacement_mixin import apply_settings_, check_init_cfg


class TimmBackbone(BaseModule):
    """A timm model that gives a detector its feature maps; configs name it ``dict(type='RLBackbone', timm=...)``.

    It has the timm model's attributes, parameters and state-dict keys (without its classifier, and without what
    lies behind the last map), so timm's checkpoints fit. Everything else is as in mmdet's backbones.

    Args:
        timm: name of a timm model, e.g. ``'convnext_tiny'``, with or without a tag.
        out_indices: which of its feature maps to give, in the model's order, -1 for the last; by default the last
            four of a model with a pyramid, and the last of a model whose maps all have one stride (plain ViTs).
        norm: apply the model's final norm to plain ViT's maps.
        frozen_stages: stages that don't learn: -1 none, 0 the stem, 1 also the first stage and so on, as timm
            groups its parameters; the stages of a plain ViT are its blocks.
        norm_eval: keep BatchNorm in eval mode, so that its statistics stay.
        with_cp: checkpoint activations, where timm can.
        pretrained: start from timm's own weights: the same as
            ``init_cfg=dict(type='Pretrained', checkpoint='timm://<name>')``.
        init_cfg: ``dict(type='Pretrained', checkpoint=...)`` with a file in timm's or the original project's layout,
            or None for timm's own initialisation.
        replacement, fold_norm, transfer: as for
            :class:`~rl_mmdet.models.backbones.replacement_mixin.ReplacementMixin`.
        **kwargs: whatever ``timm.create_model`` takes for the model.

    Attributes:
        out_channels, out_strides: of each feature map, for the neck's ``in_channels``.
        patch: what image sides are padded to a multiple of, in pixels: a plain ViT's patch, else 1.
        pruned: keys of the timm model that no feature map needs.
        replacement_report: what was replaced and why other blocks were not; None without replacement.

    Shapes:
        images ``(N, 3, H, W)`` to a tuple of maps ``(N, out_channels[i], H / s, W / s)`` with ``s = out_strides[i]``,
        rounded as the model does.

    Raises:
        ValueError: unknown model, index, stage or argument; a replacement that doesn't fit; images smaller than the
            stride or of a size that the model can't take.
    """

    def __init__(self, timm: str, *, out_indices: Sequence[int] | None = None, norm: bool = False,
                 frozen_stages: int = -1, norm_eval: bool = False, with_cp: bool = False, pretrained: bool = False,
                 init_cfg: Mapping[str, Any] | None = None, replacement: Mapping[str, Any] | None = None,
                 fold_norm: bool = False, transfer: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        if pretrained and init_cfg is not None:
            raise ValueError(f'{timm}: pretrained=True and init_cfg both say what to start from; leave one out')
        check_init_cfg(timm, init_cfg)
        super().__init__(dict(type='Pretrained', checkpoint=f'{SCHEME}{timm}') if pretrained else init_cfg)
        body = build_timm_model(timm, **kwargs)
        if not hasattr(body, 'prune_intermediate_layers'):
            raise ValueError(f'timm {version("timm")} gives no feature maps of {timm}; install a newer timm')
        self.timm, self.kwargs, self.final_norm = timm, kwargs, norm
        self.out_indices = _check_out_indices(timm, body.feature_info, out_indices)
        maps = [body.feature_info[index] for index in self.out_indices]
        self.out_channels = [each['num_chs'] for each in maps]
        self.out_strides = [each['reduction'] for each in maps]
        self.patch = self.out_strides[0] if _is_plain(body.feature_info) else 1
        whole = set(body.state_dict())
        body.prune_intermediate_layers(list(self.out_indices), prune_norm=not norm)
        if hasattr(getattr(body, 'head', None), 'norm'):  # of the classifier: older timm leaves it, and DDP misses it
            body.head.norm = nn.Identity()
        self.pruned = whole - set(body.state_dict())
        if with_cp:
            _checkpoint(timm, body)
        self.norm_eval = norm_eval
        # This module and the timm model share their dicts of submodules and tensors, so that the keys are timm's. The
        # tuple keeps the timm model itself from becoming a submodule, which would add its keys a second time.
        self._body = (body,)
        self._modules, self._parameters, self._buffers = body._modules, body._parameters, body._buffers
        self._non_persistent_buffers_set = body._non_persistent_buffers_set
        self.frozen = self._freeze(frozen_stages)
        apply_settings_(self, replacement, fold_norm, transfer)

    @property
    def body(self) -> nn.Module:
        """The timm model."""
        return self._body[0]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if '_body' not in self.__dict__:
                raise
        return getattr(self.body, name)

    def init_weights(self) -> None:
        """Load ``init_cfg``'s checkpoint; without one, timm has initialised the weights already."""
        if self.init_cfg is not None and not self.is_init:
            self.load_state_dict(own_layout(self, read_pretrained(self.init_cfg)), strict=False)
        self.is_init = True

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        _check_size(self.timm, images, max(self.out_strides))
        height, width = images.shape[-2:]
        images = F.pad(images, (0, -width % self.patch, 0, -height % self.patch))
        try:
            maps = self.body.forward_intermediates(images, indices=list(self.out_indices), norm=self.final_norm,
                                                   stop_early=True, output_fmt='NCHW', intermediates_only=True)
        except AssertionError as error:
            raise ValueError(f'{self.timm}: images of {height}x{width} pixels don\'t fit: {error}; resize or pad them '
                             'to a size that does, and give the model that img_size') from error
        return tuple(maps)

    def train(self, mode: bool = True) -> 'TimmBackbone':
        super().train(mode)
        self.body.training = mode
        for name, module in self.named_modules():
            if name in self.frozen or (self.norm_eval and isinstance(module, _BatchNorm)):
                module.eval()
        return self

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """As ever, but ``fuse_conv_bn`` would put nothing in the place of norms with an activation inside.

        Raises:
            RuntimeError: it has called, and there are such norms.
        """
        if sys._getframe(1).f_code.co_name == 'fuse_conv_bn' and norms_with_more(self):
            raise RuntimeError(f'{self.timm}: fuse_conv_bn would drop the activations in timm\'s norms; leave it out')
        return super().named_children()

    def _freeze(self, stages: int) -> set[str]:
        """Freeze the stem and the first ``stages`` stages, -1 for none; returns the names of their modules."""
        if stages < 0:
            return set()
        from timm.models import group_parameters
        if not hasattr(self.body, 'group_matcher'):
            raise ValueError(f'{self.timm}: timm doesn\'t say what its stages are, so frozen_stages must be -1')
        groups = group_parameters(self.body, self.body.group_matcher(coarse=True))
        last = max(groups)
        if stages > last:
            raise ValueError(f'{self.timm}: frozen_stages={stages}, but there are {last} stages; allowed: -1 to {last}')
        frozen = {name for group, names in groups.items() if group <= stages for name in names}
        for name in frozen:
            self.body.get_parameter(name).requires_grad_(False)
        inside = {name: {parameter for parameter, _ in module.named_parameters(prefix=name)}
                  for name, module in self.body.named_modules() if name}
        return {name for name, parameters in inside.items() if parameters and parameters <= frozen}


@own_layout.register
def _(module: TimmBackbone, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The layouts that timm reads for the model, without its classifier and what lies behind the last map."""
    plain = untouched(module.timm, module.kwargs)
    own, baseline = module.state_dict(), plain.state_dict()
    # timm mistakes some checkpoints without a classifier for an older layout: those that fit stay as they are
    if not all(key in tensors and tensors[key].shape in (own[key].shape, baseline[key].shape)
               for key in own.keys() & baseline.keys()):
        tensors = timm_layout(module.timm, plain, tensors)
    classifier = plain.pretrained_cfg.get('classifier') or ()
    head = ('fc_norm.', *(f'{name}.' for name in ([classifier] if isinstance(classifier, str) else classifier)))
    return {key: value for key, value in tensors.items() if key not in module.pruned and not key.startswith(head)}


@translates.register
def _(module: TimmBackbone) -> bool:
    return True


@fx.wrap  # keeps a trace from entering the function, which needs the sizes as numbers
def _check_size(name: str, images: Tensor, stride: int) -> None:
    height, width = images.shape[-2:]
    if min(height, width) < stride:
        raise ValueError(f'{name}: images of {height}x{width} pixels are smaller than the stride {stride} of its last '
                         'feature map; enlarge them or drop that map from out_indices')


def _checkpoint(name: str, body: nn.Module) -> None:
    """Have timm checkpoint the model's blocks, or say that it can't."""
    try:
        body.set_grad_checkpointing(True)
    except AssertionError:  # models without checkpoints
        able = False
    else:  # timm 1.0.16 keeps a ResNet's flag at the model, where the way to the maps doesn't read it
        flagged = [module for module in body.modules() if getattr(module, 'grad_checkpointing', False)]
        able = flagged != [body] or 'grad_checkpointing' in type(body).forward_intermediates.__code__.co_names
    if not able:
        raise ValueError(f'{name}: with_cp=True, but timm {version("timm")} can\'t checkpoint this model; leave it out')


def _is_plain(maps: Sequence[Mapping[str, Any]]) -> bool:
    """Whether all maps have the same stride, as in a plain ViT."""
    return len({each['reduction'] for each in maps}) == 1


def _check_out_indices(name: str, maps: Sequence[Mapping[str, Any]],
                       out_indices: Sequence[int] | None) -> tuple[int, ...]:
    """The indices as numbers from 0, in the order in which the model gives its maps; the default ones for None."""
    count = len(maps)
    if out_indices is None:
        return (count - 1,) if _is_plain(maps) else tuple(range(max(0, count - 4), count))
    if not out_indices:
        raise ValueError(f'{name}: out_indices is empty')
    for index in out_indices:
        if not -count <= index < count:
            raise ValueError(f'{name}: out_indices {tuple(out_indices)} has {index}, but its {count} feature maps are '
                             + ', '.join(f'{i} (stride {each["reduction"]}, {each["num_chs"]} channels)'
                                         for i, each in enumerate(maps)))
    return tuple(sorted({index % count for index in out_indices}))
