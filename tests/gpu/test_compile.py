"""Replaced backbones compiled by inductor."""
import copy

import pytest
import torch
from torch._dynamo.backends.registry import lookup_backend

from rl_mmdet.replacement import set_step_

pytestmark = pytest.mark.gpu

EVERY = 2
FIRST_STAGE = dict(num_stages=1, strides=(1,), dilations=(1,), out_indices=(0,))
"""Three blocks, one of them replaced: compiling takes seconds for each."""


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize('operator', ['FullBlock', 'SlimBlock'])
def test_steps_equal_the_uncompiled_ones_and_there_are_two_graphs(operator, build, step, image, device, assert_near):
    model = build('r50', operator=dict(type=operator), gradient=dict(every=EVERY), **FIRST_STAGE).to(device)
    compiler = lookup_backend('inductor' if device.type == 'cuda' else 'aot_eager')  # C++ takes minutes on a CPU
    twin, graphs = copy.deepcopy(model), []

    def backend(graph, inputs):
        graphs.append(graph)
        return compiler(graph, inputs)

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    optimizers = [torch.optim.SGD(net.parameters(), lr=1e-3) for net in (model, twin)]
    for number in range(2 * EVERY):
        for net in (model, twin):
            set_step_(net, number, staggered=False)
        assert_near(step(model, image.to(device), forward=compiled), step(twin, image.to(device)))
        assert len(graphs) == min(number + 1, EVERY)
        for optimizer in optimizers:
            optimizer.step()
