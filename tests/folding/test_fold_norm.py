"""Folded norms: the same outputs, gradients and state, less kept for backward, and plain wherever it must be."""
import copy
import io

import pytest
import torch
import torch.nn.functional as F
from mmcv.cnn import fuse_conv_bn
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rl_mmdet.analysis import count_flops, saved_bytes
from rl_mmdet.folding import fold_norm_, unfold_norm_
from rl_mmdet.folding.fold_norm import MARK, FoldedBatchNorm2d, FoldingConv2d, _FoldedNorm
from rl_mmdet.replacement import computing_layers, materialize, replace_blocks_

CONVS = {
    'square': dict(kernel_size=3, padding=1),
    'pointwise': dict(kernel_size=1),
    'stride': dict(kernel_size=3, padding=1, stride=2),
    'oblong': dict(kernel_size=(1, 3), padding=(0, 2), stride=(1, 2)),
    'dilation': dict(kernel_size=3, padding=2, dilation=2),
    'groups': dict(kernel_size=3, padding=1, groups=2),
    'depthwise': dict(kernel_size=3, padding=1, groups=4),
    'bias': dict(kernel_size=3, bias=True),
}
SLOTS = ('0.weight', '0.bias', '1.weight', '1.bias')
EVERY_SECOND = dict(plan=dict(type='EveryKth', k=2))


@pytest.fixture
def pair(randomise_):
    """A convolution and its norm in eval mode; the same numbers at every call."""
    def build(affine: bool = True, norm: type = nn.BatchNorm2d, **settings) -> nn.Sequential:
        conv = nn.Conv2d(4, 8, **dict(dict(kernel_size=3, bias=False), **settings))
        return randomise_(nn.Sequential(conv, norm(8, affine=affine))).double().eval()
    return build


def picture(batch: int = 2, channels: int = 4, size: tuple[int, int] = (9, 7)) -> Tensor:
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(1)).double()


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


def folds(model: nn.Module, image: Tensor) -> bool:
    """Whether some convolution folds its norm when the model runs."""
    todo = [model(image.clone().requires_grad_()).grad_fn]
    seen = set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if 'FoldedConvolution' in type(node).__name__:
            return True
        todo += [parent for parent, _ in node.next_functions]
    return False


def kept(model: nn.Module, image: Tensor) -> int:
    image = image.clone().requires_grad_()
    return saved_bytes(model, lambda: model(image))


# The same numbers

@pytest.mark.parametrize('batch', [1, 3])
@pytest.mark.parametrize('affine', [True, False])
@pytest.mark.parametrize('name', CONVS)
def test_gradients_equal_plain_autograd(pair, name, affine, batch):
    model, image = pair(affine, **CONVS[name]), picture(batch)
    expected = results(model, image)
    assert fold_norm_(model) == ['0']
    assert folds(model, image)
    assert not hasattr(model(image), MARK)
    assert_equal(results(model, image), expected)


@pytest.mark.parametrize('for_image', [True, False])
@pytest.mark.parametrize('learns', [(), *((slot,) for slot in SLOTS), SLOTS[:2], SLOTS[2:], SLOTS[1:3]])
def test_frozen_parameters(pair, learns, for_image):
    model, image = pair(bias=True), picture()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in learns)
    expected = results(model, image, for_image)
    fold_norm_(model)
    assert_equal(results(model, image, for_image), expected)
    assert {name for name in expected if name not in ('out', 'image')} == set(learns)


@pytest.mark.parametrize(('learns', 'keeps_input'), [(SLOTS[:1], True), (SLOTS[2:3], True), (SLOTS[1:2], False),
                                                     (SLOTS[3:], False), ((), False)])
def test_the_input_is_kept_for_the_weights_alone(pair, learns, keeps_input):
    model, image = pair(bias=True), picture()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in learns)
    fold_norm_(model)
    assert kept(model, image) == keeps_input * image.numel() * 8


def test_nothing_between_is_kept(pair):
    model, image = pair(padding=1), picture()
    plain = kept(model, image)
    fold_norm_(model)
    assert kept(model, image) == image.numel() * 8
    assert plain == kept(model, image) + 2 * image.numel() * 8


def test_flops_are_the_same(pair):
    def step() -> int:
        return count_flops(lambda: model(picture().requires_grad_()).sum().backward())

    model = pair()
    plain = step()
    fold_norm_(model)
    assert step() == plain


