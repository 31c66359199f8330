"""What the report says and draws, and the files it is in."""
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from rl_mmdet.analysis.compare.coco_scores import Scores
from rl_mmdet.analysis.compare.contents import FIELDS, Contents, RunResult, VariantResult
from rl_mmdet.analysis.compare.costs import Cost
from rl_mmdet.analysis.compare.differences import Difference, spread
from rl_mmdet.analysis.compare.plots import curves, pareto, pareto_front, styles
from rl_mmdet.analysis.compare.report import escape_markdown, write_report
from rl_mmdet.analysis.compare.verdict import verdict
from rl_mmdet.engine import UserError

EVIL = 'a|b <script>alert(1)</script>'
VOID = {'meta', 'link', 'img', 'br', 'hr', 'input'}


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

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if self.open and re.fullmatch('h[1-6]', self.open[-1]):
            self.headings.append((int(self.open[-1][1]), data))

    def attributes(self, *names):
        return [found[name] for _, found in self.tags for name in names if name in found]


def make_variant(name, aps=(), difference=None, options=None, cost=1.):
    """A variant with the AP of its seeds, and its cost over the baseline's."""
    ones = [1.] * 3
    measured = None if cost is None else Cost(
        int(40e6 * cost), int(2e9 * cost), 5, int(7e6 * cost), 'torch', ones, [.9 * cost, 1. * cost, 1.2 * cost], ones,
        ones, 2, (64, 64))
    scores = {'bbox': {field: spread(aps) for field in FIELDS}} if aps else {}
    return VariantResult(name, 'configs/base.py', options or {}, scores, {'bbox': difference} if difference else {},
                         measured)


def make_run(variant, seed=0, score=None, status='finished', error=None, curve=()):
    scores = {} if score is None else {'bbox': Scores(*[score] * 6, 12, 34)}
    return RunResult(variant, seed, status, error, scores, {'bbox': curve} if curve else {}, f'runs/{variant}', None)


def make_contents(variants, runs=(), seeds=2):
    return Contents(['python tools/compare.py --seeds 2'], {'device': 'Machine 1', 'torch': '2.x'}, '2026-01-31',
                    'data/pets/val.json', 12, 34, ['bbox'], seeds, list(variants), list(runs))


@pytest.fixture(scope='module')
def contents():
    """A baseline, a variant that is worse, and one whose trainings failed or aren't finished."""
    worse = Difference(-.1, (-.123, -.077), (-.15, -.05), 'worse')
    variants = [make_variant('base', (.4, .5)), make_variant('smaller', (.3, .4), worse, cost=.5),
                make_variant(EVIL, (), options={'model.depth': 34, 'note': '<script>'})]
    runs = [make_run('base', 0, .4, curve=[(1, .2), (2, .4)]), make_run('base', 1, .5), make_run('smaller', 0, .3),
            make_run('smaller', 1, .4), make_run(EVIL, 0, None, 'failed', 'with a <b>trace</b>\nit ended'),
            make_run(EVIL, 1, None, 'unfinished')]
    return make_contents(variants, runs)


@pytest.fixture(scope='module')
def written(contents, tmp_path_factory):
    folder = tmp_path_factory.mktemp('report')
    (folder / 'figures').mkdir()
    for name in ('comparison.json', 'report.md', 'figures/pareto_segm.png', 'figures/mine.png'):
        (folder / name).write_text('before')
    write_report(contents, folder)
    return folder


@pytest.mark.parametrize('file', ['report.md', 'figures/curves.png'])
def test_files_of_others_are_not_replaced(contents, tmp_path, file):
    (tmp_path / 'figures').mkdir()
    (tmp_path / file).write_text('mine')
    with pytest.raises(UserError, match=f'its {file} is no comparison'):
        write_report(contents, tmp_path)
    assert (tmp_path / file).read_text() == 'mine' and len(list(tmp_path.rglob('*'))) <= 2
    with pytest.raises(UserError, match=f'--report-dir .*{file}: not a directory; give a folder'):
        write_report(contents, tmp_path / file)


@pytest.fixture(scope='module')
def html(written):
    return (written / 'report.html').read_text(encoding='utf-8')


@pytest.fixture(scope='module')
def markdown(written):
    return (written / 'report.md').read_text(encoding='utf-8')


