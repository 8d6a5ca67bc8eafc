"""The reference against float64 numpy on small arrays."""

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest

from kernels import cpu, reference


def _normal(seed: int, *shape: int):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize('length', [1, 17])
def test_attention_of_one_head_is_the_textbook_formula(length):
    q, k, v = (_normal(seed, 1, length, 1, 8).astype(np.float64) for seed in range(3))
    scores = q[0, :, 0] @ k[0, :, 0].T / np.sqrt(8)
    scores[np.triu_indices(length, 1)] = -np.inf
    got = reference.attention(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)))
    np.testing.assert_allclose(got[0, :, 0], _softmax(scores) @ v[0, :, 0], atol=1e-6)


def test_query_heads_of_a_group_read_the_same_key_value_head():
    q, k, v = _normal(0, 2, 9, 6, 4), _normal(1, 2, 9, 2, 4), _normal(2, 2, 9, 2, 4)
    got = reference.attention(q, k, v)
    want = reference.attention(q, k.repeat(3, axis=2), v.repeat(3, axis=2))
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_cached_attention_equals_attention_over_the_visible_slots():
    q, k, v = (_normal(seed, 2, 12, heads, 4) for seed, heads in enumerate((4, 2, 2)))
    slots = np.array([[0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 5, 8, 9, 10, 11]])  # a row's own, in the order of time
    visible = np.zeros((2, 12), bool)
    for row in range(2):
        visible[row, slots[row]] = True
    got = reference.cached_attention(q[:, 7:8], k.swapaxes(1, 2), v.swapaxes(1, 2), visible)
    for row in range(2):
        mine = (x[row : row + 1, slots[row]] for x in (k, v))
        want = reference.attention(np.repeat(q[row : row + 1, 7:8], 8, axis=1), *mine)[:, 7:8]
        np.testing.assert_allclose(got[row : row + 1], want, atol=1e-6)


def test_rms_norm_makes_unit_mean_square():
    x = _normal(0, 2, 3, 64)
    got = np.asarray(reference.rms_norm(x, 2 * np.ones(64, np.float32), eps=0.0))
    np.testing.assert_allclose(np.mean(got**2, axis=-1), 4.0, rtol=1e-5)


def test_rope_keeps_lengths_and_depends_on_distance_only():
    q, k = _normal(0, 1, 1, 1, 16), _normal(1, 1, 1, 1, 16)

    def product(position_q, position_k):
        turn = lambda x, p: reference.rope(jnp.asarray(x), jnp.array([[p]]), base=10_000.0)  # noqa: E731
        return float(jnp.sum(turn(q, position_q) * turn(k, position_k)))

    assert product(5, 2) == pytest.approx(product(105, 102), abs=1e-4)
    assert product(5, 2) != pytest.approx(product(5, 4), abs=1e-3)


def test_rope_scaling_divides_positions():
    x = _normal(0, 1, 4, 2, 8)
    positions = jnp.arange(4)[None]
    got = reference.rope(x, 4 * positions, base=10_000.0, scaling=4.0)
    np.testing.assert_allclose(got, reference.rope(x, positions, base=10_000.0), atol=1e-6)


def test_swiglu_is_silu_of_gate_times_up():
    gate, up = _normal(0, 1, 2, 8), _normal(1, 1, 2, 8)
    np.testing.assert_allclose(reference.swiglu(gate, up), gate / (1 + np.exp(-gate)) * up, rtol=1e-5, atol=1e-6)


def test_cross_entropy_is_the_mean_of_minus_log_softmax():
    x, head = _normal(0, 2, 5, 8).astype(np.float64), _normal(1, 8, 11).astype(np.float64)
    targets = np.random.default_rng(2).integers(0, 11, (2, 5))
    weights = np.array([[1, 0, 1, 1, 0], [0, 1, 1, 1, 1]])
    picked = np.take_along_axis(np.log(_softmax(x @ head)), targets[..., None], axis=-1)[..., 0]
    x32, head32 = jnp.asarray(x, jnp.float32), jnp.asarray(head, jnp.float32)
    assert float(reference.cross_entropy(x32, head32, targets)[0]) == pytest.approx(-picked.mean(), abs=1e-5)
    weighted, _ = reference.cross_entropy(x32, head32, targets, weights_BT=jnp.asarray(weights))
    assert float(weighted) == pytest.approx(-(picked * weights).sum() / weights.sum(), abs=1e-5)