def test_without_gradient_it_is_bitwise_the_plain_result(pair):
    model, image = pair(), picture()
    with torch.no_grad():
        expected = model(image)
        fold_norm_(model)
        assert torch.equal(model(image), expected)


def test_a_norm_that_trains_is_not_folded(pair):
    model, image = pair().train(), picture()
    twin = copy.deepcopy(model)
    fold_norm_(model)
    assert not folds(model, image)
    assert_equal(results(model, image), results(twin, image), 0)
    twin(image)
    assert all(torch.equal(buffer, twin.get_buffer(name)) for name, buffer in model.named_buffers())


def test_a_norm_that_lost_its_statistics_is_not_folded(pair):
    model, image = pair(), picture()
    fold_norm_(model)
    model[1].running_mean = model[1].running_var = None
    twin = nn.Sequential(nn.Conv2d(4, 8, 3, bias=False), nn.BatchNorm2d(8, track_running_stats=False)).double().eval()
    twin.load_state_dict(model.state_dict(), strict=False)
    assert_equal(results(model, image), results(twin, image))


@pytest.mark.parametrize('mode', [True, False], ids=['autocast', 'bfloat16'])
def test_bfloat16_is_near_and_has_the_same_dtypes(pair, mode):
    model, image = pair(bias=True, padding=1).float(), picture().float()
    expected = results(model, image)
    if not mode:
        model, image = model.bfloat16(), image.bfloat16()
    with torch.autocast('cpu', torch.bfloat16, enabled=mode):
        plain = results(model, image)
        fold_norm_(model)
        folded = results(model, image)
    assert {name: value.dtype for name, value in folded.items()} == {n: value.dtype for n, value in plain.items()}
    for name, value in expected.items():
        error = (folded[name] - value).norm() / value.norm()
        assert error < 0.02, name
        assert error < 3 * (plain[name] - value).norm() / value.norm() + 1e-3, name


def test_half_precision_norms_are_folded_in_float32():
    model = nn.Sequential(nn.Conv2d(64, 64, 1, groups=64, bias=False), nn.BatchNorm2d(64)).bfloat16().eval()
    with torch.no_grad():
        model[0].weight.fill_(1)
        model[1].weight.uniform_(0.3, 1.2)
        model[1].running_var.uniform_(0.5, 2)
    fold_norm_(model)
    scale = model[1].weight.float() / (model[1].running_var.float() + model[1].eps).sqrt()
    out = model(torch.ones(1, 64, 1, 1, dtype=torch.bfloat16))
    assert torch.equal(out.flatten(), scale.bfloat16())


def test_autocast_keeps_the_input_in_its_dtype(pair):
    model, image = pair().float(), picture().float()
    fold_norm_(model)
    with torch.autocast('cpu', torch.bfloat16):
        assert kept(model, image) == image.numel() * 2


@pytest.mark.parametrize('kind', ['square', 'pointwise', 'groups'])
def test_channels_last_stays(pair, kind):
    model = pair(**CONVS[kind])
    fold_norm_(model)
    image = picture().to(memory_format=torch.channels_last).requires_grad_()
    out = model(image)
    out.square().sum().backward()
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert image.grad.is_contiguous(memory_format=torch.channels_last)


def test_an_input_of_three_dimensions_is_refused_as_ever(pair):
    model = pair()
    fold_norm_(model)
    with pytest.raises(ValueError, match='expected 4D input'):
        model(picture()[0])


@pytest.mark.parametrize('name', ['0.weight', '1.weight', '1.running_mean', '1.running_var'])
def test_changes_in_place_before_backward_raise(pair, name):
    model = pair()
    fold_norm_(model)
    out = model(picture().requires_grad_())
    with torch.no_grad():
        model.state_dict()[name].mul_(2)
    with pytest.raises(RuntimeError, match='inplace'):
        out.sum().backward()


