"""The axes along which arrays vary under `jax.shard_map`, and nothing of it outside."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from kernels import varying

X, Y = jnp.arange(8.0), jnp.ones(3)


@pytest.fixture(scope='module')
def mesh():
    return jax.make_mesh((2, 2), ('a', 'b'), devices=jax.devices()[:4], axis_types=(jax.sharding.AxisType.Auto,) * 2)


def test_outside_shard_map_nothing_varies():
    assert varying.axes(X, Y) == ()
    assert varying.along((), X) is X
    assert all(after is before for after, before in zip(varying.together(X, Y), (X, Y), strict=True))


def test_arrays_that_meet_vary_along_all_axes_of_any(mesh):
    seen = []

    def local(x, y):
        seen.append((varying.axes(x), varying.axes(y), varying.axes(x, y)))
        x, y = varying.together(x, y)
        seen.append((varying.axes(x), varying.axes(y)))
        assert varying.along(('a',), x) is x, 'it varies along a already'
        return jnp.sum(x)[None, None] + y[None, None, 0]

    jax.shard_map(local, mesh=mesh, in_specs=(P('a'), P('b')), out_specs=P('a', 'b'))(X, jnp.ones(2))
    assert seen == [(('a',), ('b',), ('a', 'b')), (('a', 'b'), ('a', 'b'))]


def test_the_gradient_of_a_copy_is_summed_over_the_axes_that_are_new(mesh):
    def loss(y):
        def local(x, y):
            return jax.lax.psum(jnp.sum(x) * jnp.sum(varying.along(('a',), y)), 'a')

        return jax.shard_map(local, mesh=mesh, in_specs=(P('a'), P()), out_specs=P())(X, y)

    np.testing.assert_array_equal(jax.jit(jax.grad(loss))(Y), jnp.full(3, jnp.sum(X)))
