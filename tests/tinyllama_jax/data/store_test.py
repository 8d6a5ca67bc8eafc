"""The store: rows, streams, segment ids, cached document starts, damage."""

import hashlib
import json
import pathlib
import shutil
import tempfile
from concurrent import futures

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from tinyllama_jax import errors, storage
from tinyllama_jax.data import store

LENGTHS = [1000, 0, 257, 70_000]  # tokens of the input files; one is empty


def document_lengths(total: int) -> list[int]:
    whole = [100] * (total // 100)
    return whole + [total % 100] * bool(total % 100)


def write_store(path, *, dtype=np.uint16, lengths=LENGTHS, documents=None):
    """Writes a store of one source and split, returns its streams; `documents` has each file's document lengths."""
    documents = documents or [document_lengths(length) for length in lengths]
    store.create_arrays(path, 'words', 'train', num_files=len(documents), dtype=np.dtype(dtype))
    rng, streams, files = np.random.default_rng(0), [], []
    for i, sizes in enumerate(documents):
        stream = rng.integers(1, 60_000, sum(sizes)).astype(dtype)
        writer, start = store.StreamWriter(path, 'words', 'train', i), 0
        for record, size in enumerate(sizes):
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
    read = tokens.read_rows('words', 'train', rows, seq_len)
    assert read.dtype == dtype
    np.testing.assert_array_equal(read, expected[rows])


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


def test_an_absent_split_has_no_rows(tmp_path):
    write_store(tmp_path)
    tokens = store.TokenStore(tmp_path)
    assert tokens.num_rows('words', 'validation', 10) == 0
    assert tokens.num_rows('words', 'train', 1 << 20) == 0
    assert tokens.read_rows('words', 'train', np.array([], int), 10).shape == (0, 11)
    assert tokens.segment_ids('words', 'train', np.array([], int), 10).shape == (0, 11)
    for bad in (-1, tokens.num_rows('words', 'train', 10)):
        for read in (tokens.read_rows, tokens.segment_ids):
            with pytest.raises(IndexError):
                read('words', 'train', np.array([bad]), 10)


def all_segments(documents, length) -> np.ndarray:
    """Returns the segment ids of every row, counted token by token."""
    rows = []
    for sizes in documents:
        owners = [number for number, size in enumerate(sizes) for _ in range(size)]
        for start in range(0, len(owners) - length + 1, length):
            row = owners[start : start + length]
            met = list(dict.fromkeys(row))
            rows.append([met.index(owner) for owner in row])
    return np.array(rows, int).reshape(-1, length)


def test_segments_by_hand(tmp_path):
    # A document that ends in the first row, an empty one, one over three rows, and two tokens that fill no row. Then a
    # file without documents, and one whose documents begin where its rows do, with empty ones beside them.
    write_store(tmp_path, documents=[[3, 0, 2, 9, 4], [], [0, 4, 0, 0, 2, 2, 0]])
    ids = store.TokenStore(tmp_path).segment_ids('words', 'train', np.array([3, 0, 1, 2, 4, 5, 0]), 3)
    assert ids.dtype == np.uint16
    expected = ['0011', '0001', '0111', '0000', '0000', '0011', '0001']
    assert [''.join(map(str, row)) for row in ids] == expected


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(
    documents=st.lists(st.lists(st.integers(0, 9), max_size=12), min_size=1, max_size=3),
    seq_len=st.integers(1, 20),
    data=st.data(),
)
def test_segments_are_the_documents_whatever_their_lengths(documents, seq_len, data):
    expected = all_segments(documents, seq_len + 1)
    rows = np.array(data.draw(st.lists(st.integers(0, len(expected) - 1))) if len(expected) else [], int)
    with tempfile.TemporaryDirectory() as folder:
        write_store(pathlib.Path(folder), documents=documents)
        ids = store.TokenStore(folder).segment_ids('words', 'train', rows, seq_len)
    np.testing.assert_array_equal(ids, expected[rows])


MANY = [[7, 0, 30, 1], [], [5] * 300, [1] * 40 + [200], [64], [3, 3, 0] * 50]  # 300 starts in the third file


def starts_read(tokens, monkeypatch) -> list[int]:
    """Returns a list that gets a file's number whenever its document starts are read."""
    read, plain = [], tokens._read

    def counted(kind, source, split, files, ranges):
        read.extend(files if kind == 'documents' else [])
        return plain(kind, source, split, files, ranges)

    monkeypatch.setattr(tokens, '_read', counted)
    return read


def test_document_starts_are_read_once(tmp_path, small_shards, monkeypatch):
    write_store(tmp_path, documents=MANY)
    tokens, expected = store.TokenStore(tmp_path), all_segments(MANY, 16)
    read = starts_read(tokens, monkeypatch)
    for row in (*range(len(expected)), 5, 0):
        np.testing.assert_array_equal(tokens.segment_ids('words', 'train', np.array([row]), 15), expected[[row]])
    assert read == [0, 2, 3, 4, 5]


def test_the_least_recently_used_files_make_room(tmp_path, small_shards, monkeypatch):
    write_store(tmp_path, documents=MANY)
    monkeypatch.setattr(store, '_MOST_STARTS', 4 + 41 + 149)  # of files 0, 3 and 5 together; one of 5 is at its end
    tokens, expected = store.TokenStore(tmp_path), all_segments(MANY, 16)
    read = starts_read(tokens, monkeypatch)
    first_rows = np.cumsum([0, *(sum(sizes) // 16 for sizes in MANY)])
    for file in (0, 3, 5, 0, 4, 0, 5, 3):  # 4 takes the place of 3, since 0 was used after it
        rows = first_rows[[file]]
        np.testing.assert_array_equal(tokens.segment_ids('words', 'train', rows, 15), expected[rows])
    assert read == [0, 3, 5, 4, 3]


def test_threads_may_ask_for_segments_at_once(tmp_path, small_shards, monkeypatch):
    write_store(tmp_path, documents=MANY)
    monkeypatch.setattr(store, '_MOST_STARTS', 200)
    tokens, expected = store.TokenStore(tmp_path), all_segments(MANY, 16)
    rng = np.random.default_rng(0)
    asked = [rng.integers(len(expected), size=4) for _ in range(400)]
    with futures.ThreadPoolExecutor(8) as pool:
        answers = pool.map(lambda rows: tokens.segment_ids('words', 'train', rows, 15), asked)
        for rows, ids in zip(asked, answers, strict=True):
            np.testing.assert_array_equal(ids, expected[rows])


def test_rows_too_long_for_16_bits_have_segment_ids_of_32(tmp_path):
    assert store.segment_dtype(65_534) == np.uint16
    write_store(tmp_path, documents=[[1] * 65_537])
    ids = store.TokenStore(tmp_path).segment_ids('words', 'train', np.array([0]), 65_536)
    np.testing.assert_array_equal(ids, np.arange(65_537)[None])


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


@pytest.mark.parametrize('kind', ['tokens', 'documents'])
@pytest.mark.parametrize('damage', ['flip', 'remove', 'truncate', 'shuffle'])
def test_a_damaged_chunk_is_named(tmp_path, damage, kind):
    write_store(tmp_path)
    shard = {'tokens': f'{(2 * store.FILE_SPAN) >> 24}', 'documents': f'{(2 * store.FILE_SPAN) >> 20}/0'}[kind]
    file = store.array_path(tmp_path, kind, 'words', 'train') / 'c' / shard
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
    read = {'tokens': tokens.read_rows, 'documents': tokens.segment_ids}[kind]
    row = 1000 // 100  # the first of the third file
    assert read('words', 'train', np.array([row - 1]), 99).shape == (1, 100)
    with pytest.raises(errors.RunError, match=r'source words, split train, file file2\.txt .* damaged'):
        read('words', 'train', np.array([0, row]), 99)


@pytest.mark.parametrize('kind', ['tokens', 'documents'])
def test_storage_that_fails_is_tried_again_and_not_called_damaged(tmp_path, kind, monkeypatch):
    write_store(tmp_path)
    folder = store.array_path(tmp_path, kind, 'words', 'train')

    def read():
        tokens = store.TokenStore(tmp_path)
        return {'tokens': tokens.read_rows, 'documents': tokens.segment_ids}[kind]('words', 'train', np.array([0]), 99)

    def mend(_):
        (folder / 'c').unlink()
        (tmp_path / 'aside').rename(folder / 'c')

    right = read()
    for sleep in (mend, lambda _: None):
        (folder / 'c').rename(tmp_path / 'aside')
        (folder / 'c').symlink_to('c')  # ELOOP
        monkeypatch.setattr(storage.time, 'sleep', sleep)
        if sleep is mend:
            np.testing.assert_array_equal(read(), right)
    with pytest.raises(errors.Unavailable, match=f'{folder} cannot be read now .*Nothing was moved or changed'):
        read()


@pytest.mark.parametrize('kind', ['tokens', 'documents'])
def test_a_missing_array_is_named(tmp_path, kind):
    write_store(tmp_path)
    shutil.rmtree(tmp_path / kind / 'words')
    tokens = store.TokenStore(tmp_path)
    read = {'tokens': tokens.read_rows, 'documents': tokens.segment_ids}[kind]
    with pytest.raises(errors.RunError, match=rf'{kind}/words/train cannot be opened'):
        read('words', 'train', np.array([0]), 9)


def test_without_a_manifest_the_command_is_named(tmp_path):
    with pytest.raises(errors.UsageError, match=r'no complete store.*python main\.py prepare .* with the same flags'):
        store.TokenStore(tmp_path / 'absent')
    write_store(tmp_path)
    manifest = json.loads((tmp_path / store.MANIFEST).read_text())
    store.write_json(tmp_path / store.MANIFEST, {**manifest, 'version': 99})
    with pytest.raises(errors.UsageError, match='version 99'):
        store.TokenStore(tmp_path)
    (tmp_path / store.MANIFEST).write_text('{"version"')
    with pytest.raises(errors.UsageError, match='not JSON'):
        store.TokenStore(tmp_path)


def test_a_file_of_too_many_tokens_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(store, 'FILE_SPAN', 1 << 24)
    store.create_arrays(tmp_path, 'words', 'train', num_files=1, dtype=np.dtype(np.uint16))
    writer = store.StreamWriter(tmp_path, 'words', 'train', 0)
    with pytest.raises(OverflowError, match='tokens; split it'):
        writer.append(np.ones((1 << 24) + 1, np.uint16), 0)
