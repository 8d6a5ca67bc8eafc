"""The programs of generation: prompts read in one pass, then a token at a time over a key-value cache of fixed size.

A batch holds prompts of different lengths, padded on the right. All rows write their next key and value to the same
slot: the prompts' tokens lie in slots 0 to P - 1, the generated ones from P on, and a row sees the slots of its own
prompt and the generated ones. So a row's tokens do not depend on its neighbours.

Shapes: B rows, T or P positions of the padded prompts, S cache slots, C tokens that a block has room for,
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
NOTHING = -1  # in the place of a token of a row that has ended


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    """Where a batch stands.

    Attributes:
      cache: {k, v} of [B, K, S, H] for each layer.
      token_B: each row's newest token; NOTHING once the row has ended.
      length_B, limit_B: tokens of each prompt; most tokens to generate for it.
      key_B: jax.random keys, one a row.
      prompt_slots, number: P, and how many tokens each row has been given.
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
    """The parameters as `begin` and `advance` take them: layers apart, matrices in the dtype they are used in."""
    layers = model.unstacked(params['layers'], config.num_layers)
    return jax.tree.map(lambda w: w.astype(dtype) if w.ndim > 1 else w, {**params, 'layers': layers})


@functools.partial(jax.jit, static_argnames=('slots', 'config', 'ops'))
def begin(params, tokens_BT, length_B, limit_B, key_B, sampling, *, slots: int, config: ModelConfig, ops: Ops):
    """Reads the prompts; returns the State with each row's first token. A row whose limit is 0 gets none.

    `sampling` is (temperature, top_k, top_p), or None for the likeliest token.
    """

    def attend(q_BTNH, k_BTKH, v_BTKH, _):
        room = ((0, 0), (0, 0), (0, slots - tokens_BT.shape[1]), (0, 0))
        kept = {name: jnp.pad(x.swapaxes(1, 2), room) for name, x in (('k', k_BTKH), ('v', v_BTKH))}
        return ops.attention(q_BTNH, k_BTKH, v_BTKH), kept

    x_BTD, cache = model.hidden(params, tokens_BT, config, ops=ops, attend=attend)
    x_B1D = jnp.take_along_axis(x_BTD, (length_B - 1)[:, None, None], axis=1)
    token_B = _next(params, x_B1D, key_B, 0, sampling)
    token_B = jnp.where(limit_B > 0, token_B, NOTHING)
    return State(cache, token_B, length_B, limit_B, key_B, tokens_BT.shape[1], 1)


@functools.partial(jax.jit, static_argnames=('config', 'ops'), donate_argnames='state')
def advance(params, state: State, count, ended_B, sampling, eos, *, config: ModelConfig, ops: Ops):
    """Up to `count` <= C tokens more for each row: the new State, and tokens [B, C] (NOTHING where there is none).

    A row ends with the token `eos`, at its limit, or because `ended_B` says so; when all have, nothing more is done.
    """
    state = dataclasses.replace(state, token_B=jnp.where(ended_B, NOTHING, state.token_B))

    def more(carry):
        i, state, _ = carry
        return (i < count) & jnp.any(_going(state, eos))

    def step(carry):
        i, state, tokens_BC = carry
        state = _step(params, state, sampling, eos, config, ops)
        return i + 1, state, jax.lax.dynamic_update_slice(tokens_BC, state.token_B[:, None], (0, i))

    tokens_BC = jnp.full((state.token_B.shape[0], BLOCK), NOTHING)
    _, state, tokens_BC = jax.lax.while_loop(more, step, (0, state, tokens_BC))
    return state, tokens_BC


def _going(state: State, eos):
    """Which rows have not ended, [B]."""
    return (state.token_B != NOTHING) & (state.token_B != eos) & (state.number < state.limit_B)


def _step(params, state: State, sampling, eos, config: ModelConfig, ops: Ops) -> State:
    slot = state.prompt_slots + state.number - 1
    slots_S = jnp.arange(state.cache[0]['k'].shape[2])
    generated_S = (slots_S >= state.prompt_slots) & (slots_S <= slot)
    visible_BS = (slots_S[None] < state.length_B[:, None]) | generated_S[None]

    def attend(q_B1NH, k_B1KH, v_B1KH, cache):
        new = {'k': k_B1KH.swapaxes(1, 2), 'v': v_B1KH.swapaxes(1, 2)}
        cache = {name: jax.lax.dynamic_update_slice_in_dim(cache[name], new[name], slot, axis=2) for name in new}
        return reference.cached_attention(q_B1NH, cache['k'], cache['v'], visible_BS), cache

    going_B = _going(state, eos)
    positions_B1 = (state.length_B + state.number - 1)[:, None]
    tokens_B1 = jnp.maximum(state.token_B, 0)[:, None]
    x_B1D, cache = model.hidden(
        params, tokens_B1, config, ops=ops, positions_BT=positions_B1, attend=attend, cache=state.cache
    )
    token_B = _next(params, x_B1D, state.key_B, state.number, sampling)
    token_B = jnp.where(going_B, token_B, NOTHING)
    return dataclasses.replace(state, cache=cache, token_B=token_B, number=state.number + 1)


def _next(params, x_B1D, key_B, number, sampling):
    """Each row's token number `number`, [B], from its last hidden state."""
    logits_BV = model.logits(params, x_B1D)[:, 0]
    if sampling is None:
        return likeliest(logits_BV)

    def draw(key, logits_V):
        temperature, top_k, top_p = sampling
        return jax.random.categorical(jax.random.fold_in(key, number), restrict(logits_V / temperature, top_k, top_p))

    return jax.vmap(draw)(key_B, logits_BV).astype(jnp.int32)


def likeliest(logits_BV):
    """The index of each row's largest value, the first of equal ones: argmax, in two reductions.

    On CPUs XLA's argmax takes as long as the product that makes the logits. A row with a NaN gets the last index.
    """
    V = logits_BV.shape[-1]
    largest_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
    indices_1V = jnp.arange(V, dtype=jnp.int32)[None]
    return jnp.min(jnp.where(logits_BV == largest_B1, indices_1V, V - 1), axis=-1)


def restrict(logits_V, top_k: int, top_p: float):
    """Logits with -inf for all but the `top_k` likeliest, and of these all but the likeliest that reach `top_p`."""
    sorted_V = jnp.sort(logits_V)[::-1]
    first_V = jnp.arange(sorted_V.shape[0]) < top_k
    probabilities_V = jax.nn.softmax(jnp.where(first_V, sorted_V, -jnp.inf))
    before_V = jnp.cumsum(probabilities_V) - probabilities_V  # what the likelier ones have together
    least = jnp.min(jnp.where(first_V & (before_V < top_p), sorted_V, jnp.inf))
    return jnp.where(logits_V < least, -jnp.inf, logits_V)
