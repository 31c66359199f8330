"""Replace the backbones in a model's config by their Replacement-Learning twins, and nothing else."""
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from mmdet.registry import MODELS

from rl_mmdet.replacement import PLANS, find_chains

from .configs import find_backbones

EVERY_OTHER = dict(type='EveryKth', k=2)
EVERY_STEP = dict(every=1)
"""The check makes one step, and all blocks are to learn in it."""


def swap_backbones(model: Mapping[str, Any], *plans: Mapping[str, Any] | None) -> dict[str, Any]:
    """A copy of a model's config with replaced backbones; all their other settings stay.

    Args:
        model: the config.
        plans: one for each backbone, in order, None to leave it alone; by default every other block of all.
    """
    swapped = deepcopy(dict(model))
    found = list(find_backbones(swapped))
    for (owner, key, backbone), plan in zip(found, plans or [EVERY_OTHER] * len(found), strict=True):
        if plan is not None:
            owner[key] = rl_twin(backbone) | dict(replacement=dict(plan=plan, gradient=EVERY_STEP))
    return swapped


def rl_twin(backbone: Mapping[str, Any]) -> dict[str, Any]:
    """A backbone's settings for :func:`~rl_mmdet.models.RLBackbone`; one that takes ``replacement`` stays as it is."""
    cls = MODELS.get(backbone['type']) if isinstance(backbone['type'], str) else backbone['type']
    if getattr(cls, '__module__', '').startswith('rl_mmdet.models.'):
        return dict(backbone)
    return dict(backbone, type='RLBackbone', backbone=backbone['type'])


def plans_that_fit(model: Mapping[str, Any]) -> list[dict[str, Any] | None]:
    """For each backbone every other block, or where that is none, the first; None where no block can be replaced."""
    return [_plan_that_fits(backbone) for _, _, backbone in find_backbones(model)]


def _plan_that_fits(backbone: Mapping[str, Any]) -> dict[str, Any] | None:
    chains = find_chains(MODELS.build(deepcopy(dict(backbone))))
    if any(PLANS.build(EVERY_OTHER).choose(chains).values()):
        return EVERY_OTHER
    first = next(({name: chain.replaceable()[:1]} for name, chain in chains.items() if chain.replaceable()), None)
    return first and dict(type='Blocks', blocks=first)