def test_double_backward_raises(pair):
    model, image = pair(), picture().requires_grad_()
    fold_norm_(model)
    [grad] = torch.autograd.grad(model(image).square().sum(), image, create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'):
        grad.sum().backward()


# Which convolutions

class Net(nn.Module):
    """A pair ``conv``, ``norm``, and what a case makes of it."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class TwoPlaces(Net):
    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(x)
        return self.norm(out) + out


class CalledTwice(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + self.conv(x)


class BothCalledTwice(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + self.norm(self.conv(-x))


class NormCalledTwice(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + self.norm(x)


class Between(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x).relu())


class NoGradientHalfway(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            out = self.conv(x)
        return self.norm(out)


class OnlyInTraining(Net):
    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(x)
        return self.norm(out) + out if self.training else self.norm(out)


class OnlyWithFixedStatistics(Net):
    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(x)
        return self.norm(out) + out if self.training and not self.norm.training else self.norm(out)


class UnknownInEval(Net):
    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(x)
        return self.norm(out) if self.training or x.sum() > 0 else out


class OtherWay(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))

    def half_forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class OtherWayIsFine(OtherWay):
    def half_forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).relu()


class OtherWayIsUnknown(OtherWay):
    def half_forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.sum() > 0 else x


class Undecided(nn.Module):
    """Can't be traced."""

    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.inner = inner or Net()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if x.mean() < 100 + torch.rand(()) else x


class OptionalNorm(Net):
    def forward(self, x: Tensor, norm: bool = True) -> Tensor:
        out = self.conv(x)
        return self.norm(out) if norm else out


def hooked() -> nn.Module:
    model = Net()
    model.conv.register_forward_hook(lambda *_: None)
    return model


def tied() -> nn.Module:
    first, second = Net(), Net()
    second.conv = first.conv
    return nn.Sequential(first, second)


def tied_out_of_sight() -> nn.Module:
    first, second = tied()
    return nn.ModuleList([Undecided(first), Undecided(second)])


def padded(**settings) -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 4, 3, **settings), nn.BatchNorm2d(4))


class OwnConv(nn.Conv2d):
    """Might compute anything."""


class OwnNorm(nn.BatchNorm2d):
    """Might compute anything."""


@pytest.mark.parametrize('build', [
    TwoPlaces, CalledTwice, BothCalledTwice, NormCalledTwice, Between, NoGradientHalfway, OnlyInTraining,
    OnlyWithFixedStatistics, UnknownInEval, OtherWay, OtherWayIsUnknown, hooked, tied, tied_out_of_sight,
    lambda: padded(padding='same'), lambda: padded(padding=1, padding_mode='reflect'),
    lambda: Net(conv=OwnConv(4, 4, 1)), lambda: Net(norm=OwnNorm(4)),
    lambda: Net(norm=nn.GroupNorm(2, 4)), lambda: Net(norm=nn.BatchNorm2d(4, track_running_stats=False)),
    lambda: nn.Linear(4, 4)])
def test_left_out(build, snapshot):
    model = build()
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf'fold_norm: {type(model).__name__} has no ordinary convolution whose output '
                                         'goes to one BatchNorm and nowhere else'):
        fold_norm_(model)
    assert snapshot(model)[0] == before[0]


@pytest.mark.parametrize(('build', 'names'), [
    (Net, ['conv']), (OtherWayIsFine, ['conv']), (OptionalNorm, ['conv']), (Undecided, ['inner.conv']),
    (lambda: nn.Sequential(Undecided(), Net(), TwoPlaces()), ['0.inner.conv', '1.conv']),
    (lambda: nn.ModuleDict(dict(a=Net(), b=TwoPlaces())), ['a.conv']),
    (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())), ['0'])])
def test_taken(build, names):
    model = build()
    assert sorted(fold_norm_(model)) == names
    assert [name for name, module in model.named_modules() if isinstance(module, FoldingConv2d)] == names


def test_looking_for_pairs_changes_nothing(snapshot):
    model = nn.Sequential(Undecided(), Net()).train()
    model[1].norm.eval()
    model[0].with_cp = True
    state = torch.get_rng_state()
    before = snapshot(model)
    fold_norm_(model)
    unfold_norm_(model)
    after = snapshot(model)
    assert after[0] == before[0]
    assert after[2:] == before[2:]
    assert all(torch.equal(value, before[1][key]) for key, value in after[1].items())
    assert model[0].with_cp
    assert torch.equal(torch.get_rng_state(), state)


def test_again_is_harmless(pair):
    model, image = pair(), picture()
    expected = results(model, image)
    assert fold_norm_(model) == fold_norm_(model)
    assert_equal(results(model, image), expected)
    unfold_norm_(model)
    unfold_norm_(model)
    assert [type(module) for module in model] == [nn.Conv2d, nn.BatchNorm2d]
    assert not vars(model[0]).keys() & {'plain_class', 'place_of_other'}
    assert_equal(results(model, image), expected, 0)


# What others do with the model