def test_loss_is_float32_from_bfloat16_inputs():
    x, head = jnp.ones((1, 2, 4), jnp.bfloat16), jnp.ones((4, 8), jnp.bfloat16)
    loss, _ = jax.jit(reference.cross_entropy)(x, head, jnp.zeros((1, 2), jnp.int32))
    assert loss.dtype == jnp.float32 and float(loss) == pytest.approx(np.log(8), abs=1e-6)


@pytest.mark.parametrize('ops', [reference, cpu], ids=['reference', 'cpu'])
def test_bfloat16_is_rounded_once_at_the_end_of_rope(ops):
    """Angles near position 2,047 in bfloat16 would be off by up to four radians, their cosines by 1e-2 if rounded."""
    x_BTNH = jax.random.normal(jax.random.key(0), (1, 64, 2, 64), jnp.bfloat16)
    positions_BT = np.arange(1984, 2048)[None]
    angle_TK = positions_BT[0][:, None] * 10_000.0 ** (-np.arange(32) / 32)
    turned = np.asarray(x_BTNH, np.float64)[..., :32] + 1j * np.asarray(x_BTNH, np.float64)[..., 32:]
    turned = turned * np.exp(1j * angle_TK)[None, :, None]
    exact_BTNH = np.concatenate([turned.real, turned.imag], axis=-1)
    got_BTNH = np.asarray(ops.rope(x_BTNH, jnp.asarray(positions_BT), base=10_000.0), np.float64)
    np.testing.assert_allclose(got_BTNH, exact_BTNH, rtol=2**-8, atol=2e-3)  # half a unit of bfloat16, float32 angles


@pytest.mark.parametrize('ops', [reference, cpu], ids=['reference', 'cpu'])
def test_the_loss_of_bfloat16_inputs_is_exact_to_float32(ops):
    keys = jax.random.split(jax.random.key(0), 3)
    x_BTD = jax.random.normal(keys[0], (2, 9, 64), jnp.bfloat16)
    head_DV = jax.random.normal(keys[1], (64, 300), jnp.bfloat16)
    targets_BT = jax.random.randint(keys[2], (2, 9), 0, 300)
    logits_BTV = np.asarray(x_BTD, np.float64) @ np.asarray(head_DV, np.float64)
    normalised_BTV = logits_BTV - np.log(np.exp(logits_BTV).sum(-1, keepdims=True))
    exact = -np.take_along_axis(normalised_BTV, np.asarray(targets_BT)[..., None], -1).mean()
    assert float(ops.cross_entropy(x_BTD, head_DV, targets_BT)[0]) == pytest.approx(exact, rel=1e-6)


IDS_BT = jnp.asarray([[0, 0, 0, 1, 1], [0, 1, 1, 1, 2]])
WEIGHTS_BT = 1.0 + IDS_BT.astype(jnp.float32)
TARGETS_BT = jnp.asarray([[3, 0, 6, 6, 2], [1, 2, 3, 4, 5]])
GRADIENTS = {
    'attention': (lambda *qkv: reference.attention(*qkv), [(2, 5, 4, 6), (2, 5, 2, 6), (2, 5, 2, 6)]),
    'attention with segments': (
        lambda *qkv: reference.attention(*qkv, segment_ids_BT=IDS_BT), [(2, 5, 4, 6), (2, 5, 2, 6), (2, 5, 2, 6)],
    ),
    'rms_norm': (lambda x, scale: reference.rms_norm(x, scale, eps=1e-3), [(2, 5, 7), (7,)]),
    'rms_norm with residual': (
        lambda x, scale, r: reference.rms_norm(x, scale, eps=1e-3, residual_BTD=r), [(2, 5, 7), (7,), (2, 5, 7)],
    ),
    'rope': (lambda x: reference.rope(x, IDS_BT, base=10.0, scaling=2.0), [(2, 5, 3, 8)]),
    'swiglu': (reference.swiglu, [(2, 5, 9), (2, 5, 9)]),
    'cross_entropy': (
        lambda x, head: reference.cross_entropy(x, head, TARGETS_BT, weights_BT=WEIGHTS_BT, z_loss=0.1)[0],
        [(2, 5, 4), (4, 7)],
    ),
}  # fmt: skip


@pytest.mark.parametrize('case', GRADIENTS)
def test_gradients_in_float64_are_those_of_differences(case):
    function, shapes = GRADIENTS[case]
    with jax.enable_x64(True):
        arrays = [jnp.asarray(_normal(seed, *shape), jnp.float64) for seed, shape in enumerate(shapes)]
        jax.test_util.check_grads(jax.jit(function), arrays, order=1, modes=('rev',), atol=1e-7, rtol=1e-7, eps=1e-5)
