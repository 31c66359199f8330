"""Settings of the documentation's site: ``make docs`` builds it with Sphinx."""
import re
import sys
from pathlib import Path

from sphinx.util import logging

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

project = 'rl_mmdet'
author = 'rl_mmdet authors'
version = release = re.search(r"'(.+)'", (ROOT / 'rl_mmdet' / 'version.py').read_text())[1]

extensions = ['myst_parser', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon', 'sphinx.ext.mathjax', 'sphinx_copybutton']
exclude_patterns = ['_build']
myst_heading_anchors = 4
add_module_names = False
autodoc_inherit_docstrings = False  # nn.Module's texts say nothing about our modules
autodoc_member_order = 'bysource'
autodoc_typehints_format = 'short'
python_maximum_signature_line_length = 100
suppress_warnings = ['myst.header']  # results/*/report.md are made by tools/compare.py

html_theme = 'furo'
html_title = f'rl_mmdet {version}'
html_show_copyright = False
linkcheck_timeout = 20


def name_files_outside(app, docname, source):
    """Links that leave docs/ work in the repository only: the site says which file is meant."""
    folder = (ROOT / 'docs' / docname).parent

    def named(match):
        text, path = match.groups()
        target = (folder / path.partition('#')[0]).resolve()
        if target.is_relative_to(ROOT / 'docs'):
            return match[0]
        if not target.exists():
            logging.getLogger(__name__).warning('%s links to a file that is missing: %s', docname, path)
        name = target.relative_to(ROOT).as_posix()
        return f'`{name}`' if text.strip('`') in name else f'{text} (`{name}`)'
    source[0] = re.sub(r'(?<!!)\[([^\]]+)\]\((\.\./[^)\s]+)\)', named, source[0])


def setup(app):
    app.connect('source-read', name_files_outside)
