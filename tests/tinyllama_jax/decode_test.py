"""The programs of generation: the cache that they fill, the ends of rows, the tokens that sampling keeps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from tests.support import tiny_export
from tinyllama_jax import decode
from tinyllama_jax import ops as ops_lib

CONFIG = dataclasses.replace(tiny_export.MODEL, seq_len=96)
STATIC = {'config': CONFIG, 'ops': ops_lib.make_ops(ops_lib.PLAIN)}
SLOTS = 48
PROMPTS = [[5, 17, 250, 3, 9], [30, 31]]


def _weights(dtype='float32'):
    return decode.weights(tiny_export.random_params(CONFIG, std=0.2), config=CONFIG, dtype=jnp.dtype(dtype))


def _begin(weights, prompts, limits=(20, 20)):
    tokens_BT = np.zeros((len(prompts), 32), np.int32)
    for row, ids in enumerate(prompts):
        tokens_BT[row, : len(ids)] = ids
    length_B = np.array([len(ids) for ids in prompts], np.int32)
    key_B = jax.random.split(jax.random.key(0), len(prompts))
    return decode.begin(weights, tokens_BT, length_B, np.array(limits, np.int32), key_B, None, slots=SLOTS, **STATIC)


def _advance(weights, state, count, *, ended=(False, False), eos=decode.NOTHING):
    return decode.advance(weights, state, count, np.array(ended), None, np.array([eos], np.int32), **STATIC)


def test_the_cache_equals_that_of_the_whole_sequence_read_at_once():
    weights = _weights()
    state = _begin(weights, PROMPTS)
    first_B = np.asarray(state.token_B)
    state, tokens_BC = _advance(weights, state, 6)
    assert (np.asarray(tokens_BC)[:, :6] >= 0).all() and (np.asarray(tokens_BC)[:, 6:] == decode.NOTHING).all()
    whole = [
        [*ids, int(first), *map(int, new[:6])] for ids, first, new in zip(PROMPTS, first_B, tokens_BC, strict=True)
    ]
    at_once = _begin(weights, [ids[:-1] for ids in whole])
    np.testing.assert_array_equal(at_once.token_B, tokens_BC[:, 5])
    for row, (prompt, ids) in enumerate(zip(PROMPTS, whole, strict=True)):
        slots = [*range(len(prompt)), *range(32, 32 + 6)]
        for mine, theirs in zip(jax.tree.leaves(state.cache), jax.tree.leaves(at_once.cache), strict=True):
            np.testing.assert_allclose(mine[row][:, slots], theirs[row][:, : len(ids) - 1], atol=1e-5)


def test_rows_end_at_their_limit_at_eos_or_when_told_and_the_loop_stops_with_the_last():
    weights = _weights()
    _, free_BC = _advance(weights, _begin(weights, PROMPTS), 8)
    free = np.asarray(free_BC)[0].tolist()
    _, limited_BC = _advance(weights, _begin(weights, PROMPTS, (4, 0)), 8)
    limited, never = np.asarray(limited_BC).tolist()
    nothing = [decode.NOTHING] * decode.BLOCK
    assert limited == [*free[:3], *nothing[3:]]  # the first of four came with the prompt
    assert never == nothing
    eos = free[1]
    count = free.index(eos) + 1
    state, ended_BC = _advance(weights, _begin(weights, PROMPTS), 8, ended=(False, True), eos=eos)
    assert np.asarray(ended_BC).tolist() == [[*free[:count], *nothing[count:]], nothing]
    assert int(state.number) == 1 + count, 'the loop ends with the last row'


def test_matrices_are_cast_and_norm_scales_stay_float32():
    weights = _weights('bfloat16')
    assert {leaf.dtype.name for leaf in jax.tree.leaves(weights) if leaf.ndim > 1} == {'bfloat16'}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(weights) if leaf.ndim == 1} == {'float32'}
    assert len(weights['layers']) == CONFIG.num_layers


def _kept(probabilities, *, top_k=5, top_p=2.0):
    return np.isfinite(decode.restrict(jnp.log(jnp.array(probabilities)), top_k, top_p)).tolist()


def test_top_k_and_top_p_keep_the_likeliest():
    p = [0.1, 0.4, 0.3, 0.15, 0.05]
    assert _kept(p, top_k=2) == [False, True, True, False, False]
    assert _kept(p, top_k=9) == [True] * 5
    assert _kept(p, top_p=0.65) == [False, True, True, False, False]
    assert _kept(p, top_p=0.75) == [False, True, True, True, False]
    assert _kept(p) == [True] * 5
    # top_p applies to what top_k has kept, of which the first has 0.4 / 0.7 = 0.57.
    assert _kept(p, top_k=2, top_p=0.5) == [False, True, False, False, False]


def test_likeliest_equals_argmax_and_takes_the_first_of_equal_values():
    logits_BV = np.random.default_rng(0).integers(0, 9, (64, 50)).astype(np.float32)  # many are equal
    logits_BV[0] = -np.inf
    np.testing.assert_array_equal(decode.likeliest(jnp.asarray(logits_BV)), logits_BV.argmax(axis=-1))
    assert decode.likeliest(jnp.full((1, 50), jnp.nan))[0] == 49  # still a valid token
