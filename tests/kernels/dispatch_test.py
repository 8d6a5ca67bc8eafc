"""The choice of an implementation, and what the ops refuse."""

import functools
import importlib.util
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import chips, dispatch, reference
from tests.support import kernel_checks
from tests.support.kernel_checks import normal

X, SCALE = normal(0, 1, 4, 64), jnp.ones(64)
LONG = jax.ShapeDtypeStruct((1, 1 << 22, 1, 64), jnp.float32)
Q, K = normal(0, 1, 4, 4, 64), normal(1, 1, 4, 2, 64)
POSITIONS, HEAD = jnp.arange(4)[None], normal(2, 64, 9)
FLOATS = POSITIONS.astype(jnp.float32)
CALLS = {
    'attention': lambda **how: dispatch.attention(Q, K, K, **how),
    'rms_norm': lambda **how: dispatch.rms_norm(X, SCALE, eps=1e-5, **how),
    'rope': lambda **how: dispatch.rope(Q, POSITIONS, base=1e4, **how),
    'swiglu': lambda **how: dispatch.swiglu(X, X, **how),
    'cross_entropy': lambda **how: dispatch.cross_entropy(X, HEAD, POSITIONS, **how)[0],
    'linear': lambda **how: dispatch.linear(Q, normal(3, 4, 64, 9), **how),
    'embed': lambda **how: dispatch.embed(HEAD, POSITIONS, **how),
}
KERNELS = {
    'attention': ['attention_forward_kernel'],
    'rms_norm': ['rms_norm_forward_kernel'],
    'rope': ['rope_kernel'],
    'swiglu': ['swiglu_forward_kernel'],
    'cross_entropy': ['cross_entropy_sums_kernel'],
}


def test_every_op_is_called_here():
    assert CALLS.keys() == dispatch.OPS.keys()
    assert KERNELS.keys() == {op for op, implementations in dispatch.OPS.items() if 'triton' in implementations}


@pytest.mark.parametrize('op', dispatch.OPS)
def test_the_default_is_plain_jax_on_a_cpu_and_the_kernel_on_a_gpu(op):
    assert dispatch.choose(op) == 'xla'
    assert dispatch.choose(op, chip='sm_80') == ('triton' if op in KERNELS else 'xla')
    np.testing.assert_array_equal(CALLS[op](), CALLS[op](impl='xla'))


@kernel_checks.needs_triton
@pytest.mark.parametrize('op', KERNELS)
def test_a_program_for_a_gpu_calls_the_kernel_and_one_for_a_cpu_does_not(op):
    assert kernel_checks.cuda_kernels(lambda: CALLS[op](chip='sm_90')) == KERNELS[op]
    assert kernel_checks.cuda_kernels(lambda: CALLS[op](chip='sm_90', impl='xla')) == []
    assert 'triton' not in jax.jit(CALLS[op]).lower().as_text()


@kernel_checks.needs_triton
@pytest.mark.parametrize('op', KERNELS)
def test_every_implementation_of_a_cpu_agrees(op):
    plain = CALLS[op](impl='xla')
    np.testing.assert_allclose(CALLS[op](impl='interpret'), plain, atol=2e-6)


@pytest.mark.parametrize('op', dispatch.OPS)
def test_an_implementation_that_cannot_run_is_refused(op):
    with pytest.raises(ValueError, match=f"{op}: impl='cuda' is not one of {', '.join(dispatch.OPS[op])}"):
        CALLS[op](impl='cuda')


@pytest.mark.parametrize('op', KERNELS)
def test_triton_is_refused_where_it_cannot_run(op):
    on_chips = f"{op}: impl='triton' runs on chips {', '.join(chips.CHIPS)}"
    with pytest.raises(ValueError, match=f'{on_chips}, not on a CPU'):
        CALLS[op](impl='triton')
    with pytest.raises(ValueError, match=f'{on_chips}, not on sm_75'):
        CALLS[op](chip='sm_75')


