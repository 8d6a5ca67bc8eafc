"""The attention kernels, in Triton's interpreter, against the reference."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import chips, dispatch, launch
from tests.support import kernel_checks
from tests.support.kernel_checks import normal

pytestmark = kernel_checks.needs_triton


def _inputs(B, T, N, K, H, *, scale=1.0):
    return [normal(seed, B, T, heads, H, scale=scale) for seed, heads in enumerate((N, K, K))]


def _floor(arrays) -> float:
    """Returns the size of the gradients' terms, which cancel where a position sees only itself or equal keys."""
    return 0.3 * arrays[0].size ** 0.5


def _segments(B, T):
    return jnp.asarray(np.sort(np.random.default_rng(T).integers(0, 4, (B, T)), axis=1), jnp.int32)


# (T, N, K): one query, less than a tile, whole tiles, uneven ones; groups of 1, 4 and 8.
SHAPES = [(1, 4, 1), (17, 4, 4), (128, 8, 1), (150, 4, 1), (300, 2, 2)]


@pytest.mark.parametrize('segments', [False, True], ids=['', 'segments'])
@pytest.mark.parametrize(('T', 'N', 'K'), SHAPES)
def test_float32_equals_the_reference(T, N, K, segments):
    ids_BT = _segments(1, T) if segments else None
    arrays = _inputs(1, T, N, K, 64)
    kernel_checks.check_float32('attention', arrays, segment_ids_BT=ids_BT, floor=_floor(arrays))


@pytest.mark.parametrize(('T', 'N', 'K', 'H', 'segments'), [(128, 8, 1, 64, False), (150, 4, 4, 128, True)])
def test_bfloat16_is_as_near_as_xla_s(T, N, K, H, segments):
    ids_BT = _segments(1, T) if segments else None
    kernel_checks.check_bfloat16('attention', _inputs(1, T, N, K, H), segment_ids_BT=ids_BT)


@kernel_checks.few_examples(4)
@hypothesis.given(
    B=st.integers(1, 2),
    T=st.integers(1, 140),
    K=st.integers(1, 2),
    G=st.sampled_from([1, 3, 4]),
    segments=st.booleans(),
)
def test_any_shape(B, T, K, G, segments):
    ids_BT = _segments(B, T) if segments else None
    arrays = _inputs(B, T, K * G, K, 64)
    kernel_checks.check_float32('attention', arrays, segment_ids_BT=ids_BT, floor=_floor(arrays))


@pytest.mark.parametrize('segments', [False, True], ids=['', 'segments'])
@pytest.mark.parametrize('kind', ['10', '30', '100', '1000', 'queries', 'zeros', 'equal'])
def test_extremes(kind, segments):
    q, k, v = _inputs(1, 70, 2, 1, 64)
    arrays = {
        'queries': [1e4 * q, k, v],
        'zeros': [0 * q, 0 * k, 0 * v],
        'equal': [jnp.broadcast_to(x[:, :1], x.shape) for x in (q, k, v)],
    }
    # Logits of some hundreds to millions: every softmax picks one key.
    arrays = arrays[kind] if kind in arrays else [float(kind) * x for x in (q, k, v)]
    ids_BT = jnp.repeat(jnp.arange(3), jnp.array([20, 30, 20]))[None] if segments else None
    kernel_checks.check_extreme('attention', arrays, segment_ids_BT=ids_BT)


@pytest.mark.parametrize('chip', chips.CHIPS)
@pytest.mark.parametrize('H', [64, 128])
def test_the_chips_tiles_give_the_same(chip, H, monkeypatch):
    interpreted = dataclasses.replace(chips.CHIPS[chip], run=launch.interpret)
    monkeypatch.setattr(dispatch, '_chip', lambda impl, _: interpreted)
    ids_BT = _segments(1, 200)
    kernel_checks.check_bfloat16('attention', _inputs(1, 200, 2, 1, H), segment_ids_BT=ids_BT)


def test_segments_do_not_see_each_other():
    arrays = _inputs(1, 96, 2, 1, 64)
    ids_BT = (jnp.arange(96) >= 40).astype(jnp.int32)[None, :]
    changed = [x.at[:, :40].add(3.0) for x in arrays]
    before, after = (
        dispatch.attention(*inputs, segment_ids_BT=ids_BT, impl='interpret')[:, 40:] for inputs in (arrays, changed)
    )
    assert jnp.array_equal(before, after)


KERNELS = [f'attention_{name}_kernel' for name in ('forward', 'delta', 'dq', 'dkv')]


@pytest.mark.parametrize(
    ('names', 'forward_runs'), [((), 2), (('attention_out', 'attention_lse'), 1), (('attention_out',), 2)]
)
def test_under_remat_the_forward_kernel_runs_again_unless_both_its_results_are_kept(names, forward_runs):
    arrays = [x.astype(jnp.bfloat16) for x in _inputs(1, 256, 4, 1, 64)]

    def loss(q, k, v):
        # What comes before recomputes q in the backward pass, as a layer does.
        out = dispatch.attention(q * 2, k, v, impl='triton', chip='sm_90')
        return jnp.sum(jnp.sin(out.astype(jnp.float32)))

    policy = jax.checkpoint_policies.save_only_these_names(*names)
    loss_and_gradients = jax.value_and_grad(jax.checkpoint(loss, policy=policy), argnums=(0, 1, 2))
    assert kernel_checks.cuda_kernels(loss_and_gradients, *arrays) == KERNELS[:1] * forward_runs + KERNELS[1:]
