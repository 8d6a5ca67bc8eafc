"""The patched interpreter: bfloat16 is rounded as numpy does, and the patches are undone."""

import ml_dtypes
import numpy as np
import pytest

from tests.support import kernel_checks

pytestmark = kernel_checks.needs_triton
triton = pytest.importorskip('triton', reason='Triton is there for Linux on x86-64 and ARM only')
import triton.language as tl  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from kernels import interpreter  # noqa: E402

BFLOAT16 = ml_dtypes.bfloat16


@triton.jit
def _arithmetic_kernel(x_ptr, y_ptr, sum_ptr, product_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    tl.store(sum_ptr + i, (x.to(tl.float32) + y.to(tl.float32)).to(tl.bfloat16))
    tl.store(product_ptr + i, x * y)


@triton.jit
def _dot_kernel(x_ptr, y_ptr, out_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tile = i[:, None] * SIZE + i[None, :]
    out = tl.dot(tl.load(x_ptr + tile), tl.load(y_ptr + tile), input_precision='ieee')
    tl.store(out_ptr + tile, out)


def _random(*shape):
    return np.random.default_rng(0).standard_normal((2, *shape)).astype(BFLOAT16)


def test_bfloat16_is_rounded_to_nearest_even():
    x, y = _random(256)
    total, product = np.zeros_like(x), np.zeros_like(x)
    interpreter.run(_arithmetic_kernel, (1,), x, y, total, product, SIZE=256)
    np.testing.assert_array_equal(total, (x.astype(np.float32) + y.astype(np.float32)).astype(BFLOAT16))
    np.testing.assert_array_equal(product, (x.astype(np.float32) * y.astype(np.float32)).astype(BFLOAT16))


@pytest.mark.parametrize('dtype', [BFLOAT16, np.float32])
def test_a_product_of_matrices_is_that_of_the_numbers(dtype):
    x, y = (tile.astype(dtype) for tile in _random(32, 32))
    out = np.zeros((32, 32), np.float32)
    interpreter.run(_dot_kernel, (1,), x, y, out, SIZE=32)
    exact = (x.astype(np.float64) @ y.astype(np.float64)).astype(np.float32)
    np.testing.assert_array_equal(out, exact)


def test_the_process_is_left_as_it_was():
    before = dict(vars(tl)), dict(vars(tl.tensor)), JITFunction.__call__, dict(vars(tl.core))
    x, y = _random(16)
    interpreter.run(_arithmetic_kernel, (1,), x, y, np.zeros_like(x), np.zeros_like(x), SIZE=16)
    after = dict(vars(tl)), dict(vars(tl.tensor)), JITFunction.__call__, dict(vars(tl.core))
    assert all(
        before[i].items() <= after[i].items() if i in (0, 3) else before[i] == after[i] for i in range(len(before))
    )


def test_an_unknown_dtype_is_an_error():
    with pytest.raises(KeyError, match='float64'):
        interpreter.run(_arithmetic_kernel, (1,), *[np.zeros(16)] * 4, SIZE=16)
