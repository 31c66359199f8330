"""A table of a backbone's blocks: which are replaced, by whom, how well their neighbours explain them."""
from mmdet.registry import MODELS
from mmengine.config import Config
from rich.table import Table
from torch import nn

from ..engine import UserError, read_checkpoint
from ..engine.preflight import build_model
from ..engine.preflight.guard import find_class
from ..models.layouts import state_dict_of
from ..replacement import ReplacementReport, adapt_state_dict, find_chains
from ..replacement.report import BlockRow, describe_blocks, describe_state


def block_table(cfg: Config, checkpoint: str | None = None, allow_pickle: bool = False) -> Table:
    """Tabulate the blocks of ``cfg.model.backbone``.

    Args:
        cfg: a detector's config, with or without replacement.
        checkpoint: a baseline's weights (backbone or detector); adds each replaced block's fit residual,
            :math:`\\lVert θ_i - θ̂_i \\rVert / \\lVert θ_i \\rVert`.
        allow_pickle: see :func:`~rl_mmdet.engine.read_checkpoint`.

    Raises:
        UserError: the config has no backbone, the backbone no chain, or the checkpoint can't be read.
    """
    backbone = build_model(Config(dict(model=backbone_cfg(cfg), default_scope=cfg.get('default_scope', 'mmdet'))))
    report = getattr(backbone, 'replacement_report', None)
    rows = report.rows if report else describe_blocks(find_chains(backbone), {})
    if not rows:
        raise UserError(f'backbone {type(backbone).__name__}: found no chain of blocks')
    residuals = _residuals(backbone, checkpoint, allow_pickle) if checkpoint else {}
    table = Table(title=_title(backbone, report), caption=_caption(report))
    for column in ('stage', 'block', 'kind', 'parameters', 'state', 'neighbours', 'fit residual', 'note'):
        table.add_column(column, justify='right' if column in ('block', 'parameters', 'fit residual') else 'left')
    last = None
    for row in rows:
        if last not in (None, row.chain):
            table.add_section()
        last = row.chain
        residual = residuals.get(row.name)
        table.add_row(row.chain, str(row.index), row.kind, f'{row.parameters:,}',
                      f'[bold]{describe_state(row)}[/]' if row.replaced else describe_state(row),
                      ', '.join(name for name in (row.before, row.after, *row.others) if name) if row.replaced else '',
                      '' if residual is None else f'{residual:.3f}',
                      _note(row))
    return table


def backbone_cfg(cfg: Config) -> dict:
    """``cfg.model.backbone``, or a UserError where it is missing or of an unknown type."""
    backbone = (cfg.get('model') or {}).get('backbone')
    if backbone is None:
        raise UserError('config: model.backbone is missing')
    if find_class(MODELS, backbone.get('type')) is None:
        raise UserError(f'model.backbone: unknown type {backbone.get("type")!r}')
    return backbone


def _note(row: BlockRow) -> str:
    """Why a block can't be replaced, if so."""
    return "can't be replaced: " + row.reason if row.reason else ''


def _residuals(backbone: nn.Module, checkpoint: str, allow_pickle: bool) -> dict[str, float]:
    """Each replaced block's fit residual by its name."""
    loaded = read_checkpoint(checkpoint, allow_pickle)
    tensors = state_dict_of(loaded, 'backbone') or state_dict_of(loaded)
    _, report = adapt_state_dict(backbone, tensors)
    if not report.loaded:
        raise UserError(f'{checkpoint}: no tensor of it fits {type(backbone).__name__}')
    return {name: fit.residual for name, fit in report.fits.items()}


def _title(backbone: nn.Module, report: ReplacementReport | None) -> str:
    if report is None:
        return f'{type(backbone).__name__}: no replacement'
    return f'{type(backbone).__name__}: ' + ', '.join(report.settings.values())


def _caption(report: ReplacementReport | None) -> str:
    if report is None:
        return 'blocks without a note can be replaced'
    return (f'{report.removed_parameters:,} parameters removed, {report.learnable:,} added; the same choice as a '
            f'plan: {report.as_plan}')
