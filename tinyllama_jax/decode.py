"""The compiled programs of generation: one pass over the prompts, then one token at a time with a key-value cache.

A batch holds prompts of different lengths, padded on the right, and the cache has a fixed size. Slots 0 to P - 1 hold
the prompts and slots from P on the generated tokens, so all rows write their next key and value to the same slot. A row
attends to the slots of its own prompt and to the generated ones, so its tokens do not depend on the other rows.

Shapes: B rows, T or P positions of the padded prompts, S cache slots, C tokens of a block, N query heads,
K key-value heads, H head dim, D model, V vocabulary.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from kernels import reference
from tinyllama_jax import model
from tinyllama_jax.config import ModelConfig
from tinyllama_jax.ops import Ops

BLOCK = 32  # C
NOTHING = -1  # instead of a token, for a row that has ended


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    """The state of a batch between two calls of `advance`.

    Attributes:
      cache: for each layer {k, v}, each [B, K, S, H].
      token_B: each row's newest token; NOTHING once the row has ended.
      length_B: the number of tokens in each prompt.
      limit_B: the most tokens to generate for each row.
      key_B: one jax.random key for each row.
      prompt_slots: P.
      number: how many tokens have been generated for each row.
    """

    cache: list[dict[str, Any]]
    token_B: Any
    length_B: Any
    limit_B: Any
    key_B: Any
    prompt_slots: Any
    number: Any


@functools.partial(jax.jit, static_argnames=('config', 'dtype'))
def weights(params: dict, *, config: ModelConfig, dtype) -> dict:
    """Returns the parameters for `begin` and `advance`: a list of layers, with matrices cast to `dtype`."""
    layers = model.unstacked(params['layers'], config.num_layers)
    return jax.tree.map(lambda w: w.astype(dtype) if w.ndim > 1 else w, {**params, 'layers': layers})


@functools.partial(jax.jit, static_argnames=('slots', 'config', 'ops'))
def begin(params, tokens_BT, length_B, limit_B, key_B, sampling, *, slots: int, config: ModelConfig, ops: Ops):
    """Reads the prompts; returns a State with each row's first token, or NOTHING where the limit is 0.

    Args:
      sampling: (temperature, top_k, top_p), or None to take the likeliest token.
      slots: S, with room for the padded prompts and all generated tokens but the last.
    """

    def attend(q_BTNH, k_BTKH, v_BTKH, _):
        padding = ((0, 0), (0, 0), (0, slots - tokens_BT.shape[1]), (0, 0))
        layer_cache = {name: jnp.pad(x.swapaxes(1, 2), padding) for name, x in (('k', k_BTKH), ('v', v_BTKH))}
        return ops.attention(q_BTNH, k_BTKH, v_BTKH), layer_cache

    # Padding stands at the last token's position, so that a row's positions end with its prompt.
    positions_BT = jnp.minimum(jnp.arange(tokens_BT.shape[1])[None], length_B[:, None] - 1)
    x_BTD, cache = model.hidden(params, tokens_BT, config, ops=ops, positions_BT=positions_BT, attend=attend)
    x_B1D = jnp.take_along_axis(x_BTD, (length_B - 1)[:, None, None], axis=1)
    token_B = _next_token(params, x_B1D, key_B, 0, sampling)
    token_B = jnp.where(limit_B > 0, token_B, NOTHING)
    return State(cache, token_B, length_B, limit_B, key_B, tokens_BT.shape[1], 1)


@functools.partial(jax.jit, static_argnames=('config', 'ops'), donate_argnames='state')
def advance(params, state: State, count, ended_B, sampling, eos_E, *, config: ModelConfig, ops: Ops):
    """Generates up to `count` <= C more tokens for each row; returns the new State and the tokens [B, C].

    A row ends after one of the tokens `eos_E`, at its limit, or where `ended_B` is set; after its end its tokens are
    NOTHING. The loop stops early when all rows have ended.
    """
    state = dataclasses.replace(state, token_B=jnp.where(ended_B, NOTHING, state.token_B))

    def unfinished(carry):
        i, state, _ = carry
        return (i < count) & jnp.any(_active(state, eos_E))

    def step(carry):
        i, state, tokens_BC = carry
        state = _step(params, state, sampling, eos_E, config, ops)
        return i + 1, state, jax.lax.dynamic_update_slice(tokens_BC, state.token_B[:, None], (0, i))

    tokens_BC = jnp.full((state.token_B.shape[0], BLOCK), NOTHING)
    _, state, tokens_BC = jax.lax.while_loop(unfinished, step, (0, state, tokens_BC))
    return state, tokens_BC


def _active(state: State, eos_E):
    """Returns which rows have not ended, [B]."""
    stopped_B = (state.token_B[:, None] == eos_E[None]).any(axis=1)
    return (state.token_B != NOTHING) & ~stopped_B & (state.number < state.limit_B)


def _step(params, state: State, sampling, eos_E, config: ModelConfig, ops: Ops) -> State:
    """Feeds each row's newest token and picks the next one."""
    slot = state.prompt_slots + state.number - 1
    slots_S = jnp.arange(state.cache[0]['k'].shape[2])
    generated_S = (slots_S >= state.prompt_slots) & (slots_S <= slot)
    visible_BS = (slots_S[None] < state.length_B[:, None]) | generated_S[None]

    def attend(q_B1NH, k_B1KH, v_B1KH, cache):
        new = {'k': k_B1KH.swapaxes(1, 2), 'v': v_B1KH.swapaxes(1, 2)}
        cache = {name: jax.lax.dynamic_update_slice_in_dim(cache[name], new[name], slot, axis=2) for name in new}
        return reference.cached_attention(q_B1NH, cache['k'], cache['v'], visible_BS), cache

    active_B = _active(state, eos_E)
    positions_B1 = (state.length_B + state.number - 1)[:, None]
    tokens_B1 = jnp.maximum(state.token_B, 0)[:, None]
    x_B1D, cache = model.hidden(
        params, tokens_B1, config, ops=ops, positions_BT=positions_B1, attend=attend, cache=state.cache
    )
    token_B = _next_token(params, x_B1D, state.key_B, state.number, sampling)
    token_B = jnp.where(active_B, token_B, NOTHING)
    return dataclasses.replace(state, cache=cache, token_B=token_B, number=state.number + 1)