def test_report_replaces_an_earlier_one_and_touches_nothing_else(written, markdown):
    assert {path.name for path in written.iterdir()} == {'comparison.json', 'report.html', 'report.md', 'report.json',
                                                         'figures'}
    assert (written / 'comparison.json').read_text() == (written / 'figures' / 'mine.png').read_text() == 'before'
    links = re.findall(r'!\[.+\]\((.+)\)', markdown)
    assert sorted([*links, 'figures/mine.png']) == sorted(f'figures/{path.name}'
                                                          for path in (written / 'figures').iterdir())
    variant = json.loads((written / 'report.json').read_text())['variants'][1]
    assert variant['difference']['bbox']['seeds'] == [-.15, -.05]


def test_html_is_well_formed_and_needs_nothing_else(html):
    page = Page(html)
    levels = [level for level, _ in page.headings]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(levels, levels[1:], strict=False))
    assert [text for level, text in page.headings if level == 2] == [
        'In short', 'Box AP', 'Cost', 'Box AP against the cost of training', 'AP in the course of the trainings',
        'What is not done', 'Variants', 'How this was made']
    assert 'script' not in dict(page.tags)
    assert all(address.startswith(('#', 'data:image/')) for address in page.attributes('src', 'href'))
    assert not re.search(r'url\(|@import', html)
    ids = page.attributes('id')
    assert len(ids) == len(set(ids))
    assert {address[1:] for address in page.attributes('href')} <= set(ids)
    images = [found for tag, found in page.tags if tag == 'img']
    assert len(images) == 2 and all(image['alt'] for image in images)


def test_names_options_and_errors_are_escaped(html, markdown):
    assert '<b>trace' not in html
    page = Page(html)
    assert EVIL in page.text
    assert 'model.depth=34\nnote=<script>' in page.text
    for block in re.findall(r'(?:^\|.*\|\n)+', markdown, re.MULTILINE):
        counts = {len(re.findall(r'(?<!\\)\|', line)) for line in block.splitlines()}
        assert len(block.splitlines()) > 3 and len(counts) == 1


def test_both_reports_say_what_was_found(html, markdown):
    text = Page(html).text
    for number in ('0.450 ± 0.071', '-0.100', '-0.123 to -0.077', '-0.150 to -0.050', '20.000 (0.50)', 'difference',
                   '1000 ms', '1000 ms (0.50, 0.45 to 0.60)'):
        assert number in text and number in markdown
    assert '| ▼ -0.100 |' in markdown and re.search(r'<td class="worse">.*▼.*-0\.100</td>', html)
    assert '| ▲ 20.000 (0.50) |' in markdown and re.search(r'<td class="better">.*▲.*20\.000 \(0\.50\)</td>', html)
    assert f'**{escape_markdown(EVIL)}, seed 0**: failed' in markdown and ': it ended\n' in markdown
    assert f'**{escape_markdown(EVIL)}, seed 1**: unfinished\n' in markdown
    assert '<summary>it ended</summary>' in html
    assert '```\npython tools/compare.py --seeds 2\n```' in markdown and '- torch: 2.x' in markdown
    assert {'python tools/compare.py --seeds 2', 'Machine 1', '2.x'} <= set(text)


def test_of_a_cpu_no_absolute_times_are_shown(contents, tmp_path):
    write_report(replace(contents, environment={'device': 'CPU (x86_64)'}), tmp_path)
    text = (tmp_path / 'report.md').read_text()
    assert '| 0.50 (0.45 to 0.60) | 1 |' in text
    assert not re.search(r'\d ms', text)


def test_both_reports_begin_with_date_data_and_a_verdict(html, markdown):
    for text in (html, markdown):
        parts = ['2026-01-31, 4 of 6 trainings finished', 'val set data/pets/val.json, 12 images with 34 objects',
                 'In short', 'smaller loses AP (-0.100), spares peak memory of a training step.', '95 % over seeds']
        places = [text.replace('&#39;', "'").index(part) for part in parts]
        assert places == sorted(places)


def test_the_verdict_says_where_nothing_was_learned_and_what_the_seeds_cannot_tell():
    open_ = Difference(.01, (-.1, .1), (-.2, .2), 'open')
    variants = [make_variant('base', (.4, .5)), make_variant('same', (.4, .6), open_, cost=1.),
                make_variant('dead', (.01, .012), Difference(-.4)), make_variant('young')]
    assert verdict(make_contents(variants)) == (
        "same may keep the baseline's AP or not (+0.010), spares neither memory nor time. "
        'dead has learned nothing (AP 0.011). young isn\'t trained yet.')
    variants = [make_variant('base', (.01,)), make_variant('other', (.015,), Difference(.005))]
    assert verdict(make_contents(variants)).startswith('Nothing was learned: AP 0.010 of the baseline')
    assert verdict(make_contents([make_variant('base')])).startswith('Nothing is known of AP yet')