def test_cudnn_is_attention_s_alone_and_needs_a_gpu_and_bfloat16():
    with pytest.raises(ValueError, match="swiglu: impl='cudnn' is not one of"):
        CALLS['swiglu'](impl='cudnn', chip='sm_90')
    with pytest.raises(ValueError, match="attention: impl='cudnn' runs on GPUs"):
        CALLS['attention'](impl='cudnn')
    with pytest.raises(ValueError, match="attention: impl='cudnn' takes bfloat16, not float32"):
        CALLS['attention'](impl='cudnn', chip='sm_90')
    q, k = Q.astype(jnp.bfloat16), K.astype(jnp.bfloat16)
    with pytest.raises(ValueError, match="impl='cudnn' takes no segment ids"):
        dispatch.attention(q, k, k, segment_ids_BT=POSITIONS, impl='cudnn', chip='sm_90')


HEADS_OF_32, WIDE = normal(0, 1, 4, 4, 32), normal(0, 1, 1, 20_000)
BAD = {
    'head dim': (lambda: dispatch.attention(*[HEADS_OF_32] * 3, impl='interpret'), r'attention: .*\(64, 128\), not 32'),
    'rope head dim': (lambda: dispatch.rope(HEADS_OF_32, POSITIONS, base=1e4, impl='interpret'), r'rope: .*, not 32'),
    'odd head dim': (lambda: dispatch.rope(normal(0, 1, 4, 4, 5), POSITIONS, base=1e4), 'rope: head dim 5 is not even'),
    'dtype': (lambda: dispatch.swiglu(X.astype(jnp.float16), X.astype(jnp.float16), impl='interpret'), 'not float16'),
    'integers': (lambda: dispatch.swiglu(POSITIONS[..., None], POSITIONS[..., None]), 'dtype int32 is not a float'),
    'two dtypes': (lambda: dispatch.swiglu(X, X.astype(jnp.bfloat16)), 'swiglu: dtypes differ.*float32.*bfloat16'),
    'heads': (lambda: dispatch.attention(normal(0, 1, 4, 3, 64), K, K), '3 query heads are not a multiple of 2'),
    'lengths': (lambda: dispatch.attention(Q, K[:, :3], K[:, :3]), r'q \(1, 4, 4, 64\) and k \(1, 3, 2, 64\) differ'),
    'k and v': (lambda: dispatch.attention(Q, K, K[:, :, :1]), r'attention: shapes .* are not \[B, S, K, H\]'),
    'rank': (lambda: dispatch.attention(Q[0], K, K), r'attention: shapes .* are not \[B, T, N, H\]'),
    'segments': (lambda: dispatch.attention(Q, K, K, segment_ids_BT=POSITIONS[0]), r'segment ids \(4,\) are not'),
    'positions': (lambda: dispatch.rope(Q, POSITIONS[0], base=1e4), r'rope: positions \(4,\) are not \[B, T\]'),
    'scale': (lambda: dispatch.rms_norm(X, SCALE[:5], eps=1e-5), r'rms_norm: scale \(5,\) are not \[D\] = \(64,\)'),
    'residual': (lambda: dispatch.rms_norm(X, SCALE, eps=1e-5, residual_BTD=X[:, :2]), r'rms_norm: shapes .*residual'),
    'columns': (lambda: dispatch.rms_norm(WIDE, WIDE[0, 0], eps=1e-5, impl='interpret'), '16384 at most'),
    'gate and up': (lambda: dispatch.swiglu(X, X[:, :2]), r'swiglu: shapes .*\(1, 2, 64\)'),
    'nothing': (lambda: dispatch.swiglu(X[:, :0], X[:, :0]), 'swiglu: shapes .* are empty'),
    'inputs': (lambda: dispatch.linear(Q, HEAD), r'linear: x \(1, 4, 4, 64\) and w \(64, 9\) differ in their inputs'),
    'table': (lambda: dispatch.embed(HEAD[0], POSITIONS), r'embed: shapes .* are not \[V, D\]'),
    'float tokens': (lambda: dispatch.embed(HEAD, FLOATS), 'embed: tokens are float32, not integers'),
    'head': (lambda: dispatch.cross_entropy(X, HEAD[:5], POSITIONS), r'cross_entropy: x .* and head \(5, 9\) differ'),
    'targets': (lambda: dispatch.cross_entropy(X, HEAD, POSITIONS[0]), r'targets \(4,\) are not \[B, T\]'),
    'float targets': (lambda: dispatch.cross_entropy(X, HEAD, FLOATS), 'targets are float32, not integers'),
    'weights': (
        lambda: dispatch.cross_entropy(X, HEAD, POSITIONS, weights_BT=jnp.ones((4, 1))),
        r'cross_entropy: weights \(4, 1\) are not \[B, T\] = \(1, 4\)',
    ),
    'float segments': (
        lambda: dispatch.attention(Q, K, K, segment_ids_BT=FLOATS), 'segment ids are float32, not integers'
    ),
    'scale dtype': (
        lambda: dispatch.rms_norm(X, SCALE.astype(jnp.float16), eps=1e-5), 'rms_norm: scale is float16, not float32'
    ),
    'programs': (
        lambda: jax.eval_shape(functools.partial(dispatch.attention, impl='interpret'), *[LONG] * 3),
        '65536 tiles of a row; 65535 at most',
    ),
}  # fmt: skip


