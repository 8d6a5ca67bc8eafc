"""The ops for CPUs against the reference: values, gradients, odd lengths, both dtypes, a mesh, remat, scan."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from kernels import cpu, reference

# Largest error, relative to the largest value. float32: sums in another order. bfloat16 has 8 bits: both forms
# round, at different places.
TOLERANCE = {'float32': 2e-6, 'bfloat16': 2e-2}
LENGTHS = [1, 17, 300]


def _normal(seed: int, *shape: int, dtype='float32'):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def _assert_close(got, want, tolerance: float, *, floor: float = 1e-9):
    """Asserts that errors, relative to the largest value or to `floor` if that is larger, are within the tolerance."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.isfinite(a).all()
        assert np.max(np.abs(a - b)) <= tolerance * max(np.max(np.abs(b)), floor)


def _value_and_grads(f, *arrays):
    """Returns the value of f and its gradients under a fixed random cotangent."""

    @jax.jit
    def run(*arrays):
        value, pull = jax.vjp(f, *arrays)
        return value, pull(_normal(99, *value.shape, dtype=value.dtype))

    return run(*arrays)


def _qkv(length: int, *, heads=(4, 2), dtype='float32'):
    N, K = heads
    return tuple(_normal(i, 2, length, n, 8, dtype=dtype) for i, n in enumerate((N, K, K)))


@pytest.mark.parametrize(('length', 'dtype'), [*((length, 'float32') for length in LENGTHS), (70, 'bfloat16')])
def test_attention(length, dtype):
    got, want = (_value_and_grads(ops.attention, *_qkv(length, dtype=dtype)) for ops in (cpu, reference))
    _assert_close(got, want, TOLERANCE[dtype], floor=1.0)  # at length 1 the gradients of q and k are exactly 0


