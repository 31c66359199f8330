"""Folded norms: the same outputs, gradients and state, less kept for backward, and plain wherever it must be."""
import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from mmcv.cnn import fuse_conv_bn
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rl_mmdet.folding import fold_norm_, unfold_norm_
from rl_mmdet.replacement import ComputingLayer, materialize, replace_blocks_
from rl_mmdet.replacement.flops import count_flops
from rl_mmdet.replacement.saved_bytes import saved_bytes

CONVS = {
    'square': dict(kernel_size=3, padding=1),
    'oblong': dict(kernel_size=(1, 3), padding=(0, 2), stride=(1, 2)),
    'dilation': dict(kernel_size=3, padding=2, dilation=2),
    'groups': dict(kernel_size=3, padding=1, groups=2),
    'depthwise': dict(kernel_size=3, padding=1, groups=4),
    'bias': dict(kernel_size=1, bias=True),
}
SLOTS = ('0.weight', '0.bias', '1.weight', '1.bias')
slow = pytest.mark.slow
WHOLE_GRAPHS = torch.__version__ >= (2, 3)  # before, forward hooks and marks break them


@pytest.fixture
def pair(randomise_):
    """A convolution and its norm in eval mode; the same numbers at every call."""
    def build(affine: bool = True, norm: type = nn.BatchNorm2d, **settings) -> nn.Sequential:
        conv = nn.Conv2d(4, 8, **dict(dict(kernel_size=3, bias=False), **settings))
        return randomise_(nn.Sequential(conv, norm(8, affine=affine))).double().eval()
    return build


def picture(batch: int = 2, channels: int = 4) -> Tensor:
    return torch.randn(batch, channels, 9, 7, generator=torch.Generator().manual_seed(1)).double()


def results(model: nn.Module, image: Tensor, for_image: bool = True) -> dict[str, Tensor]:
    """The output, and the gradient of everything that has one."""
    model.zero_grad()
    image = image.clone().requires_grad_(for_image)
    out = model(image)
    if out.requires_grad:
        (out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    found = {'out': out.detach(), 'image': image.grad} | {name: p.grad for name, p in model.named_parameters()}
    return {name: value.clone() for name, value in found.items() if value is not None}


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        assert (actual[name] - value).norm() <= tolerance * value.norm() + 1e-14, name


def kept(model: nn.Module, image: Tensor) -> int:
    image = image.clone().requires_grad_()
    return saved_bytes(model, lambda: model(image))


def folds(model: nn.Module, image: Tensor) -> bool:
    """Whether its convolutions fold their norms when the model runs: seen in the graph that it leaves."""
    todo, seen = [model(image.clone().requires_grad_()).grad_fn], set()
    while todo:
        node = todo.pop()
        if 'BatchNorm' in type(node).__name__:
            return False
        if node is not None and node not in seen:
            seen.add(node)
            todo += [parent for parent, _ in node.next_functions]
    return True


def within_layers(module: nn.Module) -> nn.Module | None:
    """What computing layers run, as folding asks for it."""
    return module.template if isinstance(module, ComputingLayer) else None


# The same numbers

@pytest.mark.parametrize(('name', 'norm'), [*((name, {}) for name in CONVS), ('square', dict(affine=False)),
                                            ('square', dict(norm=nn.SyncBatchNorm))], ids=str)
def test_gradients_equal_plain_autograd(pair, name, norm):
    model, image = pair(**norm, **CONVS[name]), picture(3)
    expected = results(model, image)
    assert fold_norm_(model) == fold_norm_(model) == ['0']
    assert folds(model, image)
    assert_equal(results(model, image), expected)


@pytest.mark.parametrize('for_image', [True, False])
@pytest.mark.parametrize('learns', [(), *((slot,) for slot in SLOTS), SLOTS[2:]])
def test_frozen_parameters_need_no_gradient(pair, learns, for_image):
    model, image = pair(bias=True), picture()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in learns)
    expected = results(model, image, for_image)
    fold_norm_(model)
    assert_equal(results(model, image, for_image), expected)
    assert set(expected) - {'out', 'image'} == set(learns)
    assert kept(model, image) == (image.numel() + model[0].weight.numel()) * 8


def exchange_weight(conv: nn.Module) -> None:
    conv.weight = nn.Parameter(conv.weight * 3, requires_grad=False)