def test_report_of_one_seed_or_of_nothing_says_so(tmp_path):
    variants = [make_variant('base', (.4,)), make_variant('other', (.3,), Difference(-.1))]
    write_report(make_contents(variants, [make_run('base', 0, .4), make_run('other', 0, .3)], 1), tmp_path)
    for name in ('report.html', 'report.md'):
        text = (tmp_path / name).read_text(encoding='utf-8').replace('&#39;', "'")
        assert 'one seed' in text and 'nothing is called better or worse in AP' in text
    variants = [VariantResult('base', 'base.py', {}),
                VariantResult('other', 'base.py', {'k': 2}, cost_error='RuntimeError: too big')]
    write_report(Contents([], {'device': 'CPU'}, '', 'val.json', None, None, ['bbox'], 3, variants, []),
                 tmp_path)
    assert 'Nothing is known of AP yet' in (tmp_path / 'report.md').read_text(encoding='utf-8')
    assert "**other**: its cost couldn't be measured (RuntimeError: too big)" in (tmp_path / 'report.md').read_text()
    assert not list((tmp_path / 'figures').iterdir())


@pytest.mark.parametrize('text, escaped', [
    ('a|b', r'a\|b'), ('<b> & c', '&lt;b> &amp; c'), ('two\nlines', 'two lines'), ('*x* `y`', r'\*x\* \`y\`'),
    ('rl-r34_fpn', 'rl-r34_fpn'), ('_x_', r'\_x\_')])
def test_escape_markdown(text, escaped):
    assert escape_markdown(text) == escaped


def legend(figure):
    return [text.get_text() for each in figure.legends for text in each.get_texts()]


def test_pareto_draws_means_at_their_cost_and_the_front_that_nothing_beats():
    assert pareto_front([(3., .5), (1., .2), (2., .1), (2., .4), (4., .5)]) == [1, 3, 0]
    assert pareto_front([(1., .3), (1., .3), (1., .2)]) == [0, 1]
    figure = pareto(make_contents([make_variant('base', (.3, .5)), make_variant('small', (.2, .4), cost=.5)]), 'bbox')
    parameters, _, _, times = figure.axes
    points = [line.get_xydata()[0].tolist() for container in parameters.containers for line in container[:1]]
    assert np.allclose(points, [[40, .4], [20, .3]])
    assert np.allclose(parameters.lines[0].get_xydata(), [[20, .3], [40, .4]])
    across, along = times.containers[0][2]
    assert np.allclose(across.get_segments()[0], [[.9, .4], [1.2, .4]])  # the range of the rounds
    assert np.allclose(along.get_segments()[0][:, 1], [.4 - math.sqrt(.02), .4 + math.sqrt(.02)])
    assert not pareto(make_contents([make_variant('base', (.3,))], seeds=1), 'bbox').axes[0].containers[0].has_yerr
    for variant in (make_variant('base'), make_variant('base', (.3,), cost=None)):
        assert pareto(make_contents([variant]), 'bbox') is None


def test_styles_tell_ten_variants_apart_without_colours():
    looks = styles(make_contents([make_variant(str(i)) for i in range(10)])).values()
    assert len({look['marker'] for look in looks}) == 10
    assert len({(look['color'], look['linestyle']) for look in looks}) == 10


def test_curves_draw_finished_trainings_where_there_are_any():
    runs = [make_run('base', 0, curve=[(1, .4), (2, .5)]), make_run('base', 1, None, 'failed', curve=[(1, .9)]),
            make_run('other', 0, None, 'unfinished', curve=[(1, .1)])]
    figure = curves(make_contents([make_variant('base'), make_variant('other'), make_variant('silent')], runs))
    assert figure.axes[0].get_ylabel() == 'Box AP on the val set'
    assert [line.get_ydata().tolist() for line in figure.axes[0].lines] == [[.4, .5], [.1]]
    assert legend(figure) == ['base', 'other']
    assert curves(make_contents([make_variant('base')], [make_run('base')])) is None
