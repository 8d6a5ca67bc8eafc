"""What every implementation of an op is held to: the reference's values and gradients, to a stated error.

An op's test gives its cases; each check runs `kernels.dispatch`'s op with one `impl` and the plain
op of `kernels.reference` on the same arrays.
"""

import functools
import importlib.util
import re
import zlib

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import dispatch, reference

needs_triton = pytest.mark.skipif(
    not importlib.util.find_spec('triton'), reason='Triton is there for Linux on x86-64 and ARM only'
)
FLOAT32 = 2e-6  # relative error in norm; float32 rounds by 6e-8, and sums of hundreds of terms by some times that
_ROUNDING = 2.0**-22  # of one float32 result, such as a loss


def few_examples(count: int):
    """Returns hypothesis's settings for a slow property: the same few examples in every run, none shrunk on failure."""
    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
    return hypothesis.settings(max_examples=count, deadline=None, derandomize=True, database=None, phases=phases)


def normal(seed: int, *shape: int, scale: float = 1.0):
    """Returns normally distributed float32 numbers of this scale."""
    return jnp.asarray(scale * np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def results(function, arrays, *, seed: int = 7):
    """Returns a flat list of arrays: `function`'s values and its gradients of `arrays` under random cotangents."""
    shapes, structure = jax.tree.flatten(jax.eval_shape(function, *arrays))
    rng = np.random.default_rng(seed)
    cotangents = [jnp.asarray(rng.standard_normal(shape.shape), shape.dtype) for shape in shapes]

    @jax.jit  # one program; operation by operation there are dozens to compile
    def both(arrays, cotangents):
        out, vjp = jax.vjp(function, *arrays)
        return *jax.tree.leaves(out), *vjp(jax.tree.unflatten(structure, cotangents))

    found = map(np.asarray, both(list(arrays), cotangents))  # rounded here: inside, XLA may leave a rounding out
    return [x.astype(np.promote_types(x.dtype, np.float32)) for x in found]


def errors(found, wanted, floor: float = 1e-3) -> list[float]:
    """Returns errors relative to the norm, or to `floor` where the norm is smaller and so mostly rounding."""
    pairs = zip(found, wanted, strict=True)
    return [float(np.linalg.norm(x - y) / max(np.linalg.norm(y), floor)) for x, y in pairs]


def within(found: list[float], bound: float) -> bool:
    """Returns whether all errors are at most `bound`; nan is not (Python's `max` may skip it)."""
    return all(error <= bound for error in found)


def _functions(op: str, impl: str, options: dict):
    kernel = functools.partial(getattr(dispatch, op), impl=impl, **options)
    plain = functools.partial(getattr(reference, op), **options)
    if op == 'cross_entropy':  # its parts have no gradient
        return (lambda *arrays: kernel(*arrays)[0]), (lambda *arrays: plain(*arrays)[0])
    if op == 'rms_norm':
        return _with_residual(kernel), _with_residual(plain)
    return kernel, plain


def _with_residual(function):
    """Takes the residual, if there is one, as a third array."""
    return lambda x, scale, *rest: function(x, scale, residual_BTD=rest[0] if rest else None)


def check_float32(op: str, arrays, *, impl: str = 'interpret', floor: float = 1e-3, **options) -> None:
    """Asserts that values and gradients in float32 are within `FLOAT32` of the reference's."""
    kernel, plain = _functions(op, impl, options)
    found = errors(results(kernel, arrays), results(plain, arrays), floor)
    assert within(found, FLOAT32), found


def check_bfloat16(op: str, arrays, *, impl: str = 'interpret', **options) -> None:
    """Asserts that bfloat16 is at most twice as far from the float32 reference as XLA's own bfloat16 is."""
    kernel, plain = _functions(op, impl, options)
    rounded = [x.astype(jnp.bfloat16) for x in arrays]
    exact = results(plain, [x.astype(jnp.float32) for x in rounded])
    found, xla = (errors(results(function, rounded), exact) for function in (kernel, plain))
    assert all(ours <= 2 * theirs + 1e-6 for ours, theirs in zip(found, xla, strict=True)), (found, xla)


def check_extreme(op: str, arrays, *, impl: str = 'interpret', floor: float = 1e-3, **options) -> None:
    """Asserts finite results, at most 4 times as far from float64 as the float32 reference (or its rounding)."""
    kernel, plain = _functions(op, impl, options)
    found, in_float32 = results(kernel, arrays), results(plain, arrays)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x), jnp.float64) for x in arrays]
        _, wide_plain = _functions(op, impl, options)
        exact = results(wide_plain, wide)
    assert all(np.isfinite(x).all() for x in found)
    ours, theirs = (errors(got, exact, floor) for got in (found, in_float32))
    assert all(our <= max(4 * their, _ROUNDING) for our, their in zip(ours, theirs, strict=True)), (ours, theirs)


def cuda_kernels(function, *arrays) -> list[str]:
    """Returns the Triton kernels that a function's program for CUDA calls, by name, in the order of its text."""
    program = jax.jit(function).trace(*arrays).lower(lowering_platforms=('cuda',))
    return kernels_in(program.as_text())


def kernels_in(program: str) -> list[str]:
    """Returns the names of the Triton kernels that a lowered program calls; each call holds its kernel compressed."""
    found = []
    for text in re.findall(r'@triton_kernel_call\(.*?backend_config = "((?:[^"\\]|\\.)*)"', program):
        packed = re.sub(rb'\\([0-9A-F]{2}|.)', _unescaped, text.encode())
        found += [name.decode() for name in set(re.findall(rb'\b[a-z_]+_kernel\b', zlib.decompress(packed)))]
    return found


def _unescaped(match) -> bytes:
    escaped = match[1]
    return bytes.fromhex(escaped.decode()) if len(escaped) == 2 else escaped