def test_state_dict_and_classes(pair, assert_same_state):
    model = pair()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fold_norm_(model)
    assert_same_state(model.state_dict(), before)
    assert isinstance(model[0], nn.Conv2d)
    assert isinstance(model[1], nn.BatchNorm2d)
    assert [name for name, _ in model.named_modules()] == ['', '0', '1']


@pytest.mark.parametrize('how', ['deepcopy', 'pickle'])
def test_copies_point_into_the_copy(pair, how):
    model, image = pair(), picture()
    expected = results(model, image)
    fold_norm_(model)
    if how == 'deepcopy':
        twin = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert twin[0].other() is twin[1]
    assert twin[1].other() is twin[0]
    with torch.no_grad():
        model[1].weight.zero_()
    assert folds(twin, image)
    assert_equal(results(twin, image), expected)


def test_data_parallel_replicas_are_plain(pair):
    """They share their attributes with the original, whose norm may be on another device."""
    model, image = pair(), picture()
    expected = results(model, image)
    fold_norm_(model)
    replicas = [module._replicate_for_data_parallel() for module in model]
    for replica, module in zip(replicas, model, strict=True):
        replica._parameters = module._parameters
    assert not folds(nn.Sequential(*replicas), image)
    assert_equal(results(nn.Sequential(*replicas), image), expected)


def test_sync_batch_norm_conversion_afterwards(pair):
    model, image = pair(), picture()
    expected = results(model, image)
    fold_norm_(model)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(model[1]) is nn.SyncBatchNorm
    assert not folds(model, image)
    assert_equal(results(model, image), expected)


def test_sync_batch_norm_is_folded(pair):
    model, image = pair(norm=nn.SyncBatchNorm), picture()
    expected = results(model, image)
    fold_norm_(model)
    assert folds(model, image)
    assert_equal(results(model, image), expected)
    unfold_norm_(model)
    assert type(model[1]) is nn.SyncBatchNorm


def test_fuse_conv_bn_afterwards(pair):
    model, image = pair(), picture()
    expected = results(model, image)['out']
    fold_norm_(model)
    model = fuse_conv_bn(model)
    assert type(model[1]) is nn.Identity
    torch.testing.assert_close(model(image.requires_grad_()), expected)


@pytest.mark.parametrize('exchanged', ['conv', 'norm'])
def test_an_exchanged_module_leaves_the_other_plain(pair, exchanged):
    model, image = pair(), picture()
    fold_norm_(model)
    twin = pair()
    if exchanged == 'conv':
        model[0] = twin[0] = copy.deepcopy(twin[0])
        with torch.no_grad():
            twin[0].weight.mul_(2)
    else:
        model[1] = twin[1] = nn.GroupNorm(2, 8).double()
    assert_equal(results(model, image), results(twin, image), 0)


def test_an_exchanged_forward_is_noticed(pair):
    """MMCV's ConvModule puts another forward into an instance: then nobody has normalised."""
    model = pair()
    fold_norm_(model)
    model[0].forward = lambda x: F.conv2d(x, model[0].weight)
    with pytest.raises(RuntimeError, match='fold_norm: a BatchNorm was to hand on .* call unfold_norm_'):
        model(picture())


def test_a_copied_output_is_noticed(pair):
    model = pair()
    fold_norm_(model)
    model[0].register_forward_hook(lambda module, args, out: out.clone())
    with pytest.raises(RuntimeError, match='fold_norm: a BatchNorm was to hand on'):
        model(picture())


def test_functional_call_with_other_weights(pair):
    model, image = pair(), picture()
    generator = torch.Generator().manual_seed(7)
    tensors = {name: torch.rand(p.shape, generator=generator, dtype=p.dtype, requires_grad=True)
               for name, p in model.named_parameters()}

    def gradients() -> dict[str, Tensor]:
        out = torch.func.functional_call(model, tensors, (image,))
        return dict(zip(tensors, torch.autograd.grad(out.square().sum(), list(tensors.values())), strict=True))

    expected = gradients()
    fold_norm_(model)
    assert_equal(gradients(), expected)


@pytest.mark.parametrize('reentrant', [True, False])
def test_checkpoint(pair, reentrant):
    model, image = pair(), picture()
    expected = results(model, image)
    fold_norm_(model)

    class Checkpointed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=reentrant)

    assert_equal(results(Checkpointed(*model), image), expected)


