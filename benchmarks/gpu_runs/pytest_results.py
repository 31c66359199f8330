"""A pytest plugin that writes each test's result at once, so that a run that is stopped keeps its results.

One line of JSON for each test, appended to the file that the environment variable GPU_CHECKS_RESULTS names.
"""
import json
import os
from typing import Any


def pytest_runtest_logreport(report: Any) -> None:
    if 'PYTEST_XDIST_WORKER' in os.environ or (report.when != 'call' and report.passed):
        return  # the process that spreads the tests hears of all of them
    result = dict(name=report.nodeid, result=report.outcome, seconds=round(report.duration, 2), reason=_reason(report),
                  traceback=report.longreprtext[-3000:] if report.failed else '')
    with open(os.environ['GPU_CHECKS_RESULTS'], 'a') as file:
        file.write(json.dumps(result) + '\n')


def _reason(report: Any) -> str:
    """The first line of what was said."""
    if report.passed:
        return ''
    crash = getattr(report.longrepr, 'reprcrash', None)
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else crash.message if crash else report.longreprtext
    return next((line.strip() for line in text.splitlines() if line.strip()), '')
