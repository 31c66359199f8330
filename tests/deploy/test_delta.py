"""Delta files: what was changed and nothing else, exact, and only for their own base."""
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from rl_mmdet.deploy import apply_delta, delta_info, save_delta, state_hash
from rl_mmdet.engine import UserError


@pytest.fixture
def files(tmp_path):
    """A base and a task that has changed one tensor, replaced one by another shape, added one and removed one."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5)).state_dict()
    tuned = {key: value.clone() for key, value in model.items()}
    tuned['0.bias'][1] += 1e-7
    tuned['2.weight'] = torch.randn(7, 4)
    tuned['half'] = torch.randn(3, 2).bfloat16()
    del tuned['2.bias']
    torch.save(dict(state_dict=model, optimizer=dict(step=3)), tmp_path / 'base.pth')
    torch.save(dict(state_dict=tuned, meta=dict(
        dataset_meta=dict(classes=('a', 'b')), found=dict(type='Tensors'))), tmp_path / 'tuned.pth')
    return {name: str(tmp_path / name) for name in ('base.pth', 'tuned.pth', 'delta.safetensors', 'out.pth')}


@pytest.fixture
def delta(files):
    """The delta's own account of itself; the file is there."""
    return save_delta(files['base.pth'], files['tuned.pth'], files['delta.safetensors'])


def test_a_delta_holds_the_tensors_that_differ_and_nothing_else(files, delta):
    assert delta.tensors == {'0.bias': (4,), '2.weight': (7, 4), 'half': (3, 2)}
    assert delta.removed == ['2.bias']
    assert delta.numbers == 4 + 28 + 6
    assert set(load_file(files['delta.safetensors'])) == set(delta.tensors)
    assert delta_info(files['delta.safetensors']) == delta


def test_its_account_tells_the_parts_of_a_detector_apart(tmp_path):
    base = {'backbone.w': torch.ones(5), 'backbone.b': torch.ones(2), 'neck.w': torch.ones(3),
            'rpn_head.w': torch.ones(4)}
    tuned = base | {'backbone.w': torch.zeros(5), 'backbone.b': torch.zeros(2), 'rpn_head.w': torch.zeros(4)}
    for name, tensors in (('base', base), ('tuned', tuned)):
        torch.save(dict(state_dict=tensors), tmp_path / f'{name}.pth')
    info = save_delta(*(str(tmp_path / name) for name in ('base.pth', 'tuned.pth', 'task.safetensors')))
    assert str(info).startswith("3 tensors of 11 numbers (backbone 7, rpn_head 4), 78.6% of the base's 14;")


def test_applied_it_gives_the_same_checkpoint_bit_for_bit(files, delta, assert_same_state):
    apply_delta(files['base.pth'], files['delta.safetensors'], files['out.pth'])
    found, wanted = (torch.load(files[name], weights_only=True) for name in ('out.pth', 'tuned.pth'))
    assert_same_state(dict(sorted(found['state_dict'].items())), dict(sorted(wanted['state_dict'].items())))
    assert found['meta'] == dict(dataset_meta=dict(classes=['a', 'b']), found=dict(type='Tensors'))


def test_of_meta_it_keeps_what_can_be_written_down_and_no_more(tmp_path):
    base, tuned, delta, out = (str(tmp_path / name) for name in ('base.pth', 'tuned.pth', 'd.safetensors', 'out.pth'))

    def applied(**meta):
        for path, value in ((base, 0.), (tuned, 1.)):
            torch.save(dict(state_dict=dict(a=torch.ones(2), b=torch.tensor(value)), meta=meta), path)
        for path in (delta, out):
            Path(path).unlink(missing_ok=True)
        save_delta(base, tuned, delta)
        apply_delta(base, delta, out)
        return torch.load(out, weights_only=True)['meta']

    assert applied(dataset_meta=None, cfg='model = 1') == {}
    kept = applied(dataset_meta=dict(ids={2, 1}, mean=torch.ones(2)))
    assert kept == dict(dataset_meta=dict(ids=[1, 2], mean=[1, 1]))
    with pytest.raises(UserError, match=r"tuned\.pth: a delta can't keep its meta"):
        applied(dataset_meta=dict(device=torch.device('cpu')))


