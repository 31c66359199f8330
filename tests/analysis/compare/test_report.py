"""What the report says, and the files it is in."""
import json
import re
from html.parser import HTMLParser

import pytest
from matplotlib.figure import Figure

from rl_mmdet.analysis.compare import report
from rl_mmdet.analysis.compare.bootstrap import Interval
from rl_mmdet.analysis.compare.coco_scores import Scores
from rl_mmdet.analysis.compare.contents import FIELDS, Contents, RunResult, VariantResult
from rl_mmdet.analysis.compare.costs import Cost
from rl_mmdet.analysis.compare.differences import Difference, spread
from rl_mmdet.analysis.compare.report import escape_markdown, write_report
from rl_mmdet.analysis.compare.training_log import TrainingLog
from rl_mmdet.analysis.training_run import TrainingCost

EVIL = 'a|b <script>alert(1)</script>'
VOID = {'meta', 'link', 'img', 'br', 'hr', 'input'}
FILES = {'report.html', 'report.md', 'report.json', 'figures'}


class Page(HTMLParser):
    """A page's tags, headings and text; complains about tags that aren't closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.headings, self.text = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if self.open and re.fullmatch('h[1-6]', self.open[-1]):
            self.headings.append((int(self.open[-1][1]), data))

    def attributes(self, *names):
        return [found[name] for _, found in self.tags for name in names if name in found]


def make_cost(part=1.):
    return Cost(40, int(40e6 * part), 8, 10, int(2e9 * part), 5, int(7e6 * part), 'torch', [1.] * 3,
                [part] * 3, [1.] * 3, [1.] * 3, [1.] * 3, [1.] * 3, 2, (64, 64))


def make_variant(name, aps, difference=None, options=None, part=1.):
    scores = {'bbox': {field: spread(aps) for field in FIELDS}} if aps else {}
    return VariantResult(name, 'configs/base.py', options or {}, scores, {'bbox': {'cat': .25}} if aps else {},
                         {'bbox': difference} if difference else {}, make_cost(part))


def make_run(variant, seed, ap=None, error=None):
    scores = {} if ap is None else {'bbox': Scores(ap, ap, ap, ap, ap, ap, {'cat': ap})}
    status = 'failed' if error else 'unfinished' if ap is None else 'finished'
    log = TrainingLog(loss=[(1, 2.), (2, 1.)], coefficients={'layer1.1': [(0, .5, .5), (2, .6, .4)]})
    cost = TrainingCost(9., 2 ** 30, True)
    return RunResult(variant, seed, status, error, scores, cost, log, f'runs/{variant}', None)


@pytest.fixture(scope='module')
def contents():
    """A baseline, a variant that is worse, and one whose trainings failed or aren't finished."""
    worse = Difference(-.1, Interval(-.1, -.123, -.077, .95, 1000), -.15, -.05, 'worse')
    variants = [make_variant('base', (.4, .5)), make_variant('smaller', (.3, .4), worse, part=.5),
                make_variant(EVIL, (), options={'model.depth': 34, 'note': '<script>'})]
    runs = [make_run('base', 0, .4), make_run('base', 1, .5), make_run('smaller', 0, .3), make_run('smaller', 1, .4),
            make_run(EVIL, 0, error='with a <b>trace</b>\nit ended'), make_run(EVIL, 1)]
    return Contents(['python tools/compare.py --seeds 2'], {'device': 'Machine 1', 'torch': '2.x'}, 12, 34, ['cat'],
                    ['bbox'], 2, variants, runs)


@pytest.fixture(scope='module', autouse=True)
def no_detections():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, 'disagreements', lambda comparison, contents: None)
        yield


@pytest.fixture(scope='module')
def written(contents, no_detections, tmp_path_factory):
    folder = tmp_path_factory.mktemp('report')
    write_report(None, contents, folder)
    return folder


@pytest.fixture
def html(written):
    return (written / 'report.html').read_text(encoding='utf-8')


@pytest.fixture
def markdown(written):
    return (written / 'report.md').read_text(encoding='utf-8')


def test_report_writes_its_files_and_names_them(contents, tmp_path):
    paths = write_report(None, contents, tmp_path / 'new')
    assert all(path.is_file() for path in paths)
    assert {path.name for path in (tmp_path / 'new').iterdir()} == FILES
    assert {path.name for path in paths} == {'report.html', 'report.md', 'report.json', 'pareto_bbox.png', 'curves.png',
                                             'coefficients.png'}


def test_report_replaces_an_earlier_one_and_touches_nothing_else(contents, tmp_path):
    (tmp_path / 'figures').mkdir()
    for name in ('comparison.json', 'report.md', 'figures/detections.png', 'figures/mine.png'):
        (tmp_path / name).write_text('before')
    write_report(None, contents, tmp_path)
    assert (tmp_path / 'comparison.json').read_text() == (tmp_path / 'figures' / 'mine.png').read_text() == 'before'
    assert (tmp_path / 'report.md').read_text(encoding='utf-8') != 'before'
    assert not (tmp_path / 'figures' / 'detections.png').exists()


def test_report_of_the_same_contents_is_the_same(contents, written, markdown):
    write_report(None, contents, written)
    assert (written / 'report.md').read_text(encoding='utf-8') == markdown


def test_json_holds_the_contents(written):
    found = json.loads((written / 'report.json').read_text())
    assert found['variants'][1]['difference']['bbox']['low'] == -.15


