"""The report on a comparison: report.html, report.md, report.json and figures/."""
import base64
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from ...engine.files import written_whole
from .comparison import Comparison
from .contents import Contents
from .disagreements import disagreements
from .in_short import SAME, in_short
from .plots import coefficients, curves, pareto
from .tables import TITLES, tables

DPI = 110
FIGURES = ('pareto_bbox', 'pareto_segm', 'curves', 'coefficients', 'detections')
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

    @cached_property
    def png(self) -> bytes:
        """The figure as a PNG file."""
        file = io.BytesIO()
        self.figure.savefig(file, format='png', dpi=DPI)
        return file.getvalue()

    @property
    def data_uri(self) -> str:
        """The PNG file as an address that holds it."""
        return f'data:image/png;base64,{base64.b64encode(self.png).decode()}'

    @property
    def svg(self) -> Markup:
        """The figure as an ``svg`` element for HTML, with ids that no other figure has."""
        file = io.StringIO()
        self.figure.savefig(file, format='svg', metadata=dict.fromkeys(('Creator', 'Date', 'Format', 'Type')))
        text = file.getvalue()
        element = re.sub(r'\b(id="|xlink:href="#|url\(#)', rf'\g<1>{self.name}-', text[text.index('<svg'):])
        label = Markup('<svg role="img" aria-label="{}"').format(f'{self.title}. {self.caption}')
        return Markup(element.replace('<svg', label, 1))


def write_report(comparison: Comparison, contents: Contents, folder: Path) -> list[Path]:
    """Write the report, in place of an earlier one; every file appears under its name only when it is complete.

    Args:
        comparison: whose detections are drawn.
        contents: all else that the report shows.
        folder: gets ``report.html``, ``report.md``, ``report.json`` and ``figures/*.png``.

    Returns:
        The files written.
    """
    pictures = list(_pictures(comparison, contents))
    names = {'html': 'report.html.j2', 'md': 'report.md.j2'}
    texts = {f'report.{kind}': _render(name, contents, pictures) for kind, name in names.items()}
    (folder / 'figures').mkdir(parents=True, exist_ok=True)
    written = [_write(folder / 'figures' / f'{picture.name}.png', picture.png) for picture in pictures]
    for name in set(FIGURES) - {picture.name for picture in pictures}:
        (folder / 'figures' / f'{name}.png').unlink(missing_ok=True)
    written += [_write(folder / name, text.encode()) for name, text in texts.items()]
    with written_whole(folder / 'report.json') as part:
        contents.save(part)
    return [*written, folder / 'report.json']


def _write(path: Path, content: bytes) -> Path:
    with written_whole(path) as part:
        part.write_bytes(content)
    return path


def _pictures(comparison: Comparison, contents: Contents) -> Iterator[Picture]:
    """All figures that have anything to show."""
    drawn = [(f'pareto_{metric}', f'{TITLES[metric]} against the cost of training',
              'Further up and further left is better. Error bars: ± one standard deviation over seeds; for times from '
              'the fastest to the slowest round. The line joins what no other variant beats in both AP and cost.',
              pareto(contents, metric)) for metric in contents.metrics]
    drawn += [('curves', 'Course of the trainings',
               'Mean over seeds in a band from the lowest to the highest; the loss is a running mean.',
               curves(contents)),
              ('coefficients', 'Coefficients of the replaced blocks',
               'A panel for each block, a line for each seed: a solid, b dashed.', coefficients(contents)),
              ('detections', 'Where the detections differ most',
               'The val images whose F1 (of detections with a score above 0.3, mean over the IoU thresholds 0.5 to '
               '0.95) differs most between the baseline and any variant, with the same seed: ground truth, the '
               'baseline, and that variant. They are picked for their difference, so they are no sample.',
               disagreements(comparison, contents))]
    for name, title, caption, figure in drawn:
        if figure is not None:
            yield Picture(name, title, caption, figure)


def _render(template: str, contents: Contents, pictures: list[Picture]) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=template.endswith('.html.j2'),
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= dict(cell=escape_markdown, fence=_fence, options=_options)
    variants = contents.variants[1:]
    sentences = [(variant.name, sentence.removeprefix(f'{variant.name}: '))
                 for variant, sentence in zip(variants, in_short(contents), strict=True)]
    return environment.get_template(template).render(
        contents=contents, pictures=pictures, sentences=sentences, tables=tables(contents), signs=SIGNS,
        title=f'{contents.baseline.name} and {len(variants)} {"variant" if len(variants) == 1 else "variants"} of it',
        facts=_facts(contents), how_to_read=_how_to_read(contents), unfinished=_unfinished(contents),
        failed=[run for run in contents.runs if run.status == 'failed'])


def _facts(contents: Contents) -> str:
    done = sum(run.status == 'finished' for run in contents.runs)
    parts = [f'{done} of {len(contents.runs)} trainings finished', 'one seed' if contents.seeds == 1 else
             f'{contents.seeds} seeds each']
    if contents.images is not None:
        parts.append(f'{contents.images} val images with {contents.objects} objects')
    return ', '.join([*parts, contents.environment['device']])


def _how_to_read(contents: Contents) -> list[tuple[str, str]]:
    """What the words of the sentences mean."""
    means = [('better, worse', 'For AP: both 95 % intervals of the difference to the baseline, over the val images and '
              f'over the seeds, leave out 0. For counts and memory: they differ by {SAME:.1%} or more. For times: a '
              'sign test over the rounds (5 %; of 7 rounds all must agree). Less cost is better.'),
             ('the data can\'t tell', 'The difference may be either way. For AP, the two bounds given are what it may '
              'well be; more seeds or more val images narrow them.')]
    if contents.seeds == 1:
        means.append(('one seed only', 'How much AP varies from training to training isn\'t known, so nothing is '
                      'called better or worse in AP.'))
    return means


def _unfinished(contents: Contents) -> dict[str, list[int]]:
    """Seeds that aren't finished by variant."""
    found: dict[str, list[int]] = {}
    for run in contents.runs:
        if run.status == 'unfinished':
            found.setdefault(run.variant, []).append(run.seed)
    return found


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
