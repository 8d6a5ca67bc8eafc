"""The store: tokens on disk, written one input at a time and read one row at a time.

    STORE/manifest.json              written last, atomically: without it the store does not count
    STORE/tokenizer.model            a copy of the tokenizer; or tokenizer/, the files of a tokenizer.json
    STORE/tokens/SOURCE/SPLIT        1-D zarr3 array of token ids, sharded, checksummed chunks
    STORE/documents/SOURCE/SPLIT     [n, 2] zarr3 array: start offset in its stream, record number in its file

Input i of a split, a file or a group of small files, owns the elements from i * 2^32
of both arrays; its tokens are its *stream*. In a group, record numbers count on from
file to file; the manifest's `first_records` has each file's first. Unwritten chunks
take no space. No shard belongs to two inputs, so neither the number of workers nor a
restart can change a byte. Rows are a view: row r of a stream is its tokens
[r * R, (r + 1) * R), R = seq_len + 1.
"""

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore

from tinyllama_jax import errors, files, storage
from tinyllama_jax.tokenizer import loading

MANIFEST = 'manifest.json'
TOKENIZER = 'tokenizer.model'
VERSION = 1  # of the layout and the manifest: an input is one file, or a group of plain text files
SHARED_VERSION = 2  # small files of other formats are grouped too
FILE_SPAN = 1 << 32  # elements of the arrays that one input file owns
_TOKENS_PER_SHARD = 1 << 24  # 32 MB of uint16
_TOKENS_PER_CHUNK = 1 << 13  # read and checked at once: a row of 2,049 costs 16 or 32 KB
_DOCUMENTS_PER_SHARD = 1 << 20
_DOCUMENTS_PER_CHUNK = 1 << 12
_PREPARE = 'python main.py prepare --config=FILE --workdir=DIR, with the same flags'
_CACHE_BYTES = 64 << 20  # for the shards' indices
_MOST_STARTS = 1 << 26  # document starts held in memory, 4 bytes each
_FILES_AT_ONCE = 16  # files whose document starts are read together
_RAW = [{'name': 'bytes', 'configuration': {'endian': 'little'}}, {'name': 'crc32c'}]


def array_path(store: Path, kind: str, source: str, split: str) -> Path:
    """Returns the folder of the array of `kind` (tokens or documents)."""
    return Path(store) / kind / source / split


def create_arrays(store: Path, source: str, split: str, *, num_files: int, dtype: np.dtype) -> None:
    """Creates the two empty arrays of a split of `num_files` input files, unless they exist."""

    def create(kind: str, dtype: np.dtype, shard: int, chunk: int, columns: list[int]) -> None:
        sharding = {'chunk_shape': [chunk, *columns], 'codecs': _RAW, 'index_codecs': _RAW}
        metadata = {
            'shape': [num_files * FILE_SPAN, *columns],
            'data_type': dtype.name,
            'fill_value': 0,
            'chunk_grid': {'name': 'regular', 'configuration': {'chunk_shape': [shard, *columns]}},
            'codecs': [{'name': 'sharding_indexed', 'configuration': sharding}],
        }
        _open(store, kind, source, split, metadata)

    create('tokens', np.dtype(dtype), _TOKENS_PER_SHARD, _TOKENS_PER_CHUNK, [])
    create('documents', np.dtype(np.uint64), _DOCUMENTS_PER_SHARD, _DOCUMENTS_PER_CHUNK, [2])


def _open(store: Path, kind: str, source: str, split: str, metadata: dict[str, Any] | None = None):
    """Returns the tensorstore array; creates it first if `metadata` is given. Reading a missing chunk raises."""
    spec = {
        'driver': 'zarr3',
        'kvstore': {'driver': 'file', 'path': f'{array_path(store, kind, source, split)}/'},
        'store_data_equal_to_fill_value': True,
        'fill_missing_data_reads': False,
        'recheck_cached_metadata': 'open',
        'recheck_cached_data': 'open',
    }
    if metadata:
        spec |= {'metadata': metadata, 'create': True, 'open': True}
    context = tensorstore.Context({'cache_pool': {'total_bytes_limit': _CACHE_BYTES}})
    folder = array_path(store, kind, source, split)

    def open_():
        return tensorstore.open(spec, context=context).result()

    try:
        return open_() if metadata else storage.retried(str(folder), open_)
    except (ValueError, OSError) as error:
        if metadata:
            raise write_error(store, error) from None
        raise errors.RunError(
            f'{folder} cannot be opened ({_reason(error)}); delete the store and prepare it again.'
        ) from None


