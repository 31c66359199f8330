"""A table of a backbone's blocks: which are replaced, by whom, and why others can't be."""
from collections.abc import Iterable, Mapping

from mmdet.registry import MODELS
from mmengine.config import Config
from rich.table import Table
from torch import nn

from ..engine import UserError
from ..engine.preflight import build_model
from ..engine.preflight.guard import check_arguments, find_class
from ..replacement import ReplacementReport, find_chains
from ..replacement.report import BlockRow, describe_blocks, describe_state


def block_table(cfg: Config) -> Table:
    """Tabulate the blocks of ``cfg.model.backbone``, with or without replacement.

    Raises:
        UserError: the config has no backbone, or the backbone no chain.
    """
    backbone = build_model(Config(dict(model=backbone_cfg(cfg), default_scope=cfg.get('default_scope', 'mmdet'))))
    report = getattr(backbone, 'replacement_report', None)
    rows = report.rows if report else describe_blocks(find_chains(backbone), {})
    if not rows:
        raise UserError(f'backbone {type(backbone).__name__}: found no chain of blocks')
    return tabulate(rows, _title(backbone, report), _caption(report))


def tabulate(rows: Iterable[BlockRow], title: str, caption: str | None = None,
             errors: Mapping[str, float] | None = None) -> Table:
    """Tabulate blocks, one a row; with ``errors``, what is left unexplained of a block by its name, too."""
    table, last = Table(title=title, caption=caption), None
    for column in ('stage', 'block', 'kind', 'parameters', *(['unexplained'] if errors is not None else []), 'state',
                   'neighbours', 'note'):
        table.add_column(column, justify='right' if column in ('block', 'parameters', 'unexplained') else 'left')
    for row in rows:
        if last not in (None, row.chain):
            table.add_section()
        last = row.chain
        error = [] if errors is None else [f'{errors[row.name]:.3f}' if row.name in errors else '']
        table.add_row(row.chain, str(row.index), row.kind, f'{row.parameters:,}', *error,
                      f'[bold]{describe_state(row)}[/]' if row.replaced else describe_state(row),
                      ', '.join(name for name in (row.before, row.after, *row.others) if name) if row.replaced else '',
                      "can't be replaced: " + row.reason if row.reason else '')
    return table


def backbone_cfg(cfg: Config) -> dict:
    """``cfg.model.backbone``, or a UserError where it is missing, misspelt or of an unknown type."""
    model = cfg.get('model') or {}
    detector = find_class(MODELS, model.get('type'))
    if detector is not None:
        check_arguments('model', model, detector, .8)
    backbone = model.get('backbone')
    if backbone is None:
        raise UserError('config: model.backbone is missing')
    if find_class(MODELS, backbone.get('type')) is None:
        raise UserError(f'model.backbone: unknown type {backbone.get("type")!r}')
    return backbone


def _title(backbone: nn.Module, report: ReplacementReport | None) -> str:
    if report is None:
        return f'{type(backbone).__name__}: no replacement'
    return f'{type(backbone).__name__}: ' + ', '.join(report.settings.values())


def _caption(report: ReplacementReport | None) -> str:
    if report is None:
        return 'blocks without a note can be replaced'
    return (f'{report.removed_parameters:,} parameters removed, {report.learnable:,} added; the same choice as a '
            f'plan: {report.as_plan}')