def _next_token(params, x_B1D, key_B, number, sampling):
    """Picks each row's token number `number`, [B], from its last hidden state."""
    logits_BV = model.logits(params, x_B1D)[:, 0]
    if sampling is None:
        return likeliest(logits_BV)

    # Keys are folded with the token's number, so that a row's draws do not depend on how tokens form blocks.
    def draw(key, logits_V):
        temperature, top_k, top_p = sampling
        return jax.random.categorical(jax.random.fold_in(key, number), restrict(logits_V / temperature, top_k, top_p))

    return jax.vmap(draw)(key_B, logits_BV).astype(jnp.int32)


def likeliest(logits_BV):
    """Returns each row's argmax (the first of equal values) by two reductions.

    On CPUs XLA's argmax takes as long as the matmul that computes the logits. A row with a NaN gets the last index.
    """
    V = logits_BV.shape[-1]
    largest_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
    indices_1V = jnp.arange(V, dtype=jnp.int32)[None]
    return jnp.min(jnp.where(logits_BV == largest_B1, indices_1V, V - 1), axis=-1)


def restrict(logits_V, top_k: int, top_p: float):
    """Sets logits to -inf except for the `top_k` largest, and among these the likeliest that together reach `top_p`."""
    sorted_V = jnp.sort(logits_V)[::-1]
    first_V = jnp.arange(sorted_V.shape[0]) < top_k
    probabilities_V = jax.nn.softmax(jnp.where(first_V, sorted_V, -jnp.inf))
    before_V = jnp.cumsum(probabilities_V) - probabilities_V  # the sum over all likelier tokens
    least = jnp.min(jnp.where(first_V & (before_V < top_p), sorted_V, jnp.inf))
    return jnp.where(logits_V < least, -jnp.inf, logits_V)