def write_error(store: Path, error: Exception) -> errors.RunError:
    """Returns the RunError to raise when writing to `store` failed with `error`, usually because the disk is full."""
    return errors.RunError(
        f'The store {store} cannot be written ({_reason(error)}); nothing in it is used until it is complete. '
        'Make room, or choose another folder with --config.data.store=DIR, and run prepare again.'
    )


def _reason(error: Exception) -> str:
    """Returns the first line of `error` without the details that tensorstore appends for its developers."""
    return re.split(r' \[(?:source locations|\w+=)', errors.first_line(error))[0]


class StreamWriter:
    """Writes the stream of one input file: its tokens and where its documents start.

    Writes complete shards in order, each as soon as it is full. `close` writes the
    last one; `erase` removes everything that was written for the file.
    """

    def __init__(self, store: Path, source: str, split: str, file_index: int):
        self._store = Path(store)
        self._first = file_index * FILE_SPAN
        self._tokens = _ShardedAppender(self._store, source, split, 'tokens', self._first, _TOKENS_PER_SHARD)
        self._documents = _ShardedAppender(self._store, source, split, 'documents', self._first, _DOCUMENTS_PER_SHARD)
        self._hash = hashlib.sha256()

    def append(self, tokens: np.ndarray, record_number: int) -> None:
        """Appends a document: its ids and its record number. Raises OverflowError when the file has too many tokens."""
        if self._tokens.count + len(tokens) > FILE_SPAN:
            raise OverflowError(f'holds more than {FILE_SPAN:,} tokens; split it')
        self._documents.append(np.array([[self._tokens.count, record_number]], np.uint64))
        self._tokens.append(tokens)
        self._hash.update(tokens.tobytes())

    def close(self) -> dict[str, Any]:
        """Writes the rest and returns {documents, tokens, sha256 (of the little-endian ids)}."""
        self._tokens.flush()
        self._documents.flush()
        return {
            'documents': self._documents.count,
            'tokens': self._tokens.count,
            'sha256': self._hash.hexdigest(),
        }

    def erase(self) -> None:
        """Removes every shard of this file, including those of an interrupted run."""
        self._tokens.erase()
        self._documents.erase()