def write_to_data(conv: nn.Module) -> None:
    conv.weight.data.mul_(3)
    conv.train(conv.training)


@pytest.mark.parametrize('change', [
    lambda conv: conv.load_state_dict({'weight': conv.weight * 3}), exchange_weight, write_to_data, lambda conv: None])
def test_what_is_frozen_is_folded_once_and_again_when_it_has_changed(pair, change):
    model, image = pair().requires_grad_(False), picture().requires_grad_()
    fold_norm_(model)
    before = model(image).grad_fn._saved_weight
    assert model(image).grad_fn._saved_weight.data_ptr() == before.data_ptr()
    change(model[0])
    copied = copy.deepcopy(model)
    copied[0].weight.data.mul_(2)
    for each in (model, copied.train().eval()):
        actual = results(each, image)
        unfold_norm_(each)
        assert_equal(actual, results(each, image))


def test_instead_of_what_lies_between_the_folded_weight_is_kept_and_nothing_more_is_computed(pair):
    def flops() -> int:
        return count_flops(lambda: model(image.clone().requires_grad_()).sum().backward())

    model, image = pair(padding=1), picture()
    plain, cost = kept(model, image), flops()
    fold_norm_(model)
    assert kept(model, image) == (image.numel() + model[0].weight.numel()) * 8
    assert plain == 3 * image.numel() * 8
    assert flops() == cost


def test_without_gradient_it_is_bitwise_the_plain_result(pair):
    model, image = pair(), picture()
    with torch.no_grad():
        expected = model(image)
        fold_norm_(model)
        assert torch.equal(model(image), expected)


def test_a_norm_that_trains_or_lost_its_statistics_is_not_folded(pair):
    model, image = pair().train(), picture()
    twin = copy.deepcopy(model)
    fold_norm_(model)
    assert not folds(model, image)
    twin(image)
    assert_equal(results(model, image), results(twin, image), 0)
    assert all(torch.equal(buffer, twin.get_buffer(name)) for name, buffer in model.named_buffers())
    model.eval()[1].running_mean = model[1].running_var = None
    assert not folds(model, image)


@pytest.mark.parametrize('autocast', [True, False], ids=['autocast', 'bfloat16'])
def test_bfloat16_is_near_and_has_the_same_dtypes(pair, autocast):
    model, image = pair(bias=True, padding=1).float(), picture().float()
    expected = results(model, image)
    if not autocast:
        model, image = model.bfloat16(), image.bfloat16()
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        plain = results(model, image)
        fold_norm_(model)
        folded = results(model, image)
        assert kept(model, image) == (image.numel() + model[0].weight.numel()) * 2
    for name, value in expected.items():
        assert folded[name].dtype == plain[name].dtype
        error = (folded[name] - value).norm() / value.norm()
        assert error < 0.02, name
        assert error < 3 * (plain[name] - value).norm() / value.norm() + 1e-3, name


def test_channels_last_stays(pair):
    model = pair()
    fold_norm_(model)
    image = picture().to(memory_format=torch.channels_last).requires_grad_()
    out = model(image)
    out.square().sum().backward()
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert image.grad.is_contiguous(memory_format=torch.channels_last)


