"""SwiGLU's silu(gate) * up (Shazeer, 2020) as Triton kernels: one pass forward, one backward; inputs are kept."""

import functools

import jax
import triton
import triton.language as tl

from kernels import launch
from kernels.chips import Chip


@triton.jit
def _load(ptr, offsets, SIZE: tl.constexpr):
    return tl.load(ptr + offsets, mask=offsets < SIZE, other=0.0).to(tl.float32)


@triton.jit
def swiglu_forward_kernel(gate_ptr, up_ptr, y_ptr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Writes BLOCK elements of y."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate = _load(gate_ptr, offsets, SIZE)
    y = gate * tl.sigmoid(gate) * _load(up_ptr, offsets, SIZE)
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=offsets < SIZE)


@triton.jit
def swiglu_backward_kernel(gate_ptr, up_ptr, dy_ptr, dgate_ptr, dup_ptr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Writes BLOCK elements of dgate and dup."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate = _load(gate_ptr, offsets, SIZE)
    dy = _load(dy_ptr, offsets, SIZE)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    dgate = dy * _load(up_ptr, offsets, SIZE) * (sigmoid + silu * (1 - sigmoid))
    tl.store(dgate_ptr + offsets, dgate.to(dgate_ptr.dtype.element_ty), mask=offsets < SIZE)
    tl.store(dup_ptr + offsets, (dy * silu).to(dup_ptr.dtype.element_ty), mask=offsets < SIZE)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def swiglu(gate_BTF, up_BTF, chip: Chip):
    """Returns silu(gate) * up on one device, as `reference.swiglu`, rounded once."""
    return _swiglu_fwd(gate_BTF, up_BTF, chip)[0]


def _swiglu_fwd(gate_BTF, up_BTF, chip):
    (y_BTF,) = _call('swiglu_forward', swiglu_forward_kernel, (gate_BTF, up_BTF), 1, chip)
    return y_BTF, (gate_BTF, up_BTF)


def _swiglu_bwd(chip, residuals, dy_BTF):
    return _call('swiglu_backward', swiglu_backward_kernel, (*residuals, dy_BTF), 2, chip)


swiglu.defvjp(_swiglu_fwd, _swiglu_bwd)


def _call(name, kernel, inputs, outputs, chip):
    like, size = jax.ShapeDtypeStruct(inputs[0].shape, inputs[0].dtype), inputs[0].size
    tile = chip.streaming[name]
    grid = (-(-size // tile.sizes['BLOCK']),)
    return launch.call(chip, kernel, inputs, (like,) * outputs, grid=grid, tile=tile, SIZE=size)
