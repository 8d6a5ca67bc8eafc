"""Continues many prompts at once, greedily or by sampling.

Lengths are rounded up, so that prompts of many lengths share a few compiled programs (decode.py). A continuation
depends on its prompt and seed, not on the other prompts of the batch.

Shapes: B rows, P positions of the padded prompts.
"""

import dataclasses
import math
import time
import zlib
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from tinyllama_jax import decode, errors, model
from tinyllama_jax import ops as ops_lib
from tinyllama_jax.config import ModelConfig
from tinyllama_jax.ops import Ops

_SMALLEST = 32  # the smallest padded length
_PATIENCE_S = 0.1  # blocks double in length while they take less time
_COLDEST = 1e-6  # temperature: logits divided by less would overflow
_ALL = 2.0  # as top_p: above any sum of probabilities, however rounded


def generate(params: dict, config: ModelConfig, prompt_ids: Sequence[int], **options) -> list[int]:
    """Returns the tokens that `stream` yields."""
    return list(stream(params, config, prompt_ids, **options))


def stream(params: dict, config: ModelConfig, prompt_ids: Sequence[int], **options) -> Iterator[int]:
    """Yields the continuation of one prompt token by token; `options` and errors are those of `Generator.batch`."""
    blocks = Generator(params, config).batch([prompt_ids], **options)

    def tokens():  # apart, so that wrong arguments raise at the call, not at the first token
        sent = 0
        for batch in blocks:
            yield from batch.tokens[0][sent:]
            sent = len(batch.tokens[0])

    return tokens()


@dataclasses.dataclass
class Continuations:
    """The continuations of a batch of prompts so far. Setting an element of `ended` stops that prompt."""

    tokens: list[list[int]]  # the new tokens of each prompt
    ended: list[bool]


