"""The unigram model against an independent count; bits per byte against hand and bootstrap."""

import collections
import dataclasses
import math

import numpy as np
import pytest

from tests.support import corpora
from tinyllama_jax import errors
from tinyllama_jax.config import Config, ModelConfig, TrainConfig
from tinyllama_jax.data import pipeline, prepare, store
from tinyllama_jax.report import baselines
from tinyllama_jax.tokenizer.spm import SentencePieceTokenizer


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp('baselines')
    data = corpora.config(root)
    prepare.prepare(data, root / 'store')
    config = Config(
        model=ModelConfig(vocab_size=corpora.PIECES, seq_len=31),
        data=data,
        train=TrainConfig(num_steps=5, global_batch_size=8, micro_batch_size=8, eval_rows=20),
    )
    return config, root / 'store'


def test_unigram_losses_equal_an_independent_count(run):
    config, path = run
    data = pipeline.make_dataset(config, store.TokenStore(path))
    unigram = baselines.unigram(config, path, corpora.tokenizer_path())
    for number, name in enumerate(data.sources):
        counts = collections.Counter()
        for step in range(config.train.num_steps):
            sources, _ = data.rows(step)
            for source, row in zip(sources, data.batch(step)[0], strict=True):
                if source == number:
                    counts.update(row.tolist())
        total = counts.total() + corpora.PIECES
        losses = [
            -math.log((counts[token] + 1) / total) for row in data.validation(name)[0] for token in row[1:].tolist()
        ]
        assert unigram.losses[name] == pytest.approx(sum(losses) / len(losses), rel=1e-9)
        assert unigram.losses[name] < math.log(corpora.PIECES)
    assert np.exp(unigram.logprobs_V).sum() == pytest.approx(1)


def test_unigram_counts_no_more_than_it_must(run, monkeypatch):
    config, path = run
    long = dataclasses.replace(config, train=dataclasses.replace(config.train, num_steps=10**9))
    monkeypatch.setattr(baselines, '_MOST_TOKENS', 5 * 8 * 32)  # all of the short run's
    tokens = corpora.tokenizer_path()
    assert baselines.unigram(long, path, tokens).losses == baselines.unigram(config, path, tokens).losses


def test_unigram_without_a_store_names_the_command(run, tmp_path):
    with pytest.raises(errors.UsageError, match=r'main\.py prepare'):
        baselines.unigram(run[0], tmp_path, corpora.tokenizer_path())


def test_bits_per_byte_by_hand():
    value, stderr = baselines.bits_per_byte([(-8 * math.log(2), 4), (-22 * math.log(2), 11)])
    assert value == pytest.approx(2)
    assert stderr == pytest.approx(0, abs=1e-12)  # both have two bits per byte


def test_standard_error_agrees_with_a_bootstrap():
    rng = np.random.default_rng(0)
    sizes = rng.integers(10, 60, 200)
    samples = [(-size * rng.uniform(0.5, 2.5), size) for size in sizes.tolist()]
    draws = [baselines.bits_per_byte([samples[i] for i in rng.integers(0, 200, 200)])[0] for _ in range(500)]
    assert baselines.bits_per_byte(samples)[1] == pytest.approx(np.std(draws), rel=0.15)


def test_unigram_bits_per_byte_by_hand():
    tokenizer = SentencePieceTokenizer(corpora.tokenizer_path())
    uniform = baselines.Unigram({}, np.full(corpora.PIECES, -math.log(corpora.PIECES)), tokenizer)
    ids = tokenizer.encode('if 1984')
    expected = len(ids) * math.log2(corpora.PIECES) / len(b' if 1984')
    assert uniform.bits_per_byte([baselines.Choice([' no', ' if 1984'], 1)]) == pytest.approx(expected)


def test_only_multiple_choice_samples_are_taken():
    good = {'arguments': [['c', ' a'], ['c', ' b']], 'filtered_resps': [[-1.5, False], [-2.5, True]], 'target': 1}
    generated = {'arguments': [['c', {'until': ['\n']}]], 'filtered_resps': ['text'], 'target': 'text'}
    assert baselines.choices([good, generated]) == [baselines.Choice([' a', ' b'], 1)]
