"""Computes the batch of step n as a pure function of (config, manifest, n), read ahead through grain.

A step is `global_batch_size` consecutive *positions* of one endless list of rows.
`mixture` assigns position p to a source and to index i within that source. Epoch
i // rows of a source visits all its training rows once, in an order of its own
(`permuted`). Nothing is stored and only the keys of the permutations are random,
so any step is computed in O(1).

Arrays: A accumulation steps, B global rows in each, R = seq_len + 1.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from tinyllama_jax import errors
from tinyllama_jax.config import Config
from tinyllama_jax.data import store as store_lib
from tinyllama_jax.data.store import TokenStore
from tinyllama_jax.tokenizer import loading

_WEIGHT_UNITS = 1_000_000  # weights are rounded to this many parts
_ROUNDS = 6
_ORDER_VERSION = 1  # of the formulas below: other formulas give other batches
_MAX_READERS = 4


def integer_weights(weights: Sequence[float]) -> np.ndarray:
    """Returns `weights` [sources] as int64 parts of about a million, none of them 0."""
    shares = np.asarray(weights, np.float64) / np.sum(weights)
    return np.maximum(1, np.rint(shares * _WEIGHT_UNITS)).astype(np.int64)


def mixture_counts(positions: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns how many of the first `positions` rows each source has: [sources, ...] int64, summing to `positions`.

    The heaviest source takes its rounded share of all rows, the next its rounded
    share of the rest, and so on. Any two neighbouring positions differ in one
    source, and with up to three sources every count is always within 1 of its
    exact share.
    """
    rest, rest_weight = np.asarray(positions, np.int64), int(weights.sum())
    counts = np.zeros((len(weights), *rest.shape), np.int64)
    for source in np.argsort(-weights, kind='stable'):
        below = rest_weight - int(weights[source])
        lighter = (rest * below * 2 + rest_weight) // (2 * rest_weight)
        counts[source] = rest - lighter
        rest, rest_weight = lighter, below
    return counts


def mixture(positions: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (source, index within the source) of each position, both int64 in the shape of `positions`."""
    before, after = mixture_counts(positions, weights), mixture_counts(positions + 1, weights)
    sources = np.argmax(after - before, axis=0)
    return sources, np.take_along_axis(before, sources[None], axis=0)[0]


def permuted(index: np.ndarray, size: int, *key: object) -> np.ndarray:
    """Returns the images of `index` (int64, each below `size`) under the permutation of range(size) keyed by `key`.

    A Feistel network on the smallest power of two >= size, applied again until the
    image is below size (cycle walking): no memory, under two passes on average.
    """
    bits = max(size - 1, 1).bit_length()
    low = bits // 2
    keys = np.frombuffer(hashlib.sha512(json.dumps(key).encode()).digest(), '<u8')[:_ROUNDS]
    image = _feistel(np.asarray(index).astype(np.uint64), bits - low, low, keys)
    while (outside := image >= size).any():
        image[outside] = _feistel(image[outside], bits - low, low, keys)
    return image.astype(np.int64)


def _feistel(values: np.ndarray, high: int, low: int, keys: np.ndarray) -> np.ndarray:
    """Maps the numbers of high + low bits one to one: each round XORs one half with a hash of the other."""
    left, right = values >> np.uint64(low), values & np.uint64((1 << low) - 1)
    for key in keys:
        left, right = right, left ^ (_hashed(right ^ key) & np.uint64((1 << high) - 1))
        high, low = low, high
    return left << np.uint64(low) | right


def _hashed(values: np.ndarray) -> np.ndarray:
    """Returns SplitMix64's finaliser of each value."""
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)


@dataclasses.dataclass(frozen=True)
class _SourceRows:
    """Counts a source's rows and orders them; the held-out rows are the last of a fixed permutation."""

    source: str
    train: int
    held_out: int  # rows of the training split, for a source without a validation split
    validation: int

    def train_row(self, index: np.ndarray, seed: int) -> np.ndarray:
        """Returns the training rows at `index` of the source's endless order, one epoch after another."""
        epochs, within = np.divmod(index, self.train)
        rows = np.empty_like(within)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            rows[chosen] = permuted(within[chosen], self.train, 'epoch', seed, self.source, int(epoch))
        return self._allowed(rows)

    def validation_rows(self, limit: int) -> tuple[str, np.ndarray]:
        """Returns (split, its validation rows): at most `limit` rows, the same for every seed."""
        if self.held_out:
            return 'train', self._allowed(self.train + np.arange(min(limit, self.held_out)))
        return 'validation', permuted(
            np.arange(min(limit, self.validation)), self.validation, 'validation', self.source
        )

    def _allowed(self, index: np.ndarray) -> np.ndarray:
        if not self.held_out:
            return index
        return permuted(index, self.train + self.held_out, 'held out', self.source)


