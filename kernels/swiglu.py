"""SwiGLU's silu(gate) * up (Shazeer, 2020) as Triton kernels: one pass forward, one backward, only inputs kept."""

import functools

import jax
import triton
import triton.language as tl

from kernels import launch


@triton.jit
def _load(ptr, places, SIZE: tl.constexpr):
    return tl.load(ptr + places, mask=places < SIZE, other=0.0).to(tl.float32)


@triton.jit
def swiglu_forward_kernel(gate_ptr, up_ptr, y_ptr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK elements of y."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate = _load(gate_ptr, places, SIZE)
    y = gate * tl.sigmoid(gate) * _load(up_ptr, places, SIZE)
    tl.store(y_ptr + places, y.to(y_ptr.dtype.element_ty), mask=places < SIZE)


@triton.jit
def swiglu_backward_kernel(gate_ptr, up_ptr, dy_ptr, dgate_ptr, dup_ptr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK elements of dgate and dup."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate = _load(gate_ptr, places, SIZE)
    dy = _load(dy_ptr, places, SIZE)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    dgate = dy * _load(up_ptr, places, SIZE) * (sigmoid + silu * (1 - sigmoid))
    tl.store(dgate_ptr + places, dgate.to(dgate_ptr.dtype.element_ty), mask=places < SIZE)
    tl.store(dup_ptr + places, (dy * silu).to(dup_ptr.dtype.element_ty), mask=places < SIZE)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def swiglu(gate_BTF, up_BTF, target: launch.Target):
    """silu(gate) * up on one device, as `reference.swiglu`, rounded once."""
    return _swiglu_fwd(gate_BTF, up_BTF, target)[0]


def _swiglu_fwd(gate_BTF, up_BTF, target):
    (y_BTF,) = _call('swiglu_forward', swiglu_forward_kernel, (gate_BTF, up_BTF), 1, target)
    return y_BTF, (gate_BTF, up_BTF)


def _swiglu_bwd(target, residuals, dy_BTF):
    return _call('swiglu_backward', swiglu_backward_kernel, (*residuals, dy_BTF), 2, target)


swiglu.defvjp(_swiglu_fwd, _swiglu_bwd)


def _call(op, kernel, inputs, outputs, target):
    like, size = jax.ShapeDtypeStruct(inputs[0].shape, inputs[0].dtype), inputs[0].size
    tile = target.tile(op)
    grid = (-(-size // tile.sizes['BLOCK']),)
    return target.call(kernel, inputs, (like,) * outputs, grid=grid, tile=tile, SIZE=size)