def test_another_base_is_refused_but_not_the_same_one_in_another_file(files, delta, tmp_path):
    base = torch.load(files['base.pth'], weights_only=True)['state_dict']
    save_file(dict(reversed(base.items())), tmp_path / 'base.safetensors')
    base['1.weight'][0] += 1
    torch.save(base, tmp_path / 'other.pth')
    with pytest.raises(UserError, match=r'other\.pth: not the base of this delta: .* hash is'):
        apply_delta(str(tmp_path / 'other.pth'), files['delta.safetensors'], files['out.pth'])
    assert not (tmp_path / 'out.pth').exists()
    apply_delta(str(tmp_path / 'base.safetensors'), files['delta.safetensors'], files['out.pth'])


def test_a_damaged_delta_is_refused(files, delta, tmp_path):
    content = bytearray((tmp_path / 'delta.safetensors').read_bytes())
    content[-1] ^= 1
    (tmp_path / 'delta.safetensors').write_bytes(content)
    with pytest.raises(UserError, match='it is damaged'):
        apply_delta(files['base.pth'], files['delta.safetensors'], files['out.pth'])


def test_files_are_not_overwritten(files, delta, tmp_path):
    (tmp_path / 'out.pth').write_text('mine')
    with pytest.raises(UserError, match='out.pth: exists already'):
        apply_delta(files['base.pth'], files['delta.safetensors'], files['out.pth'])
    with pytest.raises(UserError, match='delta.safetensors: exists already'):
        save_delta(files['base.pth'], files['tuned.pth'], files['delta.safetensors'])
    assert (tmp_path / 'out.pth').read_text() == 'mine'


def test_what_gives_no_delta_is_refused(files, tmp_path):
    with pytest.raises(UserError, match=r'a delta file is called \*\.safetensors'):
        save_delta(files['base.pth'], files['tuned.pth'], files['out.pth'])
    torch.save(dict(state_dict={'0.bias': torch.randn(4)}), tmp_path / 'tuned.pth')
    with pytest.raises(UserError, match='no tensor is the same'):
        save_delta(files['base.pth'], files['tuned.pth'], files['delta.safetensors'])


def test_what_is_no_delta_is_refused(tmp_path):
    path = tmp_path / 'delta.safetensors'
    with pytest.raises(UserError, match='there is no such file'):
        delta_info(str(path))
    path.write_bytes(b'rubbish')
    with pytest.raises(UserError, match='not a safetensors file'):
        delta_info(str(path))
    save_file({'x': torch.ones(2)}, path)
    with pytest.raises(UserError, match='not a delta file of this version'):
        delta_info(str(path))


@pytest.mark.parametrize('change', [
    {each: None} for each in ('base', 'result', 'base_numbers', 'removed', 'meta')] + [
    dict(base='0' * 63), dict(result='\x1b[31m'), dict(base_numbers='0'), dict(base_numbers='many'), dict(removed='3'),
    dict(removed='["a", 1, {"b": 2}'), dict(removed='[' * 9999), dict(meta='["a"'), dict(meta='3'),
    dict(meta='{"cfg": {}}'), dict(meta='{"found": 3}'),
    dict(removed='["\\u001b[31m"]')])
def test_metadata_that_no_delta_has_are_one_line(files, delta, change):
    with safe_open(files['delta.safetensors'], 'pt') as file:
        metadata = file.metadata() | change
    save_file({'0.bias': torch.ones(4)}, files['delta.safetensors'],
              {key: value for key, value in metadata.items() if value is not None})
    for read in (delta_info, lambda path: apply_delta(files['base.pth'], path, files['out.pth'])):
        with pytest.raises(UserError, match=r"delta\.safetensors: (it is damaged|a tensor .* '.x1b)") as caught:
            read(files['delta.safetensors'])
        assert str(caught.value).isprintable()


def test_state_hash_depends_on_key_type_shape_and_bits_not_on_order():
    a, b = torch.arange(6.), torch.ones(2)
    found = state_hash(dict(a=a, b=b))
    assert state_hash(dict(b=b, a=a.clone())) == found
    others = [dict(a=a, c=b), dict(a=a.double(), b=b), dict(a=a.view(2, 3), b=b), dict(a=-a, b=b), dict(a=a)]
    assert len({state_hash(each) for each in others} | {found}) == 6
