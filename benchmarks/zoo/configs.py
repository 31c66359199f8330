"""The configs that mmdet ships, and the model that each of them describes."""
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mmdet
from mmengine.config import Config

from rl_mmdet.engine import UserError
from rl_mmdet.engine.config import nested_dicts

from .reasons import short_reason

ROOT = Path(mmdet.__file__).parent / '.mim' / 'configs'
PRETRAINED = ('init_cfg', 'pretrained', 'teacher_ckpt')
"""Settings that name weights to start from."""
FEW = dict(num=32, nms_pre=200, max_per_img=50)
"""Settings for how many regions are sampled, proposed or detected, and what is enough to see that a model runs."""


@dataclass(frozen=True)
class ZooConfig:
    """One config file.

    Args:
        name: its path below mmdet's ``configs`` folder.
        model: its model, ready to be built, without pretrained weights; None where there is none.
        reason: why there is none.
    """
    name: str
    model: dict[str, Any] | None = None
    reason: str = ''

    @property
    def family(self) -> str:
        """The folder it lies in, such as ``faster_rcnn``."""
        return self.name.split('/')[0]

    @property
    def backbones(self) -> str:
        """Types of the model's backbones."""
        types = [backbone.get('type', 'unknown') for _, _, backbone in find_backbones(self.model or {})]
        return ' + '.join(dict.fromkeys(map(_name, types))) or 'none'

    @property
    def key(self) -> str:
        """The same for configs that describe the same model, whatever their schedules and data."""
        text = json.dumps(self.model or self.name, sort_keys=True, default=_name)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def config_names(patterns: Iterable[str] = ()) -> list[str]:
    """Names of mmdet's configs, sorted: those that match a pattern such as ``'faster_rcnn/*r50*'``, or else all.

    Raises:
        UserError: a pattern that no config matches.
    """
    known = sorted(path.relative_to(ROOT) for path in ROOT.rglob('*.py') if '_base_' not in path.parts)
    chosen = set()
    for pattern in patterns:
        found = [path for path in known if path.match(pattern)]
        if not found:
            raise UserError(f'--configs {pattern}: no config of mmdet matches; names look like {known[0].as_posix()}')
        chosen.update(found)
    return [path.as_posix() for path in (sorted(chosen) if patterns else known)]


def read_config(name: str) -> ZooConfig:
    """Read one of mmdet's configs."""
    try:
        cfg = Config.fromfile(ROOT / name)
    except Exception as error:  # whatever the config's own code raises
        return ZooConfig(name, reason=short_reason(error))
    if cfg.get('model') is None:
        return ZooConfig(name, reason='holds no model: settings for other configs')
    model = cfg.model.to_dict()
    if cfg.get('data_preprocessor') is not None:  # as MMEngine's runner does
        model.setdefault('data_preprocessor', cfg.data_preprocessor.to_dict())
    return ZooConfig(name, changed(model, lambda settings: {key: None for key in settings if key in PRETRAINED}))


def with_few_regions(model: Mapping) -> dict:
    """A copy of a model's config that looks at few regions of an image, to spare time."""
    return changed(model, lambda settings: {key: most for key, most in FEW.items()
                                            if isinstance(settings.get(key), int) and settings[key] > most})


def number_of_classes(model: Mapping) -> int:
    """How many labels all heads of a model's config know."""
    counts = [node.get(key) for node in nested_dicts(model) for key in ('num_classes', 'num_things_classes')]
    return min((count for count in counts if isinstance(count, int)), default=1)


def changed(node: Any, change: Callable[[Mapping], dict]) -> Any:
    """A copy of a config value in which every dict of settings gets what ``change`` gives for it."""
    if isinstance(node, Mapping):
        return {key: changed(value, change) for key, value in node.items()} | change(node)
    if isinstance(node, (list, tuple)):
        return type(node)(changed(value, change) for value in node)
    return node


def find_backbones(model: Mapping[str, Any]) -> Iterator[tuple[dict, str, dict]]:
    """Every backbone in a model that learns (a distillation's teacher doesn't): its owner, the key and itself."""
    for key, value in model.items():
        if key.startswith('teacher') or not isinstance(value, Mapping):
            continue
        if (key == 'backbone' or key.endswith('_backbone')) and 'type' in value:
            yield model, key, value
        else:
            yield from find_backbones(value)


def _name(value: Any) -> str:
    return getattr(value, '__name__', None) or str(value)
