import hashlib
import json
import shutil

import numpy as np
import pytest

from tinyllama_jax import errors
from tinyllama_jax.data import store

LENGTHS = [1000, 0, 257, 70_000]  # tokens of the input files; one is empty


def document_lengths(total: int) -> list[int]:
    whole = [100] * (total // 100)
    return whole + [total % 100] * bool(total % 100)


def write_store(path, *, dtype=np.uint16, lengths=LENGTHS):
    """A store of one source with one split; returns the streams."""
    store.create_arrays(path, 'words', 'train', num_files=len(lengths), dtype=np.dtype(dtype))
    rng, streams, files = np.random.default_rng(0), [], []
    for i, length in enumerate(lengths):
        stream = rng.integers(1, 60_000, length).astype(dtype)
        writer, start = store.StreamWriter(path, 'words', 'train', i), 0
        for record, size in enumerate(document_lengths(length)):
            writer.append(stream[start : start + size], 3 * record)
            start += size
        files.append({'name': f'file{i}.txt', **writer.close()})
        streams.append(stream)
    manifest = {'version': store.VERSION, 'dtype': np.dtype(dtype).name}
    store.write_json(path / store.MANIFEST, {**manifest, 'sources': {'words': {'splits': {'train': {'files': files}}}}})
    return streams


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(store, '_TOKENS_PER_SHARD', 1 << 14)
    monkeypatch.setattr(store, '_TOKENS_PER_CHUNK', 1 << 10)
    monkeypatch.setattr(store, '_DOCUMENTS_PER_SHARD', 1 << 8)
    monkeypatch.setattr(store, '_DOCUMENTS_PER_CHUNK', 1 << 4)


@pytest.mark.parametrize('seq_len', [1, 63, 256, 1000])
@pytest.mark.parametrize('dtype', [np.uint16, np.uint32])
def test_rows_are_a_view_that_never_crosses_files(tmp_path, small_shards, seq_len, dtype):
    streams = write_store(tmp_path, dtype=dtype)
    length = seq_len + 1
    expected = np.concatenate([s[: len(s) // length * length].reshape(-1, length) for s in streams])
    tokens = store.TokenStore(tmp_path)
    assert tokens.num_rows('words', 'train', seq_len) == len(expected) > 0
    rows = np.random.default_rng(1).permutation(len(expected))[:300]
    rows = np.concatenate([rows, rows[:2]])  # a row may be asked for twice
    found = tokens.read_rows('words', 'train', rows, seq_len)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, expected[rows])


def test_streams_and_documents(tmp_path, small_shards):
    streams = write_store(tmp_path)
    tokens = store.TokenStore(tmp_path)
    for i, stream in enumerate(streams):
        np.testing.assert_array_equal(tokens.read_stream('words', 'train', i), stream)
        starts, records = tokens.documents('words', 'train', i)
        sizes = document_lengths(len(stream))
        np.testing.assert_array_equal(starts, np.cumsum([0, *sizes])[: len(sizes)])
        np.testing.assert_array_equal(records, 3 * np.arange(len(sizes)))
        sha256 = tokens.manifest['sources']['words']['splits']['train']['files'][i]['sha256']
        assert sha256 == hashlib.sha256(stream.tobytes()).hexdigest()


def test_no_rows_of_a_split_that_is_not_there(tmp_path):
    write_store(tmp_path)
    tokens = store.TokenStore(tmp_path)
    assert tokens.num_rows('words', 'validation', 10) == 0
    assert tokens.num_rows('words', 'train', 1 << 20) == 0
    assert tokens.read_rows('words', 'train', np.array([], int), 10).shape == (0, 11)
    for bad in (-1, tokens.num_rows('words', 'train', 10)):
        with pytest.raises(IndexError):
            tokens.read_rows('words', 'train', np.array([bad]), 10)


def shards(path) -> set[str]:
    return {str(file.relative_to(path)) for file in path.rglob('c/**/*') if file.is_file()}


def test_a_file_owns_its_shards_and_erasing_it_leaves_the_others(tmp_path, small_shards):
    write_store(tmp_path / 'all')
    write_store(tmp_path / 'without', lengths=[1000, 0, 257])
    last = shards(tmp_path / 'all') - shards(tmp_path / 'without')
    assert len(last) == -(-70_000 // (1 << 14)) + -(-700 // (1 << 8))
    store.StreamWriter(tmp_path / 'all', 'words', 'train', 3).erase()
    assert shards(tmp_path / 'all') == shards(tmp_path / 'without') != set()


def test_unwritten_tokens_take_no_space(tmp_path):
    write_store(tmp_path, lengths=[10] * 3)
    assert sum(file.stat().st_size for file in tmp_path.rglob('*') if file.is_file()) < 1 << 20


@pytest.mark.parametrize('damage', ['flip', 'remove', 'truncate', 'shuffle'])
def test_a_damaged_chunk_is_named(tmp_path, damage):
    write_store(tmp_path)
    file = store.array_path(tmp_path, 'tokens', 'words', 'train') / 'c' / str((2 * store.FILE_SPAN) >> 24)
    content = bytearray(file.read_bytes())
    if damage == 'remove':
        file.unlink()
    elif damage == 'truncate':
        file.write_bytes(content[: len(content) // 2])
    elif damage == 'flip':
        content[77] ^= 1
        file.write_bytes(content)
    else:
        content[:400] = content[100:400] + content[:100]
        file.write_bytes(content)
    tokens = store.TokenStore(tmp_path)
    row = 1000 // 100  # the first of the third file
    assert tokens.read_rows('words', 'train', np.array([row - 1]), 99).any()
    with pytest.raises(errors.RunError, match=r'source words, split train, file file2\.txt .* damaged'):
        tokens.read_rows('words', 'train', np.array([0, row]), 99)


def test_a_missing_array_is_named(tmp_path):
    write_store(tmp_path)
    shutil.rmtree(tmp_path / 'tokens' / 'words')
    with pytest.raises(errors.RunError, match=r'tokens/words/train cannot be opened'):
        store.TokenStore(tmp_path).read_rows('words', 'train', np.array([0]), 9)


def test_without_a_manifest_the_command_is_named(tmp_path):
    with pytest.raises(errors.UsageError, match=r'no complete store.*main\.py prepare --config=a\.py --workdir=b'):
        store.TokenStore(tmp_path / 'absent', 'python main.py prepare --config=a.py --workdir=b')
    write_store(tmp_path)
    manifest = json.loads((tmp_path / store.MANIFEST).read_text())
    store.write_json(tmp_path / store.MANIFEST, {**manifest, 'version': 99})
    with pytest.raises(errors.UsageError, match='version 99'):
        store.TokenStore(tmp_path)
    (tmp_path / store.MANIFEST).write_text('{"version"')
    with pytest.raises(errors.UsageError, match='not JSON'):
        store.TokenStore(tmp_path)


def test_a_document_too_many_for_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(store, 'FILE_SPAN', 1 << 24)
    store.create_arrays(tmp_path, 'words', 'train', num_files=1, dtype=np.dtype(np.uint16))
    writer = store.StreamWriter(tmp_path, 'words', 'train', 0)
    with pytest.raises(OverflowError, match='tokens; split it'):
        writer.append(np.ones((1 << 24) + 1, np.uint16), 0)
