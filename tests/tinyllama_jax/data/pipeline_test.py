"""Batches: the order of rows, slices of hosts, held-out rows, document masks, a config that does not fit the store."""

import dataclasses
import functools
import threading
import time

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from tests.support import corpora, tiny, tiny_export
from tinyllama_jax import errors, model
from tinyllama_jax import step as step_lib
from tinyllama_jax.config import Config, ModelConfig, SourceConfig, TrainConfig
from tinyllama_jax.data import pipeline, prepare, store
from tinyllama_jax.settings import experiment
from tinyllama_jax.tokenizer import spm

WEIGHTS = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=3).map(pipeline.integer_weights)


@pytest.fixture(scope='module')
def tokens(tmp_path_factory):
    root = tmp_path_factory.mktemp('pipeline')
    prepare.prepare(corpora.config(root), root / 'store')
    return store.TokenStore(root / 'store')


def config(**changes) -> Config:
    """Returns a run's config on the store of both corpora; changes write a dotted field with __ for dots."""
    base = Config(
        model=ModelConfig(vocab_size=corpora.PIECES, seq_len=31),
        data=corpora.DataConfig(
            sources={'slimpajama': SourceConfig(weight=0.7), 'starcoder': SourceConfig(weight=0.3)}, prefetch_steps=2
        ),
        train=TrainConfig(global_batch_size=24, eval_rows=20),
    )
    for path, value in changes.items():
        base = experiment.override(base, path.replace('__', '.'), str(value))
    return base


SEQ_LEN = 255
MASKED = config(model__seq_len=SEQ_LEN, data__document_mask=True)
LLAMA = dataclasses.replace(tiny.MODEL, vocab_size=corpora.PIECES, seq_len=SEQ_LEN)

# --- the arithmetic ---


@hypothesis.given(size=st.integers(1, 3000), key=st.integers(0, 9))
def test_permuted_is_a_bijection(size, key):
    image = pipeline.permuted(np.arange(size), size, key, 'name')
    np.testing.assert_array_equal(np.sort(image), np.arange(size))


@hypothesis.given(size=st.integers(1, 1 << 40), data=st.data())
def test_permuted_is_pointwise_and_stays_in_range(size, data):
    index = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20)))
    image = pipeline.permuted(index, size, 1)
    assert image.dtype == np.int64
    assert image.min() >= 0
    assert image.max() < size
    np.testing.assert_array_equal(image, [pipeline.permuted(np.array([i]), size, 1)[0] for i in index])
    assert len(set(image.tolist())) == len(set(index.tolist()))


