"""The RMSNorm kernels, alone and with the residual addition, in Triton's interpreter against the reference."""

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import pytest

from tests.support import kernel_checks
from tests.support.kernel_checks import normal

pytestmark = kernel_checks.needs_triton


def _inputs(B, T, D, *, residual=False):
    return [normal(0, B, T, D), 1 + 0.1 * normal(1, D)] + ([normal(2, B, T, D)] if residual else [])


def _check(check, arrays):
    """With a third array, that is the residual, and both results' gradients count."""
    x_BTD, scale_D, *residual = arrays
    check('rms_norm', [x_BTD, scale_D, *residual], eps=1e-5)


@pytest.mark.parametrize('residual', [False, True], ids=['', 'residual'])
@pytest.mark.parametrize(('B', 'T', 'D'), [(1, 1, 64), (2, 9, 100), (1, 5, 2048)])
def test_float32_equals_the_reference(B, T, D, residual):
    _check(kernel_checks.check_float32, _inputs(B, T, D, residual=residual))


@pytest.mark.parametrize('residual', [False, True], ids=['', 'residual'])
def test_bfloat16_is_as_near_as_xla_s(residual):
    _check(kernel_checks.check_bfloat16, _inputs(2, 11, 256, residual=residual))


@kernel_checks.few_examples(5)
@hypothesis.given(B=st.integers(1, 2), T=st.integers(1, 7), D=st.integers(1, 300), residual=st.booleans())
def test_any_shape(B, T, D, residual):
    _check(kernel_checks.check_float32, _inputs(B, T, D, residual=residual))


@pytest.mark.parametrize('factor', [0.0, 1e-12, 1e15])
def test_extremes(factor):
    x_BTD, scale_D = _inputs(1, 4, 64)
    _check(kernel_checks.check_extreme, [factor * x_BTD, scale_D])


def test_rows_that_are_all_equal():
    _, scale_D = _inputs(1, 4, 64)
    _check(kernel_checks.check_extreme, [jnp.full((1, 4, 64), 3.0), scale_D])