def test_what_cant_be_done_raises(pair):
    model, image = pair(), picture().requires_grad_()
    fold_norm_(model)
    with pytest.raises(ValueError, match='expected 4D input'):
        model(picture()[0])
    [grad] = torch.autograd.grad(model(image).square().sum(), model[0].weight, create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'):
        grad.sum().backward()
    out = model(image)
    with torch.no_grad():
        model[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match='inplace'):
        out.sum().backward()


@pytest.mark.parametrize('name', ['1.weight', '1.running_mean', '1.running_var'])
def test_gradients_are_those_of_the_forward_run(pair, name):
    expected, model, image = results(pair(), picture()), pair(), picture().requires_grad_()
    fold_norm_(model)
    out = model(image)
    with torch.no_grad():
        model.state_dict()[name].mul_(2)
    (out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    assert_equal({name: parameter.grad for name, parameter in model.named_parameters()},
                 {name: expected[name] for name, _ in model.named_parameters()})


# Several convolutions folded together

class Branches(nn.Module):
    """Convolutions with norms: weights of several sizes, with and without biases, some frozen; one may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8)).requires_grad_(False)
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
                                  nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6, affine=False))
        self.side = nn.Sequential(nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6))
        self.alone = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.body(x) if self.alone else self.body(x) + self.side(x)


@pytest.fixture
def branches(randomise_):
    def build() -> nn.Module:
        return randomise_(Branches()).double().eval()
    return build


@pytest.mark.parametrize('change', [
    lambda model: model, lambda model: setattr(model, 'alone', True), lambda model: model.body[1].requires_grad_(False),
    lambda model: setattr(model, 'body', Checkpointed(*model.body)), lambda model: model.side[1].train(),
    lambda model: model.to(memory_format=torch.channels_last)],
    ids=['all', 'one_not_run', 'norm_frozen', 'one_checkpointed', 'norm_trains', 'channels_last'])
def test_folded_together_gradients_equal_plain_autograd(branches, change):
    """In a second step, too, after the weights have changed in place."""
    plain, model, image = branches(), branches(), picture()
    assert len(fold_norm_(model)) == 4
    for net in (plain, model):
        change(net)
    for _ in range(2):
        assert_equal(results(model, image), results(plain, image))
        with torch.no_grad():
            for net in (plain, model):
                for tensor in net.state_dict().values():
                    tensor.mul_(2)


def test_folded_together_in_autocast(branches):
    model, image = branches().float(), picture().float()
    expected = results(model, image)
    with torch.autocast('cpu', torch.bfloat16):
        plain = results(model, image)
        fold_norm_(model)
        folded = results(model, image)
    for name, value in expected.items():
        assert folded[name].dtype == plain[name].dtype
        assert (folded[name] - value).norm() < 3 * (plain[name] - value).norm() + 1e-3 * value.norm(), name


def test_after_a_run_that_failed_parts_compute_with_the_weights_of_now(branches):
    plain, model, image = branches(), branches(), picture()
    fold_norm_(model)
    with pytest.raises(RuntimeError):
        model(picture(channels=5))
    model(image)
    for net in (plain, model):
        net.stem[0].weight.data.mul_(2)
    assert_equal(results(model.stem, image), results(plain.stem, image))


# What others do with the model

def test_unfolded_it_is_as_before(pair, assert_same_state):
    model, image = pair(), picture()
    expected, before = results(model, image), {key: value.clone() for key, value in model.state_dict().items()}
    fold_norm_(model)
    assert_same_state(model.state_dict(), before)
    assert isinstance(model[0], nn.Conv2d) and isinstance(model[1], nn.BatchNorm2d)
    for _ in range(2):
        unfold_norm_(model)
        assert [type(module) for module in model] == [nn.Conv2d, nn.BatchNorm2d]
        assert_equal(results(model, image), expected, 0)


class Checkpointed(nn.Sequential):
    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=self.reentrant)


class ReentrantlyCheckpointed(Checkpointed):
    reentrant = True


def replicated(model: nn.Module) -> nn.Module:
    """As DataParallel does it: replicas share their attributes with the original, which is on another device."""
    replicas = [module._replicate_for_data_parallel() for module in model]
    for replica, module in zip(replicas, model, strict=True):
        replica._parameters = module._parameters
    return nn.Sequential(*replicas)


def copied_from_zeros(model: nn.Module, duplicate: Callable) -> nn.Module:
    twin = duplicate(model)
    with torch.no_grad():
        model[1].weight.zero_()
    return twin


@pytest.mark.parametrize(('use', 'folding'), [
    (lambda model: copied_from_zeros(model, copy.deepcopy), True),
    (lambda model: copied_from_zeros(model, lambda net: pickle.loads(pickle.dumps(net))), True),
    (lambda model: Checkpointed(*model), None), (lambda model: ReentrantlyCheckpointed(*model), None),
    (replicated, False), (lambda model: nn.SyncBatchNorm.convert_sync_batchnorm(model).eval(), False),
    (lambda model: torch.jit.trace(model, picture()), False),
], ids=['deepcopy', 'pickle', 'checkpoint', 'reentrant', 'data_parallel', 'sync_batch_norm', 'trace'])
def test_used_by_others_it_computes_the_same(pair, use, folding):
    model, image = pair(), picture()
    expected = results(model, image)
    fold_norm_(model)
    used = use(model)
    assert folding is None or folds(used, image) == folding
    assert_equal(results(used, image), expected)


@pytest.mark.parametrize('exchange', [
    lambda model: model.__setitem__(0, nn.Conv2d(4, 8, 3).double()),
    lambda model: model.__setitem__(1, nn.GroupNorm(2, 8).double()), fuse_conv_bn], ids=['conv', 'norm', 'fuse'])
def test_once_one_was_exchanged_the_other_is_plain(pair, exchange):
    model, twin, image = pair(), pair(), picture()
    fold_norm_(model)
    for net in (model, twin):
        torch.manual_seed(0)
        exchange(net)
    assert_equal(results(model, image), results(twin, image), 1e-12)


@pytest.mark.parametrize('tamper', [
    lambda conv: setattr(conv, 'forward', lambda x: F.conv2d(x, conv.weight)),  # as MMCV's ConvModule does
    lambda conv: conv.register_forward_hook(lambda module, args, out: out.clone())], ids=['forward', 'hook'])
def test_what_nobody_knows_to_be_normalised_raises(pair, tamper):
    model = pair()
    fold_norm_(model)
    tamper(model[0])
    with pytest.raises(RuntimeError, match='fold_norm: a BatchNorm was to hand on .* call unfold_norm_'):
        model(picture())


def test_compilers_get_the_plain_layers(pair):
    model, image, graphs = pair(), picture(), []
    expected = results(model, image)
    fold_norm_(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=lambda graph, _: graphs.append(graph.code) or graph.forward,
                             fullgraph=WHOLE_GRAPHS)
    assert_equal(results(compiled, image), {
        name if name in ('out', 'image') else f'_orig_mod.{name}': value for name, value in expected.items()})
    assert len(graphs) == 1 or not WHOLE_GRAPHS
    assert 'batch_norm' in ''.join(graphs)
    norm = torch.compile(model[1], backend='eager')  # behind a convolution that isn't compiled
    torch.testing.assert_close(norm(model[0](image)), expected['out'])


@pytest.mark.skipif(not WHOLE_GRAPHS, reason='torch before 2.3 exports no model with forward hooks: unfold_norm_ first')
def test_exported(pair):
    model, image = pair(), picture()
    expected = results(model, image)
    fold_norm_(model)
    torch.testing.assert_close(torch.export.export(model, (image,)).module()(image), expected['out'])


# With computing layers

@pytest.fixture
def replaced(toy_net, randomise_):
    """A ToyNet with every second block replaced, in eval mode."""
    def build(**settings) -> nn.Module:
        model = randomise_(toy_net())
        settings['gradient'] = dict(dict(every=1), **settings.get('gradient', {}))
        replace_blocks_(model, dict(plan=dict(type='EveryKth', k=2), **settings))
        return model.double().eval()
    return build


@pytest.mark.parametrize('settings', [
    dict(gradient=dict(mode='coupled')), dict(gradient=dict(recompute=True)),
    pytest.param(dict(fusion=dict(type='TransformFusion')), marks=slow),
    dict(operator=dict(type='SlimBlock')),
], ids=str)
def test_computing_layers(replaced, settings):
    model, image = replaced(**settings), picture(channels=3)
    expected, plain = results(model, image), kept(model, image)
    names = fold_norm_(model, within_layers)
    assert len(names) == (12 if 'operator' in settings else 18)
    assert_equal(results(model, image), expected)
    assert kept(model, image) < plain
    twin = copy.deepcopy(model)
    for tensor in model.state_dict().values():
        tensor.zero_()
    assert_equal(results(twin, image), expected)


def test_materialized_and_unfolded_a_model_is_ordinary(replaced):
    model, image = replaced(), picture(channels=3)
    expected = results(model, image)['out']
    fold_norm_(model, within_layers)
    plain = materialize(model)
    torch.testing.assert_close(plain(image), expected)
    unfold_norm_(plain)
    torch.testing.assert_close(plain(image), expected)
    assert {type(m) for m in plain.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))} == {
        nn.Conv2d, nn.BatchNorm2d}


def test_replacing_blocks_of_a_folded_model(toy_net, randomise_, replaced):
    image, model = picture(channels=3), randomise_(toy_net())
    fold_norm_(model)
    replace_blocks_(model, dict(plan=dict(type='EveryKth', k=2), gradient=dict(every=1)))
    assert_equal(results(model.double().eval(), image), results(replaced(), image))