class Dataset:
    """Reads the batches of a config's mixture from a store; made by `make_dataset`.

    Attributes: sources (names, in the config's order), fingerprint (sha256 of
    everything that decides the batches).
    """

    def __init__(self, config: Config, store: TokenStore, rows: Mapping[str, _SourceRows]):
        self.sources = list(rows)
        self._config, self._store, self._rows = config, store, rows
        self._seq_len, self._batch_size = config.model.seq_len, config.train.global_batch_size
        self._weights = integer_weights([config.data.sources[name].weight for name in rows])
        self.fingerprint = self._fingerprint()

    def batch(self, step: int, *, accumulation: int = 1, columns: slice = slice(None)) -> np.ndarray:
        """Returns the rows [A, B, R] of a step (the first step is 0), or only the slice `columns` of B."""
        return self._read(self._store.read_rows, self._store.manifest['dtype'], step, accumulation, columns)

    def segment_ids(self, step: int, *, accumulation: int = 1, columns: slice = slice(None)) -> np.ndarray | None:
        """Returns the segment ids [A, B, R] of the rows of `batch`; None without config.data.document_mask."""
        if not self._config.data.document_mask:
            return None
        dtype = store_lib.segment_dtype(self._seq_len)
        return self._read(self._store.segment_ids, dtype, step, accumulation, columns)

    def _read(self, read: Callable, dtype: Any, step: int, accumulation: int, columns: slice) -> np.ndarray:
        """Calls `read`, a method of the store, for a step's rows; returns the values [A, B, R] as `dtype`."""
        if self._batch_size % accumulation:
            raise ValueError(f'global_batch_size {self._batch_size} is not a multiple of accumulation {accumulation}')
        sources, rows = self.rows(step)
        sources = sources.reshape(accumulation, -1)[:, columns]
        rows = rows.reshape(accumulation, -1)[:, columns]
        values_ABR = np.empty((*rows.shape, self._seq_len + 1), dtype)
        for i, name in enumerate(self.sources):
            if (chosen := sources == i).any():
                values_ABR[chosen] = read(name, 'train', rows[chosen], self._seq_len)
        return values_ABR

    def rows(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns (index of the source in `sources`, row of its training split) of each row of a step."""
        sources, index = mixture(step * self._batch_size + np.arange(self._batch_size), self._weights)
        rows = np.empty_like(index)
        for i, name in enumerate(self.sources):
            chosen = sources == i
            rows[chosen] = self._rows[name].train_row(index[chosen], self._config.seed)
        return sources, rows

    def batches(
        self, start: int, stop: int, *, accumulation: int = 1, columns: slice = slice(None)
    ) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """Yields (`batch`, `segment_ids`) of steps start to stop - 1, read ahead by threads; closing it ends them."""

        def read(step):
            rows_ABR = self.batch(int(step), accumulation=accumulation, columns=columns)
            return rows_ABR, self.segment_ids(int(step), accumulation=accumulation, columns=columns)

        ahead = self._config.data.prefetch_steps
        options = grain.ReadOptions(num_threads=min(ahead, _MAX_READERS), prefetch_buffer_size=ahead)
        iterator = iter(grain.MapDataset.range(start, stop).map(read).to_iter_dataset(options))
        try:
            yield from iterator
        finally:
            iterator.close()

    def validation_size(self, source: str) -> int:
        """Returns the number of validation rows of a source: at most config.train.eval_rows, 0 if none are held out."""
        return len(self._rows[source].validation_rows(self._config.train.eval_rows)[1])

    def validation(self, source: str, chosen: slice = slice(None)) -> tuple[np.ndarray, np.ndarray | None]:
        """Returns validation rows [n, R] of a source and their segment ids (None without config.data.document_mask).

        These rows are never trained on and have a fixed order; reads only those `chosen`.
        """
        split, rows = self._rows[source].validation_rows(self._config.train.eval_rows)
        rows_NR = self._store.read_rows(source, split, rows[chosen], self._seq_len)
        if not self._config.data.document_mask:
            return rows_NR, None
        return rows_NR, self._store.segment_ids(source, split, rows[chosen], self._seq_len)

    def seen(self, step: int) -> dict[str, int]:
        """Returns the number of rows of each source that were consumed before `step`."""
        counts = mixture_counts(np.array(step * self._batch_size, np.int64), self._weights)
        return {name: int(count) for name, count in zip(self.sources, counts, strict=True)}

    def in_no_row(self) -> dict[str, float]:
        """Returns for each source the share of its training tokens that no row holds."""
        shares = {}
        for name in self.sources:
            tokens = [file['tokens'] for file in self._store.manifest['sources'][name]['splits']['train']['files']]
            shares[name] = sum(count % (self._seq_len + 1) for count in tokens) / sum(tokens)
        return shares

    def _fingerprint(self) -> str:
        manifest = self._store.manifest
        files = {
            name: [
                [file['tokens'], file.get('sha256')] for file in manifest['sources'][name]['splits']['train']['files']
            ]
            for name in self.sources
        }
        decides = {
            'order': _ORDER_VERSION,
            'seed': self._config.seed,
            'seq_len': self._seq_len,
            'global_batch_size': self._batch_size,
            'shuffle': self._config.data.shuffle,
            'weights': dict(zip(self.sources, self._weights.tolist(), strict=True)),
            'rows': {name: [rows.train, rows.held_out] for name, rows in self._rows.items()},
            'tokenizer': manifest['tokenizer_sha256'],
            'files': files,
        }
        return hashlib.sha256(json.dumps(decides).encode()).hexdigest()


def make_dataset(config: Config, store: TokenStore) -> Dataset:
    """Returns the dataset of `config` from `store`. Raises UsageError when the two do not fit together."""
    _check_store(config, store)
    return Dataset(config, store, {name: _source_rows(config, store, name) for name in config.data.sources})


def _source_rows(config: Config, store: TokenStore, source: str) -> _SourceRows:
    seq_len, data = config.model.seq_len, config.data
    rows = store.num_rows(source, 'train', seq_len)
    validation = store.num_rows(source, 'validation', seq_len)
    wanted = max(data.holdout_min_rows, -int(-rows * data.holdout_share // 1))
    held_out = 0 if validation else min(wanted, rows // 2)
    if rows == held_out:
        files = store.manifest['sources'][source]['splits']['train']['files']
        raise errors.UsageError(
            f'source {source} in {store.path} has no row of seq_len + 1 = {seq_len + 1} tokens, since none of its '
            f'{len(files)} streams is so long ({sum(file["tokens"] for file in files):,} tokens in all); give it more '
            'text, join its files, or set a smaller --config.model.seq_len.'
        )
    return _SourceRows(source, rows - held_out, held_out, validation)


def _check_store(config: Config, store: TokenStore) -> None:
    manifest, data = store.manifest, config.data
    if missing := [name for name in data.sources if name not in manifest['sources']]:
        raise errors.UsageError(
            f'config.data.sources has {missing[0]}, but {store.path} was prepared with '
            f'{", ".join(manifest["sources"])}; prepare a store with it (--config.data.store=DIR), or leave it out '
            f'with --config.data.sources.{missing[0]}=none.'
        )
    if not data.sources:
        raise errors.UsageError(f'config.data.sources is empty; {store.path} has {", ".join(manifest["sources"])}.')
    if config.model.vocab_size < manifest['vocab_size']:
        raise errors.UsageError(
            f'config.model.vocab_size={config.model.vocab_size} is smaller than the {manifest["vocab_size"]} pieces of '
            f'the tokenizer in {store.path}; set --config.model.vocab_size={manifest["vocab_size"]}.'
        )
    for field in ('bos', 'eos_per_document'):
        if getattr(data, field) != manifest[field]:
            raise errors.UsageError(
                f'config.data.{field}={getattr(data, field)}, but {store.path} was prepared with {manifest[field]}; '
                'prepare another store with --config.data.store=DIR, or set the field back.'
            )
    _check_tokenizer(config, store)


def _check_tokenizer(config: Config, store: TokenStore) -> None:
    wanted = store.manifest['tokenizer_sha256']
    for path in filter(None, (store.tokenizer_path, config.data.tokenizer)):
        if (sha256 := loading.load(path).sha256) != wanted:
            raise errors.UsageError(
                f'wrong tokenizer: {path} has sha256 {sha256[:12]}..., but {store.path} was prepared with '
                f'{wanted[:12]}...; give that one with --config.data.tokenizer=FILE, or prepare another store.'
            )
