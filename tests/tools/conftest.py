"""Running a tool as a user calls it."""
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / 'tools'


@pytest.fixture
def run_tool(monkeypatch, tmp_path, capsys) -> Callable[[str], Callable]:
    """Run a tool in this process, in an empty folder; returns its exit status and what it wrote."""
    monkeypatch.chdir(tmp_path)

    def named(tool: str) -> Callable:
        path = str(TOOLS / f'{tool}.py')

        def call(*args: object) -> tuple:
            monkeypatch.setattr(sys, 'argv', [path, *map(str, args)])
            try:
                runpy.run_path(path, run_name='__main__')
            except SystemExit as stop:
                return stop.code or 0, capsys.readouterr()
            return 0, capsys.readouterr()
        return call
    return named
