"""Lines on what the trainings of a comparison do, with an estimate of the time left for all of them."""
import json
import re
import time
from collections.abc import Callable, Sequence

from .comparison import Run

QUIET = 15.
"""Seconds between two lines on the progress of one training."""
EPOCH = re.compile(r'Epoch\(train\)\s*\[(\d+)\]\[\s*(\d+)/(\d+)\]')
ITERATION = re.compile(r'Iter\(train\)\s*\[\s*(\d+)/(\d+)\]')
Say = Callable[[str], None]


class Progress:
    """Says what happens; the time left is estimated at the mean rate of all trainings so far.

    That is the seconds of those that are finished, in this call or an earlier one, and of the running one since its
    first line, over the number of trainings that were done in them. So it doesn't jump with a slow iteration, a
    validation or the start of the next training.

    Args:
        runs: all trainings.
        say: gets the lines.
        jobs: how many trainings run side by side.
        clock: gives seconds.
    """

    def __init__(self, runs: Sequence[Run], say: Say, jobs: int = 1,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self.runs, self.say, self.jobs, self.clock = runs, say, jobs, clock

    def begin(self, run: Run, epochs: int | None) -> None:
        """The next training, and how many epochs it has; None for one by iterations."""
        self.run, self.epochs, self.spoken = run, epochs, float('-inf')
        self.first: tuple[float, float] | None = None
        self.before = [each for each in map(_seconds, self.runs) if each is not None]

    def phase(self, text: str) -> None:
        self.say(f'[{self.runs.index(self.run) + 1}/{len(self.runs)}] {self.run}: {text}')

    def line(self, text: str) -> None:
        """A line of the training's own log, of which few are shown, and only what matters."""
        left = self._left(text)
        if self.clock() - self.spoken < QUIET and 'Epoch(val)' not in text:
            return
        self.spoken = self.clock()
        where = re.match(r'(Epoch|Iter)\(\w+\)\s*(\[[^\]]*\]\s*)*', text)
        loss = re.search(r' loss: ([\d.einfa+-]+)', text)
        self.phase(' '.join([where[0].strip() if where else text, *([f'loss {float(loss[1]):.3f}'] if loss else []),
                             *re.findall(r'(?:bbox|segm)_mAP: [\d.-]+', text)]) + left)

    def _left(self, text: str) -> str:
        """The time left for all trainings; empty before anything is known, and for lines that don't count steps."""
        done = self._done(text)
        if done is None:
            return ''
        now = self.clock()
        self.first = self.first or (now, done)
        trainings = len(self.before) + done - self.first[1]
        if not trainings:
            return ''
        each = (sum(self.before) + now - self.first[0]) / trainings
        others = len(self.runs) - len(self.before) - 1
        left = max(1, round(each * (1 - done + others / self.jobs) / 60))
        return f'; all in about {left // 60} h {left % 60} min' if left >= 60 else f'; all in about {left} min'

    def _done(self, text: str) -> float | None:
        """The part of the running training that is done, 0 to 1."""
        if self.epochs and (found := EPOCH.search(text)):
            epoch, step, steps = map(int, found.groups())
            return (epoch - 1 + step / steps) / self.epochs
        if found := ITERATION.search(text):
            return int(found[1]) / int(found[2])
        return None


def _seconds(run: Run) -> float | None:
    """What a finished training has taken, its test included; None for others."""
    if not (run.folder / 'scores.json').is_file():
        return None
    return sum(json.loads((folder / 'cost.json').read_text())['seconds']
               for folder in (run.folder, run.folder / 'evaluation') if (folder / 'cost.json').is_file())