@pytest.mark.parametrize('fullgraph', [True, False])
def test_compiled(pair, fullgraph):
    model, image = pair(), picture()
    expected = results(model, image)
    fold_norm_(model)
    torch._dynamo.reset()
    assert_equal(results(torch.compile(model, backend='eager', fullgraph=fullgraph), image), {
        name if name in ('out', 'image') else f'_orig_mod.{name}': value for name, value in expected.items()})


def test_a_compiler_gets_the_plain_layers(pair):
    model, image, graphs = pair(), picture(), []
    fold_norm_(model)
    torch._dynamo.reset()
    torch.compile(model, backend=lambda graph, _: graphs.append(graph.code) or graph.forward)(image)
    assert len(graphs) == 1
    assert 'batch_norm' in graphs[0]


def test_a_compiled_norm_behind_a_convolution_that_is_not(pair):
    model, image = pair(), picture()
    expected = results(model, image)
    fold_norm_(model)
    torch._dynamo.reset()
    norm = torch.compile(model[1], backend='eager')
    torch.testing.assert_close(norm(model[0](image)), expected['out'])
    with torch.no_grad():
        torch.testing.assert_close(norm(model[0](image)), expected['out'])


def test_traced_and_exported(pair):
    model, image = pair(), picture()
    expected = results(model, image)
    fold_norm_(model)
    assert_equal(results(torch.jit.trace(model, image), image), expected, 1e-12)
    exported = torch.export.export(model, (image,)).module()
    torch.testing.assert_close(exported(image), expected['out'], rtol=1e-12, atol=1e-12)


# With computing layers

@pytest.fixture
def replaced(toy_net, randomise_):
    """A ToyNet with every second block replaced, in eval mode."""
    def build(**settings) -> nn.Module:
        model = randomise_(toy_net())
        replace_blocks_(model, dict(EVERY_SECOND, **settings))
        return model.double().eval()
    return build


@pytest.mark.parametrize('settings', [
    dict(), dict(gradient=dict(mode='coupled')), dict(gradient=dict(memory='recompute')),
    dict(fusion=dict(type='TransformFusion')), dict(operator=dict(type='SlimBlock')),
    dict(operator=dict(type='DepthwiseBlock'), gradient=dict(memory='rebuild'))], ids=str)
def test_computing_layers(replaced, settings):
    model, image = replaced(**settings), picture(channels=3)
    expected = results(model, image)
    names = fold_norm_(model)
    assert len(names) == 18 or 'operator' in settings
    assert_equal(results(model, image), expected)


def test_inside_computing_layers_less_is_kept_as_well(replaced):
    model, image = replaced().layer2[1], picture()
    plain = kept(model, image)
    assert sorted(fold_norm_(model)) == ['conv1', 'conv2']
    assert folds(model, image)
    bias = model.shapes['conv2.bias'].numel() * 8  # a synthesised one is kept for γ
    assert kept(model, image) == plain - 2 * image.numel() * 8 + bias


def test_layers_with_a_sampled_gradient_keep_their_way(replaced):
    model = replaced(gradient=dict(sample=1 / 2))
    names = fold_norm_(model)
    inside = tuple(f'{name}.' for name in computing_layers(model))
    assert names
    assert not [name for name in names if name.startswith(inside)]


def test_copies_of_computing_layers_point_into_the_copy(replaced):
    model = replaced()
    fold_norm_(model)
    twin = copy.deepcopy(model)
    own = set(twin.modules()) | {layer.template for layer in computing_layers(twin).values()}
    pairs = [module for module in twin.modules() if isinstance(module, (FoldingConv2d, _FoldedNorm))]
    assert len(pairs) == 36
    assert all(module.place_of_other[0] in own and module.other() in own for module in pairs)


def test_materialize_gives_ordinary_classes(replaced):
    model, image = replaced(), picture(channels=3)
    expected = results(model, image)['out']
    fold_norm_(model)
    plain = materialize(model)
    assert {type(module) for module in plain.modules() if isinstance(module, nn.Conv2d)} == {nn.Conv2d}
    assert {type(m) for m in plain.modules() if isinstance(m, nn.BatchNorm2d)} == {nn.BatchNorm2d}
    assert any(type(module) is FoldedBatchNorm2d for module in model.modules())
    torch.testing.assert_close(plain(image), expected)


def test_replacing_blocks_of_a_folded_model(toy_net, randomise_, replaced):
    image = picture(channels=3)
    model = randomise_(toy_net())
    fold_norm_(model)
    replace_blocks_(model, EVERY_SECOND)
    assert_equal(results(model.double().eval(), image), results(replaced(), image))
