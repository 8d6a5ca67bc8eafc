"""Files of tensors: shards and their index, formats, unreadable files."""

import json
import sys
import weakref

import numpy as np
import pytest

from eval_bridge.hf import weights
from tinyllama_jax import errors

ARRAYS = {
    'a': np.arange(6, dtype=np.float32).reshape(2, 3),
    'b': np.arange(40, dtype=np.float32),
    'c': np.full((1, 1), 7, np.float32),
    'd': np.arange(5, dtype=np.float32),
}


def _write(folder, dtype='float32', format='safetensors', **options):
    arrays = {name: array.astype(weights.DTYPES[dtype]) for name, array in ARRAYS.items()}
    tensors = {name: weights.Tensor(array.shape, lambda array=array: array) for name, array in arrays.items()}
    weights.write(folder, tensors, dtype=dtype, format=format, **options)


def _read(folder):
    return dict(weights.read(folder))


@pytest.fixture
def folder(tmp_path):
    _write(tmp_path)
    return tmp_path


@pytest.mark.parametrize('format', weights.FORMATS)
@pytest.mark.parametrize('dtype', weights.DTYPES)
def test_what_is_written_is_read(tmp_path, dtype, format):
    if format == 'pytorch':
        pytest.importorskip('torch')
    _write(tmp_path, dtype, format)
    arrays = _read(tmp_path)
    assert list(arrays) == list(ARRAYS)
    for name, array in arrays.items():
        np.testing.assert_array_equal(array.astype(np.float32), ARRAYS[name])
    if format == 'safetensors':
        assert {array.dtype for array in arrays.values()} == {weights.DTYPES[dtype]}


def test_shards_are_at_most_as_large_as_asked_and_indexed(tmp_path):
    _write(tmp_path, max_shard_bytes=44)  # b alone is larger than this; c and d are 24 bytes
    index = json.loads((tmp_path / 'model.safetensors.index.json').read_text())
    shards = [f'model-{number:05d}-of-00003.safetensors' for number in (1, 2, 3)]
    assert index['weight_map'] == dict(zip('abcd', (*shards, shards[2]), strict=True))
    assert index['metadata'] == {'total_size': 4 * (6 + 40 + 1 + 5)}
    assert sorted(path.name for path in tmp_path.glob('*.safetensors')) == shards
    for name, array in _read(tmp_path).items():
        np.testing.assert_array_equal(array, ARRAYS[name])


def test_a_tensor_is_made_when_it_is_written(tmp_path):
    made = []

    def array():
        assert all(reference() is None for reference in made), 'an earlier tensor is still in memory'
        made.append(weakref.ref(zeros := np.zeros(4, np.float32)))
        return zeros

    tensors = {name: weights.Tensor((4,), array) for name in 'abc'}
    weights.write(tmp_path, tensors, dtype='float32', format='safetensors')
    assert len(made) == 3


def _truncate(folder):
    data = (folder / 'model.safetensors').read_bytes()
    (folder / 'model.safetensors').write_bytes(data[:-100])


def _write_index(content):
    def spoil(folder):
        (folder / 'model.safetensors').unlink()
        (folder / 'model.safetensors.index.json').write_text(content)

    return spoil


def _write_tensor(dtype):
    header = json.dumps({'a': {'dtype': dtype, 'shape': [2], 'data_offsets': [0, 2]}}).encode()

    def spoil(folder):
        (folder / 'model.safetensors').write_bytes(len(header).to_bytes(8, 'little') + header + b'\1\2')

    return spoil


@pytest.mark.parametrize(
    ('spoil', 'named'),
    [
        (_truncate, r'model\.safetensors cannot be read'),
        (lambda folder: (folder / 'model.safetensors').unlink(), 'neither model.safetensors'),
        (_write_index('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'), 'names model-00001-of-00002'),
        (_write_index('{"weight_map"'), r'index\.json is not valid JSON'),
        (_write_index('{}'), r'index\.json is not an index of weights'),
        (_write_index('[]'), r'index\.json holds a list, not a JSON object'),
        (_write_index('{"weight_map": {"a": 5}}'), r'index\.json is not an index of weights'),
        (_write_tensor('F8_E4M3'), r'model\.safetensors: a is of F8_E4M3; only F64, F32, F16, BF16'),
        (_write_tensor('I8'), r'model\.safetensors: a is of I8'),
    ],
)
def test_a_file_that_is_missing_or_unreadable_is_named(folder, spoil, named):
    spoil(folder)
    with pytest.raises(errors.UsageError, match=named):
        _read(folder)


def test_a_bin_that_holds_more_than_weights_is_not_executed(folder):
    torch = pytest.importorskip('torch')
    (folder / 'model.safetensors').unlink()
    torch.save({'x': print}, folder / 'pytorch_model.bin')
    with pytest.raises(errors.UsageError, match=r'pytorch_model\.bin cannot be read as weights alone'):
        _read(folder)


@pytest.mark.parametrize(
    ('content', 'named'),
    [
        (lambda torch: {'model': {'a': torch.ones(2)}, 'step': 3}, 'model is of type dict'),
        (lambda torch: [torch.ones(2)], 'its content is of type list'),
        (lambda torch: {'a': torch.ones(2, dtype=torch.int8)}, 'a is of int8; only F64'),
        (lambda torch: {'a': torch.ones(2).to(torch.float8_e4m3fn)}, 'a is of float8_e4m3fn'),
        (lambda torch: {'a': torch.ones(2, device='meta')}, 'a is of meta, torch.strided'),
        (lambda torch: {'a': torch.ones(2).to_sparse()}, 'a is of cpu, torch.sparse_coo'),
    ],
)
def test_a_bin_of_something_else_is_refused_by_name(folder, content, named):
    torch = pytest.importorskip('torch')
    (folder / 'model.safetensors').unlink()
    torch.save(content(torch), folder / 'pytorch_model.bin')
    with pytest.raises(errors.UsageError, match=rf'pytorch_model\.bin: {named}'):
        _read(folder)


def test_without_torch_the_bin_format_is_refused_in_one_line(folder, monkeypatch):
    (folder / 'model.safetensors').rename(folder / 'pytorch_model.bin')
    monkeypatch.setitem(sys.modules, 'torch', None)
    with pytest.raises(errors.UsageError, match='torch, which is not installed'):
        _read(folder)
    with pytest.raises(errors.UsageError, match='--format=pytorch needs torch'):
        _write(folder, format='pytorch')
