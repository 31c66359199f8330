"""Searches on a GPU: they resume from a state that lies there, and their seeds change no device's random numbers."""
import copy
import io

import pytest
import torch

from rl_mmdet.search import begin_search

pytestmark = pytest.mark.gpu

STEPS = 8
SEARCHES = {
    'LearnedPlan': dict(plan=dict(type='LearnedPlan', budget=dict(params=0.8)), gradient=dict(every=1)),
    'SWR': dict(plan=None, transfer=dict(type='SWR', budget=0.2)),
}


@pytest.fixture(params=SEARCHES)
def searched(request, build, device):
    """A backbone on the device, whose search can begin."""
    return build('r50', **copy.deepcopy(SEARCHES[request.param])).to(device)


def advance(search, x, steps):
    """Some steps of a training; returns the gates that were drawn."""
    model, gates = search.model, []
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    optimizer.register_step_pre_hook(lambda *_: search.look())
    for _ in range(steps):
        gates.append(search.sample())
        optimizer.zero_grad()
        sum(out.square().mean() for out in model(x)).backward()
        optimizer.step()
        search.learn()
    return gates


def test_resumed_from_a_state_on_the_device_it_goes_on_as_if_never_interrupted(searched, image, device):
    model, x = searched.double(), image.double().to(device)
    search = begin_search(model, STEPS)
    advance(search, x, 5)
    file = io.BytesIO()
    torch.save(search.state_dict(), file)
    twin = copy.deepcopy(model)
    expected = advance(search, x, STEPS - 5)
    file.seek(0)
    state = torch.load(file, map_location=device)  # as MMEngine's Runner.resume loads a checkpoint
    resumed = begin_search(twin, STEPS)
    resumed.load_state_dict(state)
    assert advance(resumed, x, STEPS - 5) == expected
    assert resumed.done
    assert resumed.best() == search.best()
    resumed.conclude_()
    twin(x)


def test_beginning_and_drawing_change_no_random_numbers(searched, device):
    def states():
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if device.type == 'cuda' else ())]

    before = states()
    begin_search(searched, STEPS).sample()
    assert all(map(torch.equal, states(), before))


def test_gates_have_their_gradients_in_half_precision(build, image, device):
    """They are sums over whole maps, far beyond the largest number in fp16."""
    gradients, scale = [], 1.
    for dtype in (torch.float32, torch.float16):
        model = build('r50', **copy.deepcopy(SEARCHES['LearnedPlan']), fold_norm=True).to(device)
        search = begin_search(model, STEPS)
        search.sample()
        with torch.autocast(device.type, torch.float16, enabled=dtype is torch.float16):
            outs = model(image.to(device))
        (scale * sum(out.float().square().mean() for out in outs)).backward()
        gradients.append(torch.stack([torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
                                      for leaf in search.leaves]).double() / scale)
        scale = 300_000 / gradients[0].abs().max().item()
    exact, half = gradients
    assert torch.isfinite(half).all()
    assert (half - exact).norm() < 0.1 * exact.norm()
