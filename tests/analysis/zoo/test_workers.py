import pytest

from rl_mmdet.analysis.zoo.workers import Worker

CHEAP = 'centernet/centernet_r18_8xb16-crop512-140e_coco.py'


@pytest.fixture(scope='module')
def worker():
    worker = Worker()
    yield worker
    worker.stop()


@pytest.fixture
def config(tmp_path):
    """Write a config of which reading alone does something."""
    def write(text):
        (tmp_path / 'config.py').write_text(text)
        return str(tmp_path / 'config.py')
    return write


def test_worker_ends_a_model_that_takes_too_long(worker, config):
    result = worker.check(config('import time\ntime.sleep(60)'), limit=0.5)
    assert (result.baseline, result.reason) == ('fails', 'took longer than 0.5 s')


def test_worker_survives_a_death(worker, config):
    result = worker.check(config('import os\nos._exit(3)'), limit=60)
    assert result.baseline == 'fails'
    assert result.reason.startswith('its process died (exit status 3')
    assert worker.check(config('x = 1'), limit=60).reason == 'holds no model: settings for other configs'


def test_worker_knows_that_the_baseline_ran_when_its_twin_takes_too_long(worker, config, monkeypatch):
    worker.check(config('x = 1'), limit=60)
    monkeypatch.setattr(worker, '_pipe', _silent_after_news(worker._pipe))
    result = worker.check(CHEAP, limit=60)
    assert (result.baseline, result.rl, result.reason) == ('runs', 'fails', 'took longer than 60 s')


def _silent_after_news(pipe):
    """A pipe that is heard of only once."""
    heard = []
    return type('Pipe', (), dict(send=pipe.send, poll=lambda limit: not heard and pipe.poll(limit),
                                 recv=lambda: heard.append(pipe.recv()) or heard[-1]))
