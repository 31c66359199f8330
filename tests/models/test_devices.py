"""No replaced backbone mixes devices. It runs on fake CUDA tensors, which know where they lie and have no numbers."""
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rl_mmdet.replacement import FUSIONS, computing_layers, set_step_

SLIM = dict(type='SlimBlock')
RUNS = [(name, fusion, operator)
        for name, operator in (('RLResNet', None), ('RLResNet', SLIM), ('RLSwin', None), ('RLSwin', SLIM),
                               ('RLViT', None), ('RLViT', SLIM), ('MobileNetV2', None))
        for fusion in (*FUSIONS.module_dict, 'adapt')]


@pytest.fixture
def on_fake_gpu():
    """Give what moves a model to a GPU that isn't there; the mode has to be on while it runs."""
    if torch.__version__ < (2, 3) and not torch.cuda.is_available():
        pytest.skip('before torch 2.3 a fake tensor needs a real GPU to move to')
    mode = FakeTensorMode()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    yield mode, lambda model: model._apply(lambda tensor: mode.from_tensor(tensor).to('cuda'))
    torch.__future__.set_overwrite_module_params_on_conversion(False)


def marks(fusion: str, operator: dict | None) -> tuple:
    """Light operators on tensors of other sizes in every run of the tests, the others where slow is on."""
    return () if operator and fusion == 'adapt' else (pytest.mark.slow,)


@pytest.mark.parametrize(('name', 'fusion', 'operator'), [
    pytest.param(*each, marks=marks(*each[1:]), id='-'.join([*each[:2], (each[2] or {}).get('type', 'FullBlock')]))
    for each in RUNS])
def test_replaced_backbone_runs_on_one_device(name, fusion, operator, cases, on_fake_gpu):
    mode, move = on_fake_gpu
    fusion = dict(type='TransformFusion', adapt=True) if fusion == 'adapt' else dict(type=fusion)
    model = cases[name].build(fusion=fusion, operator=operator)
    for layer in computing_layers(model).values():
        layer.gradient.recompute = False  # fake tensors can't be asked whether they share memory
    model.train()
    with mode:
        move(model)
        set_step_(model, 0)
        image = torch.empty(2, 3, 64, 64, device='cuda')
        assert {out.device.type for out in model(image)} == {'cuda'}
        with torch.no_grad():
            assert {out.device.type for out in model(image)} == {'cuda'}
        assert fusion['type'] == 'OwnWeights' or computing_layers(model)