def test_permuted_looks_random():
    size = 10_007
    image = pipeline.permuted(np.arange(size), size, 'epoch', 0)
    assert np.sum(image == np.arange(size)) < 10
    assert np.sum(np.diff(image) == 1) < 10
    halves = np.sum(image[: size // 2] < size // 2) / size
    assert abs(halves - 0.25) < 0.01
    assert np.mean(image == pipeline.permuted(np.arange(size), size, 'epoch', 1)) < 0.001


@hypothesis.given(weights=WEIGHTS, start=st.one_of(st.integers(0, 1000), st.integers(0, 1 << 40)))
def test_mixture_is_exact_at_every_prefix(weights, start):
    positions = start + np.arange(500)
    counts = pipeline.mixture_counts(positions, weights)
    shares = weights / weights.sum()
    exact = np.array([[int(p) * int(w) / int(weights.sum()) for p in positions] for w in weights])
    assert np.abs(counts - exact).max() < 1 + 1e-3
    assert shares.min() > 0
    np.testing.assert_array_equal(counts.sum(0), positions)
    sources, index = pipeline.mixture(positions, weights)
    for source in range(len(weights)):
        np.testing.assert_array_equal(np.diff(counts[source]), (sources == source)[:-1])
        np.testing.assert_array_equal(index[sources == source], counts[source][sources == source])


def test_the_papers_weights_are_exact():
    assert pipeline.integer_weights([0.693584, 0.306416]).tolist() == [693_584, 306_416]
    counts = pipeline.mixture_counts(np.int64(1_430_512 * 1024), pipeline.integer_weights([0.693584, 0.306416]))
    assert counts.tolist() == [round(1_430_512 * 1024 * 0.693584), round(1_430_512 * 1024 * 0.306416)]


# --- batches ---


def test_a_batch_is_its_rows(tokens):
    data = pipeline.make_dataset(config(), tokens)
    batch = data.batch(5, accumulation=3)
    assert batch.shape == (3, 8, 32)
    assert batch.dtype == np.uint16
    sources, rows = data.rows(5)
    for i, (source, row) in enumerate(zip(sources, rows, strict=True)):
        expected = tokens.read_rows(data.sources[source], 'train', np.array([row]), 31)[0]
        np.testing.assert_array_equal(batch.reshape(24, 32)[i], expected)
    np.testing.assert_array_equal(data.batch(5).reshape(24, 32), batch.reshape(24, 32))
    with pytest.raises(ValueError, match='multiple of accumulation 5'):
        data.batch(0, accumulation=5)


@hypothesis.settings(max_examples=20)
@hypothesis.given(
    hosts=st.sampled_from([1, 2, 3, 4, 6]), accumulation=st.sampled_from([1, 2]), step=st.integers(0, 10**6)
)
def test_the_hosts_slices_make_the_batch(tokens, hosts, accumulation, step):
    data = pipeline.make_dataset(MASKED, tokens)
    share = 24 // accumulation // hosts
    for read in (data.batch, data.segment_ids):
        parts = [
            read(step, accumulation=accumulation, columns=slice(host * share, (host + 1) * share))
            for host in range(hosts)
        ]
        np.testing.assert_array_equal(np.concatenate(parts, axis=1), read(step, accumulation=accumulation))


def test_a_host_reads_only_its_slice(tokens, monkeypatch):
    data, read = pipeline.make_dataset(MASKED, tokens), {}

    def record(name, plain, *args):
        read.setdefault(name, []).extend(args[2])
        return plain(*args)

    for name in ('read_rows', 'segment_ids'):
        monkeypatch.setattr(tokens, name, functools.partial(record, name, getattr(tokens, name)))
    next(data.batches(2, 3, columns=slice(4, 9)))
    assert {name: len(rows) for name, rows in read.items()} == {'read_rows': 5, 'segment_ids': 5}


@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('prefetch', [1, 3])
def test_the_iterator_yields_each_step_s_batch(tokens, prefetch, masked):
    data = pipeline.make_dataset(config(data__prefetch_steps=prefetch, data__document_mask=masked), tokens)
    served = list(data.batches(7, 15, accumulation=2, columns=slice(0, 6)))
    assert len(served) == 8
    for step, (batch, segment_ids) in zip(range(7, 15), served, strict=True):
        np.testing.assert_array_equal(batch, data.batch(step, accumulation=2, columns=slice(0, 6)))
        if masked:
            np.testing.assert_array_equal(segment_ids, data.segment_ids(step, accumulation=2, columns=slice(0, 6)))
        else:
            assert segment_ids is None
    assert list(data.batches(3, 3)) == []


def test_closing_the_iterator_ends_its_threads(tokens):
    before = set(threading.enumerate())
    iterator = pipeline.make_dataset(config(), tokens).batches(0, 10**9)
    next(iterator)
    assert set(threading.enumerate()) - before
    iterator.close()
    deadline = time.monotonic() + 10
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not set(threading.enumerate()) - before


def test_a_damaged_chunk_ends_the_iterator(tokens, monkeypatch):
    def fail(*_):
        raise errors.RunError('damaged')

    monkeypatch.setattr(tokens, 'read_rows', fail)
    with pytest.raises(errors.RunError, match='damaged'):
        next(pipeline.make_dataset(config(), tokens).batches(0, 10))


def test_an_epoch_visits_every_training_row_once_and_never_a_held_out_one(tokens):
    settings = config(model__seq_len=15)
    data = pipeline.make_dataset(settings, tokens)
    assert tokens.num_rows('starcoder', 'validation', 15) == 0
    visited = {name: [] for name in data.sources}
    epochs = {}
    for name in data.sources:
        everything = tokens.num_rows(name, 'train', 15)
        held_out = 64 if name == 'starcoder' else 0
        epochs[name] = everything - held_out
    step = 0
    while any(data.seen(step)[name] < 3 * epochs[name] for name in data.sources):
        sources, rows = data.rows(step)
        for i, name in enumerate(data.sources):
            visited[name].extend(rows[sources == i].tolist())
        step += 1
    orders = []
    for name, size in epochs.items():
        for epoch in range(3):
            rows = visited[name][epoch * size : (epoch + 1) * size]
            assert len(set(rows)) == size
            orders.append(tuple(rows))
    assert len(set(orders)) == 6
    # No epoch visits the held-out rows, and every other row is visited.
    missing = sorted(set(range(epochs['starcoder'] + 64)) - set(visited['starcoder']))
    assert len(missing) == 64
    held = {row.tobytes() for row in tokens.read_rows('starcoder', 'train', np.array(missing), 15)}
    assert {row.tobytes() for row in data.validation('starcoder')[0]} <= held
    assert len(data.validation('starcoder')[0]) == 20


def test_validation_depends_on_neither_seed_nor_batch(tokens):
    one = pipeline.make_dataset(config(), tokens)
    other = pipeline.make_dataset(config(seed=1, train__global_batch_size=8), tokens)
    for name in one.sources:
        np.testing.assert_array_equal(one.validation(name)[0], other.validation(name)[0])
    rows = one.validation('slimpajama')[0]
    everything = tokens.read_rows(
        'slimpajama', 'validation', np.arange(tokens.num_rows('slimpajama', 'validation', 31)), 31
    )
    assert {row.tobytes() for row in rows} <= {row.tobytes() for row in everything}
    few = pipeline.make_dataset(config(train__eval_rows=3), tokens).validation('starcoder')[0]
    np.testing.assert_array_equal(few, one.validation('starcoder')[0][:3])


@pytest.mark.parametrize(
    ('share', 'least', 'expected'), [(0.001, 64, 64), (0.5, 1, None), (0.99, 64, None), (0.0, 0, 0), (0.1, 0, None)]
)
def test_how_much_is_held_out(tokens, share, least, expected):
    settings = config(data__holdout_share=share, data__holdout_min_rows=least, train__eval_rows=100_000)
    everything = tokens.num_rows('starcoder', 'train', 31)
    held_out = len(pipeline.make_dataset(settings, tokens).validation('starcoder')[0])
    wanted = expected if expected is not None else min(everything // 2, -(-int(everything * share * 10) // 10))
    assert abs(held_out - wanted) <= 1
    assert held_out <= everything // 2


def test_seen_counts_the_rows(tokens):
    data = pipeline.make_dataset(config(), tokens)
    assert data.seen(0) == {'slimpajama': 0, 'starcoder': 0}
    sources = np.concatenate([data.rows(step)[0] for step in range(9)])
    assert data.seen(9) == {'slimpajama': int(np.sum(sources == 0)), 'starcoder': int(np.sum(sources == 1))}


@pytest.mark.parametrize(
    'change',
    [
        {'seed': 4},
        {'model__seq_len': 30},
        {'train__global_batch_size': 12},
        {'data__sources__starcoder__weight': 0.4},
        {'data__sources__starcoder': 'none'},
        {'data__holdout_min_rows': 65},
    ],
    ids=lambda change: next(iter(change)),
)
def test_other_batches_have_another_fingerprint(tokens, change):
    base = pipeline.make_dataset(config(), tokens).fingerprint
    assert pipeline.make_dataset(config(train__eval_rows=5, data__prefetch_steps=9), tokens).fingerprint == base
    assert pipeline.make_dataset(config(**change), tokens).fingerprint != base


def test_other_tokens_have_another_fingerprint(tokens, tmp_path):
    corpora.slimpajama(tmp_path / 'slim')
    corpora.starcoder(tmp_path / 'star')
    changed = corpora.texts(12, seed=20)
    changed[3] = ' '.join(reversed(changed[3].split(' ')))
    corpora.write_parquet(tmp_path / 'star' / 'lang0' / 'train-00000-of-00001.parquet', changed)
    prepare.prepare(corpora.config(tmp_path), tmp_path / 'store')
    other = pipeline.make_dataset(config(), store.TokenStore(tmp_path / 'store'))
    assert other.fingerprint != pipeline.make_dataset(config(), tokens).fingerprint


# --- documents ---


def ids_by_eos(rows) -> np.ndarray:
    """Returns segment ids of rows [..., R] from the tokens alone, if each document ends with one EOS."""
    eos = spm.SentencePieceTokenizer(corpora.tokenizer_path()).eos_id
    begins = np.zeros(rows.shape, int)
    begins[..., 1:] = rows[..., :-1] == eos
    return begins.cumsum(axis=-1)


def test_segment_ids_change_after_each_end_of_a_document(tokens):
    data = pipeline.make_dataset(MASKED, tokens)
    pairs = [data.validation(name) for name in data.sources]
    pairs.append((data.batch(5, accumulation=3), data.segment_ids(5, accumulation=3)))
    for rows, segment_ids in pairs:
        assert segment_ids.dtype == np.uint16
        assert segment_ids.max() > 0
        np.testing.assert_array_equal(segment_ids, ids_by_eos(rows))


def test_masks_change_no_batch(tokens):
    plain, masked = (
        pipeline.make_dataset(config(model__seq_len=SEQ_LEN, data__document_mask=on), tokens) for on in (False, True)
    )
    assert plain.fingerprint == masked.fingerprint
    assert plain.segment_ids(5) is None
    assert plain.batch(5).tobytes() == masked.batch(5).tobytes()
    for name in plain.sources:
        assert plain.validation(name)[1] is None
        np.testing.assert_array_equal(plain.validation(name)[0], masked.validation(name)[0])


@functools.partial(jax.jit, static_argnames='restart')
def logits(params, rows_BR, segment_ids_BR, *, restart: bool):
    """Returns logits [B, T, V] of the rows' inputs, with the train step's segments and positions."""
    settings = config(data__document_mask=True, data__restart_positions=restart)
    inputs_BT, _ = step_lib._split(rows_BR)
    x_BTD, _ = model.hidden(params, inputs_BT, LLAMA, **step_lib._documents(segment_ids_BR, settings))
    return model.logits(params, x_BTD)


@pytest.fixture(scope='module')
def packed(tokens):
    """(a row [R] of the store, its segment ids [R], the start of its second document, in attention's second block)"""
    data = pipeline.make_dataset(MASKED, tokens)
    rows_BR, ids_BR = data.batch(0)[0], data.segment_ids(0)[0]
    begins_B = (ids_BR == 1).argmax(axis=1)
    row = int(np.flatnonzero((begins_B > 130) & (begins_B < SEQ_LEN - 20))[0])
    return rows_BR[row], ids_BR[row], int(begins_B[row])


@pytest.mark.parametrize(('masked', 'restart'), [(True, False), (True, True), (False, False)])
def test_only_without_masks_a_document_sees_the_one_before(packed, masked, restart):
    row_R, ids_R, begin = packed
    other_R = row_R.copy()
    other_R[:begin] = (row_R[:begin] + 1 + np.arange(begin) % 7) % corpora.PIECES
    ids_BR = np.stack([ids_R, ids_R]) if masked else None
    params = tiny_export.random_params(LLAMA)
    before, after = np.asarray(logits(params, np.stack([row_R, other_R]), ids_BR, restart=restart))
    changed_T = (before != after).any(axis=1)  # in any bit
    assert changed_T[:begin].all()
    np.testing.assert_array_equal(changed_T[begin:], not masked)


def test_with_restarted_positions_a_document_is_computed_as_at_the_start_of_a_row(packed):
    row_R, ids_R, begin = packed
    size = len(row_R) - begin
    rows_BR, ids_BR = (np.stack([x_R, np.roll(x_R, -begin)]) for x_R in (row_R, ids_R))
    params = tiny_export.random_params(LLAMA)
    plain, restarted = (np.asarray(logits(params, rows_BR, ids_BR, restart=restart)) for restart in (False, True))
    np.testing.assert_allclose(restarted[0, begin:], plain[1, : size - 1], atol=1e-5, rtol=0)
    # Rotary attention knows distances only, so that positions which do not restart differ by rounding. They do differ.
    assert (restarted[0, begin:] != plain[0, begin:]).any()


# --- a config that does not fit the store ---


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'model__vocab_size': 399}, r'vocab_size=399 is smaller than the 400 pieces.*--config\.model\.vocab_size=400'),
        ({'data__sources__more__path': 'x'}, r'has more, but .* with slimpajama, starcoder.*sources\.more=none'),
        ({'data__bos': 'true'}, r'config\.data\.bos=True, but .* prepared with False'),
        ({'data__eos_per_document': 2}, r'config\.data\.eos_per_document=2, but .* prepared with 1'),
        (
            {'model__seq_len': 100_000},
            r'slimpajama .* no row of seq_len \+ 1 = 100001 tokens, since none of its 3 streams .* tokens in all',
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else '',
)
def test_a_config_that_does_not_fit_the_store_is_refused(tokens, changes, message):
    with pytest.raises(errors.UsageError, match=message):
        pipeline.make_dataset(config(**changes), tokens)


def test_the_share_of_tokens_that_no_row_holds(tokens):
    for name, share in pipeline.make_dataset(config(), tokens).in_no_row().items():
        train = tokens.manifest['sources'][name]['splits']['train']
        assert share == pytest.approx(1 - 32 * tokens.num_rows(name, 'train', 31) / train['tokens'])


def test_a_wrong_tokenizer_is_refused(tokens, tmp_path):
    other = tmp_path / 'other.model'
    spm.train(corpora.texts(50), other, 300)
    with pytest.raises(errors.UsageError, match=r'wrong tokenizer: .*other\.model'):
        pipeline.make_dataset(config(data__tokenizer=other), tokens)
    pipeline.make_dataset(config(data__tokenizer=corpora.tokenizer_path()), tokens)
    without = dataclasses.replace(config().data, sources={})
    with pytest.raises(errors.UsageError, match='sources is empty'):
        pipeline.make_dataset(dataclasses.replace(config(), data=without), tokens)


FROZEN_PERMUTATION = [908, 396, 268, 875, 317, 28, 766, 355]
FROZEN_MIXTURE = [
    [0, 1, 0, 0, 1, 0, 0, 0],
    [693584000, 306416000, 693584001, 693584002, 306416001, 693584003, 693584004, 693584005],
]


def test_the_order_is_frozen():
    """If these numbers change, every resumed run gets other batches: bump the order's version."""
    assert pipeline.permuted(np.arange(8), 1_000, 'epoch', 3407, 'web', 0).tolist() == FROZEN_PERMUTATION
    sources, rows = pipeline.mixture(np.arange(10**9, 10**9 + 8), pipeline.integer_weights([0.693584, 0.306416]))
    assert [sources.tolist(), rows.tolist()] == FROZEN_MIXTURE
