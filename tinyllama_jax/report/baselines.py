"""What a model is compared with: a unigram model of its own training tokens, and chance; bits per byte of texts."""

import dataclasses
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from tinyllama_jax.config import Config
from tinyllama_jax.data import pipeline, store
from tinyllama_jax.tokenizer import loading
from tinyllama_jax.tokenizer.base import BaseTokenizer

_MOST_TOKENS = 1 << 22  # counted at most: enough for a few thousandths of a nat


@dataclasses.dataclass(frozen=True)
class Choice:
    """One multiple-choice sample."""

    texts: Sequence[str]
    right: int  # index of the right text

    @property
    def answer(self) -> str:
        """The right text."""
        return self.texts[self.right]


@dataclasses.dataclass(frozen=True)
class Unigram:
    """Token frequencies of the training rows, add-one smoothed."""

    losses: Mapping[str, float]  # source: nats per token on its held-out rows, by the source's own frequencies
    logprobs_V: np.ndarray  # nats, of all sources together
    tokenizer: BaseTokenizer

    def bits_per_byte(self, samples: Sequence[Choice]) -> float:
        """Returns the bits per byte of the right answers under `logprobs_V`."""
        nats = sum(-self.logprobs_V[self.tokenizer.encode(sample.answer.lstrip())].sum() for sample in samples)
        return float(nats / math.log(2) / sum(len(sample.answer.encode()) for sample in samples))


def unigram(config: Config, store_path: pathlib.Path, tokenizer_path: pathlib.Path) -> Unigram:
    """Counts the tokens of the run's first training steps (at most some four million) and scores held-out rows.

    Raises UsageError if there is no store that fits `config`.
    """
    data = pipeline.make_dataset(config, store.TokenStore(store_path))
    counts_NV = np.ones((len(data.sources), config.model.vocab_size))
    rows = config.train.global_batch_size * (config.model.seq_len + 1)
    for step in range(min(config.train.num_steps, -(-_MOST_TOKENS // rows))):
        sources_B, _ = data.rows(step)
        rows_BR = data.batch(step)[0]
        for number in np.unique(sources_B):
            counts_NV[number] += np.bincount(rows_BR[sources_B == number].ravel(), minlength=counts_NV.shape[1])
    losses = {
        name: float(-_logprobs(counts_V)[rows_NR[:, 1:]].mean())
        for name, counts_V in zip(data.sources, counts_NV, strict=True)
        if len(rows_NR := data.validation(name)[0])
    }
    return Unigram(losses, _logprobs(counts_NV.sum(0)), loading.load(tokenizer_path))


def _logprobs(counts_V: np.ndarray) -> np.ndarray:
    return np.log(counts_V / counts_V.sum())


def choices(samples: Iterable[Mapping[str, Any]]) -> list[Choice]:
    """Returns the multiple-choice samples among those that lm-eval logged for a task."""
    multiple_choice = []
    for sample in samples:
        arguments, scores, right = sample['arguments'], sample['filtered_resps'], sample['target']
        if isinstance(right, int) and len(arguments) == len(scores) > max(1, right):
            multiple_choice.append(Choice([continuation for _, continuation in arguments], right))
    return multiple_choice


def bits_per_byte(samples: Sequence[tuple[float, int]]) -> tuple[float, float]:
    """Returns (bits per byte of all texts together, its standard error as a ratio of sums).

    A sample is the log-likelihood (nats) and the size (bytes) of a text.
    """
    nats, sizes = np.array(samples, float).T
    bits = -nats / math.log(2)
    ratio = bits.sum() / sizes.sum()
    residuals = bits - ratio * sizes
    variance = (residuals**2).sum() / max(len(samples) - 1, 1) / len(samples)
    return float(ratio), float(math.sqrt(variance) / sizes.mean())
