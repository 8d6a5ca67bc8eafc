"""The embedding's rows and its gradient, added by sorting and as a CPU adds, against a matrix product."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import dispatch, embedding
from tests.support.kernel_checks import normal

V, D = 11, 8
SORTING = pytest.mark.parametrize('by_sorting', [True, False])


def _tokens(B=3, T=40, low=0, high=V):
    return jnp.asarray(np.random.default_rng(0).integers(low, high, (B, T)), jnp.int32)


@functools.partial(jax.jit, static_argnums=3)  # one program; operation by operation there are dozens to compile
def _both(table_VD, tokens_BT, dx_BTD, by_sorting):
    x_BTD, vjp = jax.vjp(lambda table: embedding.embed(table, tokens_BT, by_sorting=by_sorting), table_VD)
    return x_BTD, *vjp(dx_BTD)


@SORTING
@pytest.mark.parametrize('tokens_BT', [_tokens(), _tokens(1, 1), _tokens(low=-5, high=V + 5), jnp.full((2, 9), V - 1)])
def test_rows_and_gradient_equal_those_of_a_one_hot_product(tokens_BT, by_sorting):
    table_VD, dx_BTD = normal(0, V, D), normal(1, *tokens_BT.shape, D)
    x_BTD, dtable_VD = _both(table_VD, tokens_BT, dx_BTD, by_sorting)
    one_hot_BTV = jax.nn.one_hot(tokens_BT, V)  # zeros for tokens outside the table
    np.testing.assert_array_equal(x_BTD, one_hot_BTV @ table_VD)
    np.testing.assert_allclose(dtable_VD, jnp.einsum('btv,btd->vd', one_hot_BTV, dx_BTD), atol=1e-5)


@SORTING
def test_a_bfloat16_table_gets_a_float32_sum_rounded_once(by_sorting):
    tokens_BT = jnp.zeros((1, 4_096), jnp.int32)  # 4,096 times 1/3: bfloat16 would stop at 128
    dx_BTD = jnp.full((1, 4_096, 1), 1 / 3, jnp.bfloat16)
    _, dtable_VD = _both(jnp.zeros((1, 1), jnp.bfloat16), tokens_BT, dx_BTD, by_sorting)
    assert dtable_VD[0, 0] == jnp.bfloat16(4_096 * jnp.bfloat16(1 / 3).astype(jnp.float32))


def test_on_a_gpu_no_two_rows_are_added_to_one_place():
    def gradient(table_VD, tokens_BT):
        return jax.grad(lambda table: jnp.sum(jnp.sin(dispatch.embed(table, tokens_BT, chip='sm_90'))))(table_VD)

    arguments = jax.ShapeDtypeStruct((V, D), jnp.float32), _tokens()
    program = jax.jit(gradient).trace(*arguments).lower(lowering_platforms=('cuda',)).as_text()
    scatters = [line for line in program.splitlines() if 'stablehlo.scatter' in line]
    assert scatters and all('unique_indices = true' in line for line in scatters)