@pytest.mark.parametrize('heads', [(2, 2), (8, 1)])
def test_attention_with_other_groups_and_segments(heads):
    segments_BT = jnp.asarray(np.random.default_rng(5).integers(0, 2, (2, 90)).cumsum(axis=1) // 20)
    assert int(segments_BT.max()) > 0
    got, want = (
        _value_and_grads(functools.partial(ops.attention, segment_ids_BT=segments_BT), *_qkv(90, heads=heads))
        for ops in (cpu, reference)
    )
    _assert_close(got, want, TOLERANCE['float32'])


def test_attention_survives_large_logits():
    q, k, v = _qkv(70)
    got, want = (_value_and_grads(ops.attention, 100 * q, 100 * k, v) for ops in (cpu, reference))
    # Logits of 1e4 are exact to 1e-3 only; the saturated softmax leaves q and k gradients of about 1e-2.
    _assert_close(got, want, 5e-3, floor=0.1)


@pytest.mark.parametrize('dtype', TOLERANCE)
def test_rms_norm_rope_and_swiglu(dtype):
    x, up = (_normal(seed, 2, 17, 24, dtype=dtype) for seed in (1, 2))
    positions_BT = jnp.stack((jnp.arange(17), jnp.arange(40, 57)))

    def values_and_grads(ops):
        norm = _value_and_grads(functools.partial(ops.rms_norm, eps=1e-5), 10 * x, _normal(3, 24))
        rope = functools.partial(ops.rope, positions_BT=positions_BT, base=10_000.0, scaling=4.0)
        return norm, _value_and_grads(rope, x.reshape(2, 17, 3, 8)), _value_and_grads(ops.swiglu, 3 * x, up)

    _assert_close(values_and_grads(cpu), values_and_grads(reference), TOLERANCE[dtype])


@pytest.mark.parametrize('dtype', TOLERANCE)
@pytest.mark.parametrize(('inputs', 'outputs'), [((6,), (4, 2)), ((4, 2), (6,))])
def test_linear(inputs, outputs, dtype):
    x, w = _normal(0, 2, 17, *inputs, dtype=dtype), _normal(1, *inputs, *outputs, dtype=dtype)
    got, want = (_value_and_grads(f, x, w) for f in (cpu.linear, lambda x, w: jnp.tensordot(x, w, axes=len(inputs))))
    _assert_close(got, want, TOLERANCE[dtype])


def _loss_arguments(length: int, dtype='float32', batch=2, vocab=50):
    x, head = _normal(0, batch, length, 8, dtype=dtype), _normal(1, 8, vocab, dtype=dtype)
    return x, head, jnp.asarray(np.random.default_rng(2).integers(0, vocab, (batch, length)))


@pytest.mark.parametrize('weighted', [False, True])
@pytest.mark.parametrize(('length', 'dtype'), [(1, 'float32'), (17, 'bfloat16'), (1_100, 'float32')])
def test_cross_entropy(length, weighted, dtype):
    x, head, targets = _loss_arguments(length, dtype)
    weights = jnp.asarray(np.random.default_rng(3).integers(0, 2, targets.shape)) if weighted else None

    def run(ops, x, head):
        return ops.cross_entropy(x, head, targets, weights_BT=weights)[0]

    for with_gradient in (lambda f: jax.value_and_grad(f, (0, 1)), lambda f: f):
        got, want = (jax.jit(with_gradient(functools.partial(run, ops)))(x, head) for ops in (cpu, reference))
        _assert_close(got, want, TOLERANCE[dtype])


def test_a_nan_reaches_the_loss():
    x, head, targets = _loss_arguments(17)
    assert np.isnan(float(jax.jit(cpu.cross_entropy)(x.at[1, 3, 2].set(jnp.nan), head, targets)[0]))
    q, k, v = _qkv(70)
    out = jax.jit(cpu.attention)(q.at[1, 3, 2, 1].set(jnp.nan), k, v)
    assert np.isnan(np.asarray(out)[1, 3, 2]).all() and np.isfinite(np.asarray(out)[0]).all()


def test_no_array_of_all_logits_is_made():
    x, head, targets = _loss_arguments(1_024, batch=16, vocab=512)
    loss = jax.jit(jax.value_and_grad(cpu.cross_entropy, (0, 1), has_aux=True))
    logits_bytes = 16 * 1_024 * 512 * 4
    assert loss.lower(x, head, targets).compile().memory_analysis().temp_size_in_bytes < logits_bytes


def _network(ops):
    """A scan over rematerialised layers of every fast op, and the loss."""

    def loss(weights, x, head, targets):
        @jax.checkpoint
        def layer(x, w):
            q = cpu.linear(x, w) if ops is cpu else jnp.tensordot(x, w, axes=1)
            return x + ops.attention(q, q[:, :, :2], q[:, :, 2:]).reshape(*x.shape[:2], -1)[..., : x.shape[2]], None

        x, _ = jax.lax.scan(layer, x, weights)
        return ops.cross_entropy(x, head, targets)[0]

    return jax.value_and_grad(loss, (0, 1, 2))


def test_under_scan_and_remat_bit_equal_twice():
    arguments = (0.1 * _normal(7, 3, 8, 4, 4), *_loss_arguments(80))
    run = jax.jit(_network(cpu))
    first, second = run(*arguments), run(*arguments)
    assert all(bool(jnp.array_equal(a, b)) for a, b in zip(*map(jax.tree.leaves, (first, second)), strict=True))
    _assert_close(first, jax.jit(_network(reference))(*arguments), 1e-5)


@pytest.mark.skipif(
    jax.device_count() < 4, reason='needs four devices: XLA_FLAGS=--xla_force_host_platform_device_count=8'
)
def test_on_a_mesh_of_batch_and_heads():
    axis_types = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 2), ('data', 'tensor'), axis_types=axis_types, devices=jax.devices()[:4])
    arguments = (0.1 * _normal(7, 3, 8, 4, 4), *_loss_arguments(80))
    specs = (P(None, None, 'tensor'), P('data'), P(None, 'tensor'), P('data'))
    sharded = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arguments, specs, strict=True)]
    _assert_close(jax.jit(_network(cpu))(*sharded), jax.jit(_network(reference))(*arguments), 1e-5)
