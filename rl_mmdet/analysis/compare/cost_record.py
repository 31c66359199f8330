"""The measured costs of a comparison, kept in its folder."""
import json
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import mmdet
import torch

from ...engine.files import write_text
from .comparison import Comparison
from .costs import Cost, measure_costs
from .runs import checkpoint_of


@dataclass(frozen=True)
class CostRecord:
    """What was measured, and on what.

    Args:
        costs: by variant; for one that couldn't be measured, why not.
        environment: device and versions.
        checkpoints: file name of the weights that each variant had; None for random ones.
    """
    costs: dict[str, Cost | str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    checkpoints: dict[str, str | None] = field(default_factory=dict)


def read_costs(folder: Path) -> CostRecord:
    """The costs found in the folder of a comparison; an empty record if there are none."""
    path = folder / 'costs.json'
    if not path.is_file():
        return CostRecord()
    content = json.loads(path.read_text())
    costs = {name: each if isinstance(each, str) else Cost(**each) for name, each in content['costs'].items()}
    return CostRecord(costs, content['environment'], content['checkpoints'])


def measure(comparison: Comparison, say: Callable[[str], None], allow_pickle: bool = False) -> None:
    """Measure all variants with the checkpoints of the first seed, unless that was done with the same ones.

    Raises:
        UserError: the baseline can't be measured.
    """
    checkpoints = {run.variant: checkpoint_of(run) for run in comparison.runs() if run.seed == 0}
    names = {variant: path and path.name for variant, path in checkpoints.items()}
    if read_costs(comparison.folder).checkpoints == names:
        say('costs were measured before')
        return
    cfgs = {variant.name: comparison.config(variant.name) for variant in comparison.variants}
    costs = measure_costs(cfgs, checkpoints, say=say, allow_pickle=allow_pickle)
    record = asdict(CostRecord(costs, environment(), names))
    write_text(comparison.folder / 'costs.json', json.dumps(record, indent=1))


def environment() -> dict[str, str]:
    """Device and versions in use."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f'CPU ({platform.machine()})'
    return dict(device=device, torch=torch.__version__, mmdet=mmdet.__version__, python=platform.python_version())
