"""The chunked loss, with the Triton kernels in the interpreter and in plain JAX, against whole logits."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import chunked_loss, dispatch
from tests.support import kernel_checks
from tests.support.kernel_checks import normal

pytestmark = kernel_checks.needs_triton
IMPLS = pytest.mark.parametrize('impl', ['interpret', 'xla'])


def _inputs(D=16, V=500, B=2, T=15, *, scale=1.0):
    return [normal(0, B, T, D, scale=scale), normal(1, D, V)]


def _targets(B=2, T=15, V=500):
    return jnp.asarray(np.random.default_rng(T).integers(0, V, (B, T)), jnp.int32)


def _weights(B=2, T=15):
    return jnp.asarray(np.random.default_rng(T).integers(0, 3, (B, T)), jnp.float32)


@IMPLS
@pytest.mark.parametrize(
    'options', [{}, {'weights_BT': _weights()}, {'z_loss': 1e-2}], ids=['mean', 'weights', 'z-loss']
)
@pytest.mark.parametrize('chunk', [2_048, 7], ids=['one chunk', 'five uneven chunks'])
def test_float32_equals_the_reference(monkeypatch, impl, options, chunk):
    monkeypatch.setattr(chunked_loss, 'CHUNK', chunk)
    kernel_checks.check_float32('cross_entropy', _inputs(), targets_BT=_targets(), impl=impl, **options)


@IMPLS
def test_bfloat16_is_as_near_as_xla_s(impl):
    arrays = _inputs(D=64, V=1000)
    kernel_checks.check_bfloat16('cross_entropy', arrays, targets_BT=_targets(V=1000), impl=impl)


@kernel_checks.few_examples(5)
@hypothesis.given(B=st.integers(1, 3), T=st.integers(1, 9), V=st.integers(2, 5000))
def test_any_shape(B, T, V):
    kernel_checks.check_float32('cross_entropy', _inputs(V=V, B=B, T=T), targets_BT=_targets(B, T, V))


@IMPLS
@pytest.mark.parametrize('scale', [0.0, 10.0, 30.0, 100.0, 1e3])
def test_extremes(impl, scale):
    kernel_checks.check_extreme('cross_entropy', _inputs(scale=scale), targets_BT=_targets(), impl=impl, z_loss=1e-4)


@IMPLS
def test_rows_without_weight_leave_no_trace(impl):
    (x_BTD, head_DV), weights_BT = _inputs(), jnp.zeros((2, 15)).at[0].set(1.0)
    options = {'targets_BT': _targets(), 'weights_BT': weights_BT, 'impl': impl}
    losses = [float(dispatch.cross_entropy(x, head_DV, **options)[0]) for x in (x_BTD, x_BTD.at[1].add(1.0))]
    assert losses[0] == losses[1]
    dx_BTD = jax.grad(lambda x: dispatch.cross_entropy(x, head_DV, **options)[0])(x_BTD)
    assert not dx_BTD[1].any() and dx_BTD[0].any()


def test_the_loss_is_the_sum_of_its_parts():
    loss, parts = dispatch.cross_entropy(*_inputs(), _targets(), z_loss=1e-3, impl='interpret')
    assert float(loss) == pytest.approx(float(parts['nll'] + parts['z_loss']))
    assert float(parts['z_loss']) > 0


def test_whole_logits_never_exist():
    arrays = [jax.ShapeDtypeStruct((8, 2048, 64), jnp.bfloat16), jax.ShapeDtypeStruct((64, 32_000), jnp.bfloat16)]
    targets_BT = jnp.zeros((8, 2048), jnp.int32)

    def loss(x, head):
        return dispatch.cross_entropy(x, head, targets_BT, chip='sm_90')[0]

    program = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(*arrays).lower(lowering_platforms=('cuda',)).as_text()
    assert 'tensor<2048x32000xf32>' in program
    assert '16384x32000' not in program and '8x2048x32000' not in program
