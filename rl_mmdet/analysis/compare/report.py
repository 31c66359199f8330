"""The report on a comparison: report.html, report.md, report.json and figures/."""
import base64
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from ...engine import UserError
from ...engine.files import write_text, written_whole
from .contents import Contents
from .plots import curves, pareto
from .tables import TITLES, tables
from .verdict import verdict

DPI = 110
FIGURES = ('pareto_bbox', 'pareto_segm', 'curves')
SIGNS = {'better': '▲ ', 'worse': '▼ ', '': ''}


@dataclass(frozen=True)
class Picture:
    """A figure of the report.

    Args:
        name: of its file, one of ``FIGURES``.
        title: heading above it.
        caption: how to read it.
        figure: what is drawn.
    """
    name: str
    title: str
    caption: str
    figure: Figure

    def file(self, kind: str) -> bytes:
        """The figure as a file, ``'png'`` or ``'svg'``."""
        file = io.BytesIO()
        metadata = dict.fromkeys(('Creator', 'Date', 'Format', 'Type')) if kind == 'svg' else None
        self.figure.savefig(file, format=kind, dpi=DPI, metadata=metadata)
        return file.getvalue()

    @property
    def data_uri(self) -> str:
        """An address that holds the whole figure."""
        return f'data:image/svg+xml;base64,{base64.b64encode(self.file("svg")).decode()}'


def check_report_folder(folder: Path) -> None:
    """Raise a UserError if this is no folder, or has files called as a report's that no comparison wrote."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        raise UserError(f'--report-dir {folder}: not a directory; give a folder')
    ours = [*(f'report.{kind}' for kind in ('html', 'md')), *(f'figures/{name}.png' for name in FIGURES)]
    theirs = [name for name in ours if (folder / name).exists()]
    if theirs and not any((folder / name).is_file() for name in ('report.json', 'comparison.json')):
        raise UserError(f'--report-dir {folder}: its {theirs[0]} is no comparison\'s (there is no report.json beside '
                        'it) and would be overwritten; give another folder')


def write_report(contents: Contents, folder: Path) -> None:
    """Write the report, in place of an earlier one; every file appears under its name only when it is complete.

    Args:
        contents: all that the report shows.
        folder: gets ``report.html``, ``report.md``, ``report.json`` and ``figures/*.png``.
    """
    pictures = list(_pictures(contents))
    texts = {name: _render(f'{name}.j2', contents, pictures) for name in ('report.html', 'report.md')}
    check_report_folder(folder)
    (folder / 'figures').mkdir(parents=True, exist_ok=True)
    write_text(folder / 'report.json', contents.as_json())  # first: by it the folder is known again
    for name in FIGURES:
        (folder / 'figures' / f'{name}.png').unlink(missing_ok=True)
    for picture in pictures:
        with written_whole(folder / 'figures' / f'{picture.name}.png') as unfinished:
            unfinished.write_bytes(picture.file('png'))
    for name, text in texts.items():
        write_text(folder / name, text)


def _pictures(contents: Contents) -> Iterator[Picture]:
    """All figures that have anything to show."""
    for metric in contents.metrics:
        if figure := pareto(contents, metric):
            yield Picture(f'pareto_{metric}', f'{TITLES[metric]} against the cost of training',
                          'Further up and further left is better. Error bars: ± one standard deviation over seeds; for '
                          'times from the fastest to the slowest round. The line joins what no other variant beats in '
                          'both AP and cost.', figure)
    if figure := curves(contents):
        yield Picture('curves', 'AP in the course of the trainings', 'A line for each training.', figure)


def _render(template: str, contents: Contents, pictures: list[Picture]) -> str:
    """The text of a report file."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=template.endswith('.html.j2'),
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= dict(cell=escape_markdown, fence=_fence, options=_options)
    variants = contents.variants[1:]
    return environment.get_template(template).render(
        contents=contents, pictures=pictures, verdict=verdict(contents), tables=tables(contents), signs=SIGNS,
        title=f'{contents.baseline.name} and {len(variants)} {"variant" if len(variants) == 1 else "variants"} of it',
        facts=_facts(contents), undone=[run for run in contents.runs if run.status != 'finished'],
        unmeasured=[variant for variant in contents.variants if variant.cost_error])


def _facts(contents: Contents) -> str:
    done = sum(run.status == 'finished' for run in contents.runs)
    facts = [*[contents.date] * bool(contents.date), f'{done} of {len(contents.runs)} trainings finished',
             'one seed' if contents.seeds == 1 else f'{contents.seeds} seeds each']
    size = '' if contents.images is None else f', {contents.images} images with {contents.objects} objects'
    return ', '.join([*facts, f'val set {contents.data}{size}', contents.environment['device']])


def escape_markdown(text: str) -> str:
    """The text as it is, on one line, in a paragraph or a table's cell of GitHub's Markdown."""
    line = ' '.join(text.split()).replace('&', '&amp;').replace('<', '&lt;')
    return re.sub(r'([\\|*`\[\]~]|(?<![^\W_])_|_(?![^\W_]))', r'\\\1', line)


def _fence(text: str) -> str:
    """The text as a block of code in Markdown."""
    marks = '```'
    while marks in text:
        marks += '`'
    return f'{marks}\n{text}\n{marks}'


def _options(options: dict[str, object]) -> str:
    """A line for each option, as ``--cfg-options`` takes it."""
    return '\n'.join(f'{key}={value}' for key, value in options.items())