def test_html_is_well_formed_and_headings_are_in_order(html):
    page = Page(html)
    levels = [level for level, _ in page.headings]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(levels, levels[1:], strict=False))
    assert [text for level, text in page.headings if level == 2] == [
        'In short', 'At a glance', 'Box AP', 'Cost', 'Trainings', 'Box AP against the cost of training',
        'Course of the trainings', 'Coefficients of the replaced blocks', "Trainings that failed or aren't finished",
        'Variants', 'How this was made']
    assert dict(page.tags)['html'] == {'lang': 'en'}
    assert '<title>base and 2 variants of it</title>' in html


def test_html_loads_nothing_and_runs_nothing(html):
    page = Page(html)
    assert 'script' not in dict(page.tags)
    assert all(address.startswith(('#', 'data:')) for address in page.attributes('src', 'href', 'xlink:href'))
    assert not re.search(r'url\((?!#)|@import', html)


def test_html_ids_are_unique_and_references_lead_to_one(html):
    page = Page(html)
    ids = page.attributes('id')
    assert len(ids) == len(set(ids))
    used = {address[1:] for address in page.attributes('href', 'xlink:href') if address.startswith('#')}
    assert used | set(re.findall(r'url\(#(.*?)\)', html)) <= set(ids)


def test_html_escapes_names_options_and_errors(html):
    assert '<b>trace' not in html
    page = Page(html)
    assert EVIL in page.text
    assert 'model.depth=34\nnote=<script>' in page.text


def test_html_figures_have_texts(html, monkeypatch, contents, tmp_path):
    assert all('aria-label' in found for tag, found in Page(html).tags if tag == 'svg')
    monkeypatch.setattr(report, 'disagreements', lambda comparison, contents: Figure())
    write_report(None, contents, tmp_path)
    (image,) = [found for tag, found in Page((tmp_path / 'report.html').read_text(encoding='utf-8')).tags
                if tag == 'img']
    assert image['src'].startswith('data:image/png;base64,iVBOR')
    assert image['alt']
    assert (tmp_path / 'figures' / 'detections.png').is_file()


@pytest.mark.parametrize('number', ['0.450 ± 0.071', '-0.100', '-0.123 to -0.077', '-0.150 to -0.050', '20.000 (0.50)'])
def test_numbers_of_the_tables_are_in_both(html, markdown, number):
    assert number in Page(html).text
    assert number in markdown


def test_better_and_worse_have_signs(html, markdown):
    assert '| ▼ -0.100 |' in markdown
    assert '| ▲ 20.000 (0.50) |' in markdown
    assert re.search(r'<td class="worse">.*▼.*-0\.100</td>', html)
    assert re.search(r'<td class="better">.*▲.*20\.000 \(0\.50\)</td>', html)


def test_sentences_come_before_the_tables(html, markdown):
    for text, name in ((html, '<strong>smaller</strong>'), (markdown, '**smaller**')):
        assert text.index(f'{name}: better in trainable parameters') < text.index('At a glance</h2>' if text is html
                                                                                 else '## At a glance')


def test_markdown_tables_have_as_many_cells_in_every_row(markdown):
    blocks = re.findall(r'(?:^\|.*\|\n)+', markdown, re.MULTILINE)
    assert len(blocks) == 4
    for block in blocks:
        counts = {len(re.findall(r'(?<!\\)\|', line)) for line in block.splitlines()}
        assert len(block.splitlines()) > 3 and len(counts) == 1


def test_markdown_shows_every_figure_of_the_folder(markdown, written):
    links = re.findall(r'!\[.+\]\((.+)\)', markdown)
    assert sorted(links) == sorted(f'figures/{path.name}' for path in (written / 'figures').iterdir())


def test_failed_and_unfinished_trainings_are_named(html, markdown):
    assert f'**{escape_markdown(EVIL)}, seed 0** failed' in markdown
    assert ': it ended\n' in markdown
    assert f'**{escape_markdown(EVIL)}**: not finished with seed 1' in markdown
    assert '<summary>it ended</summary>' in html


def test_commands_and_versions_are_in_both(html, markdown):
    assert '```\npython tools/compare.py --seeds 2\n```' in markdown
    assert '- torch: 2.x' in markdown
    assert 'python tools/compare.py --seeds 2' in Page(html).text
    assert {'Machine 1', '2.x'} <= set(Page(html).text)


def test_report_of_one_seed_says_so(tmp_path):
    variants = [make_variant('base', (.4,)), make_variant('other', (.3,), Difference(-.1))]
    runs = [make_run('base', 0, .4), make_run('other', 0, .3)]
    write_report(None, Contents([], {'device': 'CPU'}, 12, 34, ['cat'], ['bbox'], 1, variants, runs), tmp_path)
    for name in ('report.html', 'report.md'):
        text = (tmp_path / name).read_text(encoding='utf-8')
        assert 'one seed' in text
        assert 'nothing is called better or worse in AP' in text.replace('&#39;', "'")


def test_report_before_anything_is_known(tmp_path):
    variants = [VariantResult('base', 'base.py', {}), VariantResult('other', 'base.py', {'k': 2})]
    write_report(None, Contents([], {'device': 'CPU'}, None, None, ['cat'], ['bbox'], 3, variants, []), tmp_path)
    assert 'nothing known yet' in (tmp_path / 'report.md').read_text(encoding='utf-8')
    assert not list((tmp_path / 'figures').iterdir())


@pytest.mark.parametrize('text, escaped', [
    ('a|b', r'a\|b'), ('<b> & c', '&lt;b> &amp; c'), ('two\nlines', 'two lines'), ('*x* `y`', r'\*x\* \`y\`'),
    ('rl-r34_fpn', 'rl-r34_fpn'), ('_x_', r'\_x\_')])
def test_escape_markdown(text, escaped):
    assert escape_markdown(text) == escaped