@pytest.mark.parametrize('call', BAD)
def test_bad_input_is_refused_with_the_op_and_the_values(call):
    function, message = BAD[call]
    with pytest.raises(ValueError, match=message):
        function()


@kernel_checks.needs_triton
@pytest.mark.parametrize('gradient', [False, True])
def test_what_is_not_a_number_fails_the_checks(monkeypatch, gradient):
    poison = float('nan')
    broken = jax.custom_vjp(lambda gate, up: reference.swiglu(gate, up) * (1.0 if gradient else poison))
    broken.defvjp(lambda gate, up: (broken(gate, up), None), lambda _, dy: (dy * poison, dy))
    monkeypatch.setattr(dispatch, 'swiglu', lambda gate, up, impl: broken(gate, up))
    for check in (kernel_checks.check_float32, kernel_checks.check_bfloat16, kernel_checks.check_extreme):
        with pytest.raises(AssertionError):
            check('swiglu', (X, X))


def test_float32_products_stay_float32_on_a_gpu():
    how = {'impl': 'xla', 'chip': 'sm_90'}
    programs = {
        'attention': jax.jit(lambda q, k: dispatch.attention(q, k, k, **how)).trace(Q, K),
        'cross_entropy': jax.jit(jax.grad(lambda x, h: dispatch.cross_entropy(x, h, POSITIONS, **how)[0])).trace(
            X, HEAD
        ),
    }
    for op, traced in programs.items():
        products = re.findall(r'dot_general.*', traced.lower(lowering_platforms=('cuda',)).as_text())
        assert products and all('[HIGHEST, HIGHEST]' in product for product in products), op


@pytest.mark.skipif(not importlib.util.find_spec('transformers'), reason='transformers is not installed')
def test_transformers_does_not_take_our_package_for_another_of_its_name():
    from transformers.utils import is_kernels_available

    assert not is_kernels_available()


def test_without_triton_a_kernel_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, 'triton', None)
    with pytest.raises(ImportError, match=r"swiglu: impl='interpret' needs triton, .*requirements-kernels.txt"):
        CALLS['swiglu'](impl='interpret')


def test_plain_jax_differs_between_cpu_and_gpu_by_rounding_only():
    for op, call in CALLS.items():
        np.testing.assert_allclose(call(impl='xla', chip='sm_90'), call(impl='xla'), atol=1e-5, err_msg=op)
    assert reference.attention(Q, K, K).shape == Q.shape