class Generator:
    """Generates from a model. Holds a copy of the weights in the compute dtype.

    Args:
      params: from `model.init_params`, float32.
      ops: plain JAX on the default device by default; with those of a mesh, the batch is sharded over it.
    """

    def __init__(self, params: dict, config: ModelConfig, *, ops: Ops | None = None):
        self._config = config
        self._ops = ops or ops_lib.make_ops(ops_lib.PLAIN)
        self._weights = decode.weights(params, config=config, dtype=model.compute_dtype(config, self._ops))

    def batch(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | Sequence[int] = 0,
        eos_id: int | Sequence[int] | None = None,
    ) -> Iterator[Continuations]:
        """Continues the prompts together; after every few tokens yields the same Continuations object, updated.

        A continuation ends with `eos_id`, or one of several (which is kept), after `max_new_tokens`, or when the model
        has read `seq_len` tokens. The same prompt, seed and options give the same tokens.

        Args:
          temperature: 0 takes the likeliest token; otherwise logits are divided by it and a token is sampled.
          top_k: sample among the k likeliest tokens only.
          top_p: of those, sample among the likeliest that together reach this probability.
          seed: for sampling; one for all prompts, or one for each. Prompts that differ are sampled independently.

        Raises UsageError for arguments out of range.
        """
        seeds = [seed] * len(prompts) if isinstance(seed, int) else seed
        _check_arguments(prompts, self._config, max_new_tokens, temperature, top_k, top_p, seeds)
        most = self._config.vocab_size
        sampling = (temperature, min(top_k or most, most), top_p or _ALL) if temperature else None
        ends = [eos_id] if isinstance(eos_id, int) else eos_id
        eos_E = np.array(ends or [decode.NOTHING], np.int32)
        return self._blocks(prompts, max_new_tokens, sampling, seeds, eos_E)

    def _blocks(self, prompts, max_new_tokens: int, sampling, seeds, eos_E: np.ndarray) -> Iterator[Continuations]:
        tokens_BP, length_B, limit_B = self._pad(prompts, max_new_tokens)
        # Prompts of one seed are drawn independently: each has its own ids in its key.
        keys = [
            jax.random.fold_in(model.random_key(seed), zlib.crc32(np.array(ids, np.uint32).tobytes()))
            for seed, ids in zip(seeds, prompts, strict=True)
        ]
        key_B = jnp.stack([*keys, *[jax.random.key(0)] * (len(length_B) - len(keys))])
        slots = padded_length(tokens_BP.shape[1] + int(limit_B.max()) - 1)
        batch = Continuations([[] for _ in prompts], [False] * len(prompts))
        static = {'config': self._config, 'ops': self._ops}
        state = decode.begin(self._weights, tokens_BP, length_B, limit_B, key_B, sampling, slots=slots, **static)
        block_BC, count = state.token_B[:, None], 1
        while True:
            start = time.monotonic()
            for row, new in enumerate(np.asarray(block_BC)[: len(prompts)]):  # waits for the device
                batch.tokens[row] += new[new != decode.NOTHING].tolist()
                done = batch.tokens[row][-1] in eos_E or len(batch.tokens[row]) == limit_B[row]
                batch.ended[row] = batch.ended[row] or done
            seconds = time.monotonic() - start
            yield batch
            if all(batch.ended):
                return
            ended_B = np.ones(len(length_B), bool)
            ended_B[: len(prompts)] = batch.ended
            # Short blocks show their tokens soon, long ones save calls.
            count = min(2 * count, decode.BLOCK) if seconds < _PATIENCE_S else count
            state, block_BC = decode.advance(self._weights, state, count, ended_B, sampling, eos_E, **static)

    def _pad(self, prompts, max_new_tokens: int):
        """Returns tokens [B, P], lengths [B] and limits [B]; rows that only fill the batch up have the limit 0."""
        # A power of two, so that few batch sizes are compiled, then a multiple of the batch shards.
        B = self._ops.padded_batch(1 << (len(prompts) - 1).bit_length())
        tokens_BP = np.zeros((B, padded_length(max(map(len, prompts)))), np.int32)
        length_B, limit_B = np.ones(B, np.int32), np.zeros(B, np.int32)
        for row, ids in enumerate(prompts):
            tokens_BP[row, : len(ids)] = ids
            length_B[row] = len(ids)
            limit_B[row] = min(max_new_tokens, self._config.seq_len - len(ids) + 1)
        return tokens_BP, length_B, limit_B


def _check_arguments(prompts, config: ModelConfig, max_new_tokens, temperature, top_k, top_p, seeds) -> None:
    def refuse(name: str, value, wanted: str):
        raise errors.UsageError(f'{name} must be {wanted}, got {value}.')

    for ids in prompts:
        if not 0 < len(ids) <= config.seq_len:
            refuse("the prompt's length", len(ids), f'between 1 and seq_len = {config.seq_len} tokens')
        if not 0 <= min(ids) <= max(ids) < config.vocab_size:
            refuse("the prompt's ids", f'{min(ids)} to {max(ids)}', f'below vocab_size = {config.vocab_size}')
    if max_new_tokens < 1:
        refuse('max_new_tokens', max_new_tokens, 'at least 1')
    if not (math.isfinite(temperature) and (temperature == 0 or temperature >= _COLDEST)):
        refuse('temperature', temperature, f'0, or a finite number from {_COLDEST} up')
    if top_k is not None and top_k < 1:
        refuse('top_k', top_k, 'at least 1')
    if top_p is not None and not 0 < top_p <= 1:
        refuse('top_p', top_p, 'above 0 and at most 1')
    for seed in seeds:
        if not 0 <= seed < 2**63:
            refuse('seed', seed, 'from 0 to 2**63 - 1')


def padded_length(length: int, smallest: int = _SMALLEST) -> int:
    """Returns the smallest of `smallest` times 1, 2, 3, 4, 6, 8, 12, ... that is at least `length`."""
    size = smallest
    while size < length:
        if size >= 2 * smallest and size * 3 // 2 >= length:
            return size * 3 // 2
        size *= 2
    return size
