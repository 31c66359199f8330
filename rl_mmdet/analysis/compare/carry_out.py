"""A comparison from its trainings to its report."""
import os
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from tqdm import tqdm

from ...engine import UserError
from .comparison import Comparison, only_one
from .contents import Contents, collect
from .costs import measure
from .report import write_report
from .runs import Tools, train_all
from .tables import rich_table, tables
from .verdict import verdict


def carry_out(comparison: Comparison, tools: Tools, report: Path, *, train: bool = True, measure_costs: bool = True,
              allow_pickle: bool = False, show: Callable[[Contents], None] | None = None) -> None:
    """Train what isn't trained yet, measure what isn't measured yet, and write the report on all that is there.

    Progress and a summary are shown in the terminal.

    Args:
        comparison: what to compare.
        tools: how trainings are started.
        report: folder for the report.
        train: False leaves trainings as they are.
        measure_costs: False leaves costs as they are.
        allow_pickle: see :func:`~rl_mmdet.engine.read_checkpoint`.
        show: prints the summary; the report's own tables if left out.

    Raises:
        UserError: another process is at work in the folder, or a training or a measurement failed; it names which,
            and why in a line.
    """
    os.environ.setdefault('KINETO_LOG_LEVEL', '5')  # else torch's profiler complains about a GPU that isn't there
    console, start = Console(soft_wrap=True, highlight=False), time.monotonic()

    def say(line: str) -> None:
        with tqdm.external_write_mode():
            console.print(f'{time.monotonic() - start:6.0f} s  {line}', markup=False)

    try:
        with only_one(comparison.folder):
            if train:
                train_all(comparison, tools, say)
            if measure_costs:
                measure(comparison, say, allow_pickle)
            say('writing the report')
            contents = collect(comparison)
            write_report(contents, report)
    except KeyboardInterrupt:
        say('start it again to go on from the last checkpoint')
        raise
    if show is None:
        for table in tables(contents):
            console.print(rich_table(table))
        console.print(verdict(contents), markup=False)
        console.print(f'report: {report / "report.html"}', markup=False)
    else:
        show(contents)
    _check_success(contents)


def _check_success(contents: Contents) -> None:
    """Raise a UserError if a training or a measurement has failed."""
    failed = [f'{run.variant}, seed {run.seed}: {run.reason}' for run in contents.runs if run.status == 'failed']
    failed += [f'cost of {variant.name}: {variant.cost_error}' for variant in contents.variants if variant.cost_error]
    if failed:
        raise UserError(f'{len(failed)} failed; start again to try once more: ' + '; '.join(failed))
