"""What the checks let pass and what they refuse; dispatch_test.py goes through them op by op."""

import re

import jax
import jax.numpy as jnp
import pytest

from kernels import checks


def _array(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype)


def test_floats_return_their_dtype_and_may_be_left_out():
    x = _array(jnp.bfloat16, 1, 2, 3)
    assert checks.require_floats('op', 'BTD', x=x, residual=None) == 'bfloat16'
    assert checks.require_floats('op', 'BTD', x=x, residual=x) == 'bfloat16'


@pytest.mark.parametrize(
    ('arrays', 'message'),
    [
        ({'x': _array(jnp.float32, 1, 2), 'y': _array(jnp.bfloat16, 1, 2)}, "op: dtypes differ: {'x': 'float32', 'y'"),
        ({'x': _array(jnp.int8, 1, 2)}, 'op: dtype int8 is not a float'),
        ({'x': _array(jnp.float32, 1, 2), 'y': _array(jnp.float32, 2, 2)}, '(2, 2)} are not [B, T]'),
        ({'x': _array(jnp.float32, 1)}, "op: shapes {'x': (1,)} are not [B, T]"),
        ({'x': _array(jnp.float32, 0, 2)}, "op: shapes {'x': (0, 2)} are empty"),
    ],
)
def test_floats_that_do_not_go_together_are_refused(arrays, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        checks.require_floats('op', 'BT', **arrays)


@pytest.mark.parametrize('dtype', [jnp.uint16, jnp.int32, jnp.bool_])
def test_integers_and_booleans_pass(dtype):
    checks.require_integers('op', 'ids', _array(dtype, 2, 3), (2, 3), 'BT')
    with pytest.raises(ValueError, match=r'op: ids \(2, 3\) are not \[B, T\] = \(3, 2\)'):
        checks.require_integers('op', 'ids', _array(dtype, 2, 3), (3, 2), 'BT')


def test_heads_have_to_be_a_multiple_and_shapes_to_agree():
    checks.require_heads('op', _array(jnp.float32, 1, 5, 8, 64), _array(jnp.float32, 1, 5, 2, 64))
    with pytest.raises(ValueError, match='op: 8 query heads are not a multiple of 3 key-value heads'):
        checks.require_heads('op', _array(jnp.float32, 1, 5, 8, 64), _array(jnp.float32, 1, 5, 3, 64))
    with pytest.raises(ValueError, match='differ in B, T or H'):
        checks.require_heads('op', _array(jnp.float32, 1, 5, 8, 64), _array(jnp.float32, 1, 5, 2, 32))


@pytest.mark.parametrize(
    ('op', 'impl', 'dtype', 'sizes', 'message'),
    [
        ('swiglu', 'triton', 'float16', {}, 'takes float32 and bfloat16, not float16'),
        ('attention', 'cudnn', 'float32', {}, 'takes bfloat16, not float32'),
        ('attention', 'cudnn', 'bfloat16', {'segment_ids': True}, 'takes no segment ids'),
        ('rope', 'triton', 'float32', {'head_dim': 96}, r'takes head dims \(64, 128\), not 96'),
        ('rope', 'xla', 'float32', {'head_dim': 7}, 'head dim 7 is not even'),
        ('rms_norm', 'triton', 'float32', {'columns': 16_385}, 'rows of 16385 do not fit a program; 16384 at most'),
    ],
)
def test_an_implementation_says_what_it_does_not_take(op, impl, dtype, sizes, message):
    with pytest.raises(ValueError, match=f'{op}: .*{message}'):
        checks.require_implementation(op, impl, dtype, **sizes)


@pytest.mark.parametrize(
    ('op', 'impl', 'dtype', 'sizes'),
    [
        ('swiglu', 'xla', 'float16', {}),
        ('swiglu', 'triton', 'bfloat16', {'head_dim': 7, 'columns': 1 << 20, 'segment_ids': True}),
        ('attention', 'xla', 'float64', {'head_dim': 8, 'segment_ids': True}),
        ('rms_norm', 'triton', 'float32', {'columns': 16_384}),
    ],
)
def test_an_op_ignores_what_it_does_not_have(op, impl, dtype, sizes):
    checks.require_implementation(op, impl, dtype, **sizes)
