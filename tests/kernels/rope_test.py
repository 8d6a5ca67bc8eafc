"""The rotary kernel in Triton's interpreter against the reference."""

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import dispatch
from tests.support import kernel_checks
from tests.support.kernel_checks import normal

pytestmark = kernel_checks.needs_triton


def _positions(B, T):
    return jnp.asarray(np.random.default_rng(T).integers(0, 2048, (B, T)), jnp.int32)


@pytest.mark.parametrize(('T', 'N', 'H', 'scaling'), [(1, 4, 64, 1.0), (17, 3, 128, 4.0), (128, 1, 64, 1.0)])
def test_float32_equals_the_reference(T, N, H, scaling):
    options = {'positions_BT': _positions(2, T), 'base': 10_000.0, 'scaling': scaling}
    kernel_checks.check_float32('rope', [normal(0, 2, T, N, H)], **options)


def test_bfloat16_is_as_near_as_xla_s():
    kernel_checks.check_bfloat16('rope', [normal(0, 1, 30, 8, 64)], positions_BT=_positions(1, 30), base=10_000.0)


@kernel_checks.few_examples(5)
@hypothesis.given(B=st.integers(1, 3), T=st.integers(1, 20), N=st.integers(1, 9))
def test_any_shape(B, T, N):
    kernel_checks.check_float32('rope', [normal(0, B, T, N, 64)], positions_BT=_positions(B, T), base=500.0)


@pytest.mark.parametrize('scale', [0.0, 1e15])
def test_extremes(scale):
    # Angles in float32 are the reference's own error here, at positions up to 20.
    positions_BT = jnp.arange(20)[None]
    kernel_checks.check_extreme('rope', [normal(0, 1, 20, 2, 64, scale=scale)], positions_BT=positions_BT, base=1e4)


def test_the_gradient_is_the_turn_back():
    x, positions_BT = normal(0, 1, 9, 2, 64), _positions(1, 9)

    def turn(x, positions):
        return dispatch.rope(x, positions, base=1e4, impl='interpret')

    (back,) = kernel_checks.results(lambda x: turn(x, positions_BT), [x])[1:]
    cotangent = np.random.default_rng(7).standard_normal(x.shape).astype(np.float32)
    np.testing.assert_allclose(back, turn(jnp.asarray(cotangent), -positions_BT), atol=1e-6)
