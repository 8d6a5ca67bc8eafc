"""Text from a model: a key-value cache of fixed size, greedy or sampled, one sequence at a time.

Shapes: B = 1, T new positions, S cache slots, V vocabulary. Lengths are rounded up, so
that prompts of many lengths share a few compiled programs.
"""

import functools
import math
import pathlib
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from tinyllama_jax import errors, model, tokenizer, workdir
from tinyllama_jax.config import Config, ModelConfig

_SMALLEST = 32  # slots; sizes are this times a power of two
_ALL = 2.0  # as top_p: above any sum of probabilities, however rounded


def generate_run(
    folder: pathlib.Path, config: Config | None, *, prompt: Sequence[str], step: int | None = None, **options
) -> None:
    """Prints each prompt of `prompt` with its continuation by a workdir's checkpoint, as it comes; see `stream`."""
    if not prompt:
        raise errors.UsageError('--prompt=TEXT is missing; it may be given several times.')
    loaded = workdir.load(folder, config, step)
    pieces = tokenizer.Tokenizer(loaded.tokenizer_path)
    for text in prompt:
        ids = ([pieces.bos_id] if loaded.config.data.bos else []) + pieces.encode(text)
        shown = ''
        for token in stream(loaded.params, loaded.config.model, ids, eos_id=pieces.eos_id, **options):
            ids = [*ids, token]
            whole = pieces.decode(ids)
            if not whole.endswith('\ufffd'):  # half a character: wait for its other bytes
                print(whole[len(shown) :], end='', flush=True)
                shown = whole
        print()


def generate(params: dict, config: ModelConfig, prompt_ids: Sequence[int], **options) -> list[int]:
    """The tokens that `stream` yields, as a list."""
    return list(stream(params, config, prompt_ids, **options))


def stream(
    params: dict,
    config: ModelConfig,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eos_id: int | None = None,
) -> Iterator[int]:
    """Yields the continuation of `prompt_ids` token by token.

    It ends after `eos_id` (which is yielded), after `max_new_tokens`, or when the
    model has read `seq_len` tokens. The same arguments give the same tokens.

    Args:
      temperature: 0 takes the likeliest token; else logits are divided by it and sampled.
      top_k: samples among the k likeliest only.
      top_p: then among the likeliest that together reach this probability.

    Raises UsageError for arguments that cannot work.
    """
    _check(prompt_ids, config, max_new_tokens, temperature, top_k, top_p)
    room = min(max_new_tokens, config.seq_len - len(prompt_ids) + 1)
    sampling = (temperature, top_k or config.vocab_size, top_p or _ALL) if temperature else None
    return _tokens(params, config, prompt_ids, room, sampling, seed, eos_id)


def _check(prompt_ids, config: ModelConfig, max_new_tokens, temperature, top_k, top_p) -> None:
    def refuse(name: str, value, wanted: str):
        raise errors.UsageError(f'{name} must be {wanted}, got {value}.')

    if not 0 < len(prompt_ids) <= config.seq_len:
        refuse("the prompt's length", len(prompt_ids), f'between 1 and seq_len = {config.seq_len} tokens')
    if not 0 <= min(prompt_ids) <= max(prompt_ids) < config.vocab_size:
        refuse("the prompt's ids", f'{min(prompt_ids)} to {max(prompt_ids)}', f'below vocab_size = {config.vocab_size}')
    if max_new_tokens < 1:
        refuse('max_new_tokens', max_new_tokens, 'at least 1')
    if not (math.isfinite(temperature) and temperature >= 0):
        refuse('temperature', temperature, 'a finite number, 0 or above')
    if top_k is not None and top_k < 1:
        refuse('top_k', top_k, 'at least 1')
    if top_p is not None and not 0 < top_p <= 1:
        refuse('top_p', top_p, 'above 0 and at most 1')


def _tokens(params, config: ModelConfig, prompt_ids, room: int, sampling, seed: int, eos_id) -> Iterator[int]:
    length = len(prompt_ids)
    params = jax.device_put(params)
    cache = make_cache(config, _rounded(length + room))
    tokens_BT = np.zeros((1, _rounded(length)), np.int32)
    tokens_BT[0, :length] = prompt_ids
    start, last = 0, length - 1  # what the padding writes is overwritten before it is read
    for number, key in enumerate(jax.random.split(jax.random.key(seed), room)):
        token, cache = _advance(params, tokens_BT, start, last, cache, key, sampling, config=config)
        yield int(token)
        if token == eos_id:
            return
        tokens_BT, start, last = np.full((1, 1), token, np.int32), length + number, 0


def _rounded(length: int) -> int:
    return _SMALLEST << max(0, math.ceil(math.log2(length / _SMALLEST)))


def make_cache(config: ModelConfig, slots: int) -> dict:
    """An empty cache of `slots` positions for one sequence: {k, v} of [L, 1, S, K, H]."""
    shape = (config.num_layers, 1, slots, config.num_kv_heads, config.head_dim)
    return {name: jnp.zeros(shape, model.compute_dtype(config)) for name in ('k', 'v')}


@functools.partial(jax.jit, static_argnames='config', donate_argnames='cache')
def _advance(params, tokens_BT, start, last, cache, key, sampling, *, config: ModelConfig):
    """Reads tokens from position `start` on; returns the token that follows number `last` of them, and the cache.

    `sampling` is (temperature, top_k, top_p), or None for the likeliest token.
    """
    positions_BT = start + jnp.arange(tokens_BT.shape[1])[None]
    x_BTD, cache = model.hidden(params, tokens_BT, config, positions_BT=positions_BT, cache=cache)
    x_BTD = jax.lax.dynamic_slice_in_dim(x_BTD, last, 1, axis=1)
    logits_V = model.logits(params, x_BTD)[0, 0]
    if sampling is None:
        return jnp.argmax(logits_V), cache
    temperature, top_k, top_p = sampling
    return jax.random.categorical(key, restrict(logits_V / temperature, top_k, top_p)), cache


def restrict(logits_V, top_k: int, top_p: float):
    """Logits with -inf for all but the `top_k` likeliest, and of these all but the likeliest that reach `top_p`."""
    sorted_V = jnp.sort(logits_V)[::-1]
    first_V = jnp.arange(sorted_V.shape[0]) < top_k
    probabilities_V = jax.nn.softmax(jnp.where(first_V, sorted_V, -jnp.inf))
    before_V = jnp.cumsum(probabilities_V) - probabilities_V  # what the likelier ones have together
    least = jnp.min(jnp.where(first_V & (before_V < top_p), sorted_V, jnp.inf))
    return jnp.where(logits_V < least, -jnp.inf, logits_V)