class _ShardedAppender:
    """Appends to the part of an array that one input file owns, one complete shard at a time."""

    def __init__(self, store: Path, source: str, split: str, kind: str, first: int, shard: int):
        self._store = store
        self._folder = array_path(store, kind, source, split)
        self._array = _open(store, kind, source, split)
        self._last = ['0'] * (self._array.rank - 1)  # a shard's file is c/SHARD or c/SHARD/0
        self._first, self._shard = first, shard
        self._buffer: list[np.ndarray] = []
        self._buffered = 0
        self.count = 0

    def append(self, values: np.ndarray) -> None:
        self._buffer.append(values)
        self._buffered += len(values)
        self.count += len(values)
        if self._buffered >= self._shard:
            self._write(self._buffered // self._shard * self._shard)

    def flush(self) -> None:
        if self._buffered:
            self._write(self._buffered)

    def _write(self, length: int) -> None:
        values = np.concatenate(self._buffer)
        start = self._first + self.count - self._buffered
        try:
            for offset in range(0, length, self._shard):
                part = values[offset : min(offset + self._shard, length)]
                self._array[start + offset : start + offset + len(part)].write(part).result()
        except (ValueError, OSError) as error:
            raise write_error(self._store, error) from None
        self._buffer = [values[length:].copy()]
        self._buffered -= length

    def erase(self) -> None:
        self._buffer, self._buffered, self.count = [], 0, 0
        folder, shard = self._folder / 'c', self._first // self._shard
        # Shards are written in order, so the first missing one ends the file's.
        while (path := folder.joinpath(str(shard), *self._last)).exists():
            path.unlink()
            shard += 1


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as JSON to the file `path`, atomically. Raises RunError when the file cannot be written."""
    try:
        files.write_atomically(path, json.dumps(value, indent=1) + '\n')
    except OSError as error:
        raise write_error(path.parent, error) from None


class TokenStore:
    """Reads a complete store.

    Attributes: path, manifest (the dictionary in manifest.json), tokenizer_path.
    Raises UsageError if `path` holds no complete store.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.tokenizer_path = loading.kept(self.path)
        manifest = read_manifest(self.path)
        if manifest is None:
            raise errors.UsageError(f'{self.path} holds no complete store (no {MANIFEST}); make it first: {_PREPARE}')
        self.manifest = manifest
        self._arrays: dict[tuple[str, str, str], Any] = {}
        self._starts = _BoundedCache(_MOST_STARTS)

    def num_rows(self, source: str, split: str, seq_len: int) -> int:
        """Returns the number of rows of seq_len + 1 tokens in a split, 0 if it is absent. No row crosses two files."""
        return int(self._first_rows(source, split, seq_len + 1)[-1])

    def read_rows(self, source: str, split: str, rows: np.ndarray, seq_len: int) -> np.ndarray:
        """Returns the tokens [len(rows), seq_len + 1] of the rows with these numbers, in this order.

        Reads all rows at once. Raises RunError naming source, split and file when a
        chunk is missing or its checksum is wrong.
        """
        length = seq_len + 1
        files, offsets = self._locate(source, split, rows, length)
        starts = files * FILE_SPAN + offsets
        tokens = np.empty((len(starts), length), self.manifest['dtype'])
        if not len(starts):
            return tokens
        ranges = [(start, start + length) for start in starts.tolist()]
        for i, row in enumerate(self._read('tokens', source, split, files.tolist(), ranges)):
            tokens[i] = row
        return tokens

    def segment_ids(self, source: str, split: str, rows: np.ndarray, seq_len: int) -> np.ndarray:
        """Returns the document number of each token of these rows, [len(rows), seq_len + 1], counted within each row.

        0 is the document at the row's first token, even if it began earlier. Documents without
        tokens are not counted. Safe to call from several threads. Raises as `read_rows` does.
        """
        length = seq_len + 1
        files, offsets = self._locate(source, split, rows, length)
        ids = np.zeros((len(files), length), segment_dtype(seq_len))
        for file, starts in self._document_starts(source, split, np.unique(files).tolist()):
            for row in np.flatnonzero(files == file):
                # uint32 like the starts: otherwise numpy would first widen them all.
                bounds = np.array([offsets[row], offsets[row] + length - 1], np.uint32)
                first, last = np.searchsorted(starts, bounds, side='right')
                ids[row, starts[first:last] - bounds[0]] = 1
        return ids.cumsum(axis=1, dtype=ids.dtype)

    def documents(self, source: str, split: str, file_index: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns (start offsets, record numbers) of an input file's documents, each [documents] int64."""
        values = self._read_file('documents', source, split, file_index)
        return values[:, 0].astype(np.int64), values[:, 1].astype(np.int64)

    def read_stream(self, source: str, split: str, file_index: int) -> np.ndarray:
        """Returns all tokens [tokens] of one input file."""
        return self._read_file('tokens', source, split, file_index)

    def _read_file(self, kind: str, source: str, split: str, file_index: int) -> np.ndarray:
        """Returns the elements of an array that one input file owns and wrote."""
        first, count = file_index * FILE_SPAN, self._files(source, split)[file_index][kind]
        return self._read(kind, source, split, [file_index], [(first, first + count)])[0]

    def _files(self, source: str, split: str) -> list[dict[str, Any]]:
        """Returns the manifest's entries of a split's input files; none for a split that is absent."""
        return self.manifest['sources'][source]['splits'].get(split, {'files': []})['files']

    def _locate(self, source: str, split: str, rows: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns (input file, offset of the first token in its stream) of each row, both int64."""
        firsts = self._first_rows(source, split, length)
        rows = np.asarray(rows, np.int64)
        if rows.size and not 0 <= rows.min() <= rows.max() < firsts[-1]:
            raise IndexError(f'{source}/{split} has rows 0 to {firsts[-1] - 1}, not {rows.min()} to {rows.max()}')
        files = np.searchsorted(firsts, rows, side='right') - 1
        return files, (rows - firsts[files]) * length

    def _document_starts(self, source: str, split: str, files: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        """Yields each file with its documents' start offsets (uint32, ascending), cached files first."""
        missing = []
        for file in files:
            starts = self._starts.get((source, split, file))
            if starts is None:
                missing.append(file)
            else:
                yield file, starts
        entries = self._files(source, split)
        for i in range(0, len(missing), _FILES_AT_ONCE):
            together = missing[i : i + _FILES_AT_ONCE]
            ranges = [(file * FILE_SPAN, file * FILE_SPAN + entries[file]['documents']) for file in together]
            for file, documents in zip(together, self._read('documents', source, split, together, ranges), strict=True):
                starts = documents[:, 0]
                # An empty document at the very end starts after the last token, perhaps past 32 bits.
                starts = starts[starts < entries[file]['tokens']].astype(np.uint32)
                self._starts.put((source, split, file), starts)
                yield file, starts

    def _first_rows(self, source: str, split: str, length: int) -> np.ndarray:
        """Returns the number of each file's first row, [files + 1]; the last is the number of rows."""
        key = (source, split, str(length))
        if key not in self._arrays:
            rows = [file['tokens'] // length for file in self._files(source, split)]
            self._arrays[key] = np.concatenate([[0], np.cumsum(rows, dtype=np.int64)]).astype(np.int64)
        return self._arrays[key]

    def _array(self, kind: str, source: str, split: str):
        key = (kind, source, split)
        if key not in self._arrays:
            self._arrays[key] = _open(self.path, kind, source, split)
        return self._arrays[key]

    def _read(
        self, kind: str, source: str, split: str, files: Sequence[int], ranges: Sequence[tuple[int, int]]
    ) -> list[np.ndarray]:
        """Returns the elements of these ranges, each of a file, read together.

        Raises RunError naming the file whose chunk is missing or damaged, Unavailable if storage fails.
        """
        array = self._array(kind, source, split)

        def read() -> list[np.ndarray]:
            batch = tensorstore.Batch()
            reads = [array[first:end].read(batch=batch) for first, end in ranges]
            batch.submit()
            results = []
            for file, result in zip(files, reads, strict=True):
                try:
                    results.append(result.result())
                except (ValueError, OSError) as error:
                    if storage.failure(error):
                        raise
                    name = self._files(source, split)[file]['name']
                    raise errors.RunError(
                        f'The tokens of source {source}, split {split}, file {name} in {self.path} are damaged '
                        f'({_reason(error)}); delete the store and run prepare again.'
                    ) from None
            return results

        return storage.retried(str(array_path(self.path, kind, source, split)), read)


class _BoundedCache:
    """Arrays by name, of at most `limit` elements in total; drops the least recently used first. Thread-safe."""

    def __init__(self, limit: int):
        self._limit, self._size, self._lock = limit, 0, threading.Lock()
        self._arrays: dict[Any, np.ndarray] = {}  # least recently used first

    def get(self, name: Any) -> np.ndarray | None:
        with self._lock:
            array = self._arrays.pop(name, None)
            if array is not None:
                self._arrays[name] = array
            return array

    def put(self, name: Any, array: np.ndarray) -> None:
        with self._lock:
            if name in self._arrays:  # another thread was first
                return
            self._arrays[name] = array
            self._size += array.size
            while self._size > self._limit:
                self._size -= self._arrays.pop(next(iter(self._arrays))).size


def segment_dtype(seq_len: int) -> np.dtype:
    """Returns the dtype of segment ids: 16 bits unless rows are longer than 65,535 tokens."""
    return np.dtype(np.uint16 if seq_len + 1 <= 65_535 else np.uint32)


def read_manifest(store: Path) -> dict[str, Any] | None:
    """Returns the manifest of a complete store, None if there is none. Raises UsageError for another version."""
    path = store / MANIFEST
    try:
        manifest = json.loads(storage.retried(str(path), lambda: path.read_text(encoding='utf-8')))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        raise errors.UsageError(f'{store / MANIFEST} is not JSON; delete {store} and run prepare again.') from None
    if manifest.get('version') not in (VERSION, SHARED_VERSION):
        raise errors.UsageError(
            f'{store / MANIFEST} has version {manifest.get("version")}, this program reads {VERSION} and '
            f'{SHARED_VERSION}; '
            f'delete {store} and run prepare again.'
        )
    return manifest
