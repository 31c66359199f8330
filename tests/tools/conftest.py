"""Running a tool as a user calls it."""
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / 'tools'


@pytest.fixture
def run_tool(run_script) -> Callable[[str], Callable]:
    """Give a function that runs a tool, as ``run_script`` does."""
    return lambda tool: partial(run_script, TOOLS / f'{tool}.py')
