"""The SwiGLU kernels in Triton's interpreter against the reference."""

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import pytest

from tests.support import kernel_checks
from tests.support.kernel_checks import normal

pytestmark = kernel_checks.needs_triton


def _inputs(B, T, F, *, scale=1.0):
    return [normal(seed, B, T, F, scale=scale) for seed in range(2)]


@pytest.mark.parametrize(('B', 'T', 'F'), [(1, 1, 1), (2, 17, 300), (1, 8, 512)])
def test_float32_equals_the_reference(B, T, F):
    kernel_checks.check_float32('swiglu', _inputs(B, T, F))


def test_bfloat16_is_as_near_as_xla_s():
    kernel_checks.check_bfloat16('swiglu', _inputs(2, 33, 100))


@kernel_checks.few_examples(5)
@hypothesis.given(B=st.integers(1, 3), T=st.integers(1, 30), F=st.integers(1, 200))
def test_any_shape(B, T, F):
    kernel_checks.check_float32('swiglu', _inputs(B, T, F))


@pytest.mark.parametrize('scale', [0.0, 1e-6, 1e3])
def test_extremes(scale):
    kernel_checks.check_extreme('swiglu', _inputs(1, 10, 64, scale=scale))


def test_equal_rows():
    kernel_checks.check_extreme('swiglu', [jnp.full((1, 3, 8), -2.0), jnp.full((1, 3, 8), 5.0)])
