"""Fixtures for all tests: fixed seeds, a tiny plain-torch model with two chains, and randomised weights."""
import os
import random
import runpy
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor, nn

CONFIGS = Path(__file__).resolve().parents[1] / 'configs' / 'digits'
TINY = '''
_base_ = {base!r}
model = dict(backbone=dict(base_channels=4), neck=dict(in_channels=[4, 8, 16, 32]))
train_dataloader = dict(batch_size=2, dataset=dict(num_images=6, image_size=(64, 64), data_root={root!r}))
val_dataloader = dict(dataset=dict(num_images=2, image_size=(64, 64), data_root={root!r}))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file={root!r} + 'annotations/instances_val.json')
test_evaluator = val_evaluator
train_cfg = dict(max_epochs=1)
'''


class Unit(nn.Module):
    """A residual unit of two convolutions, smooth, so that finite differences meet no kink."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(channels)
        self.act = nn.SiLU()
        self.shortcut = nn.Conv2d(in_channels, channels, 1) if in_channels != channels else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        return self.act(out + (x if self.shortcut is None else self.shortcut(x)))


class ToyNet(nn.Module):
    """Chains ``layer1`` (3 units, the first on 3 channels, the others on 4) and ``layer2`` (6 equal units)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(Unit(3, 4), Unit(4, 4), Unit(4, 4))
        self.pool = nn.AvgPool2d(2)
        self.layer2 = nn.Sequential(*(Unit(4, 4) for _ in range(6)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer2(self.pool(self.layer1(x)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    rehearsed = os.environ.get('RL_MMDET_TEST_DEVICE') == 'cpu'
    if item.get_closest_marker('gpu') and not torch.cuda.is_available() and not rehearsed:
        pytest.skip('needs a CUDA device, torch finds none; RL_MMDET_TEST_DEVICE=cpu rehearses it')


@pytest.fixture(scope='session', autouse=True)
def one_thread() -> None:
    """Sums in one order, so that equal means equal."""
    torch.set_num_threads(1)


@pytest.fixture(scope='session', autouse=True)
def unformatted_configs() -> Iterator[None]:
    """MMEngine formats a config five times for every run, which takes longer than a tiny training."""
    with patch('yapf.yapflib.yapf_api.FormatCode', lambda text, **_: (text, True)):
        yield


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def toy_net() -> Callable[[], ToyNet]:
    """Build a :class:`ToyNet`, the same one at every call."""
    def build() -> ToyNet:
        torch.manual_seed(0)
        return ToyNet()
    return build


@pytest.fixture
def image() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope='session')
def randomise_() -> Callable[..., nn.Module]:
    """Give every parameter and every BatchNorm statistic a random value, in place."""
    @torch.no_grad()
    def randomise(model: nn.Module, seed: int = 1) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.copy_(torch.empty_like(parameter).uniform_(0.3, 1.2, generator=generator))
            else:
                fan_in = parameter[0].numel()
                parameter.copy_(torch.empty_like(parameter).normal_(0, fan_in ** -0.5, generator=generator))
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(0, 0.3, generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
        return model
    return randomise


@pytest.fixture
def snapshot() -> Callable[[nn.Module], tuple]:
    """All that surgery could change in a model: classes and modes, keys, tensors, who learns, hooks."""
    def take(model: nn.Module) -> tuple:
        modules = [(name, type(module), module.training) for name, module in model.named_modules()]
        tensors = {key: value.clone() for key, value in model.state_dict().items()}
        learns = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        return modules, tensors, learns, len(model._load_state_dict_pre_hooks)
    return take


@pytest.fixture
def assert_same_state() -> Callable[[dict, dict], None]:
    """Two state dicts have the same keys in the same order and bit-for-bit the same values."""
    def check(actual: dict, expected: dict) -> None:
        assert list(actual) == list(expected)
        for key, value in expected.items():
            assert torch.equal(actual[key], value), key
    return check


@pytest.fixture(scope='session')
def write_tiny_config() -> Callable[..., str]:
    """Write a config of a tiny detector on tiny digit scenes into a folder; see ``tiny_config``."""
    def write(folder: Path, name: str = 'atss_rl-r34-k2_fpn_digits.py', more: str = '') -> str:
        path = folder / f'tiny_{name}'
        path.write_text(TINY.format(base=str(CONFIGS / name), root=f'{folder}/digits/') + more)
        return str(path)
    return write


@pytest.fixture
def run_script(monkeypatch, tmp_path: Path, capsys) -> Callable[..., tuple]:
    """Run a script in this process as a user does, in an empty folder; returns its exit status and what it wrote."""
    monkeypatch.chdir(tmp_path)

    def run(path: Path, *arguments: object) -> tuple:
        monkeypatch.setattr(sys, 'argv', [str(path), *map(str, arguments)])
        try:
            runpy.run_path(str(path), run_name='__main__')
        except SystemExit as stop:
            return stop.code or 0, capsys.readouterr()
        return 0, capsys.readouterr()
    return run


@pytest.fixture
def tiny_config(write_tiny_config: Callable[..., str], tmp_path: Path) -> Callable[..., str]:
    """Write a config of a tiny detector on tiny digit scenes: ``name`` of configs/digits, with ``more`` appended."""
    return partial(write_tiny_config, tmp_path)
