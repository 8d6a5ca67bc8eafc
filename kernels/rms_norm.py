"""Root-mean-square norm (Zhang and Sennrich, 2019) as Triton kernels, alone or with the residual addition before it.

A program holds a row in registers, so that forward and backward read and write each element
once. Each program of the backward kernel loops over many rows and writes one partial sum of the
scale's gradient. The partial sums are then added up: nothing is added atomically.

Shapes: B batch, T time, D model; rows are B x T, P programs of the backward kernel.
"""

import functools

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from kernels import launch, varying
from kernels.chips import Chip


@triton.jit
def _load_row(ptr, row, D: tl.constexpr, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    return tl.load(ptr + row * D + columns, mask=columns < D, other=0.0).to(tl.float32)


@triton.jit
def _store_row(ptr, row, values, D: tl.constexpr, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    tl.store(ptr + row * D + columns, values.to(ptr.dtype.element_ty), mask=columns < D)


@triton.jit
def _norm_row(x, row, scale_ptr, y_ptr, inverse_ptr, D: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr):
    inverse = tl.rsqrt(tl.sum(x * x, 0) / D + EPS)
    _store_row(y_ptr, row, x * inverse * _load_row(scale_ptr, 0, D, BLOCK), D, BLOCK)
    tl.store(inverse_ptr + row, inverse)


@triton.jit
def rms_norm_forward_kernel(
    x_ptr, scale_ptr, y_ptr, inverse_ptr, D: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr
):
    """Writes a row of y = x * inverse * scale and its inverse = 1 / sqrt(mean(x^2) + EPS)."""
    row = tl.program_id(0).to(tl.int64)
    _norm_row(_load_row(x_ptr, row, D, BLOCK), row, scale_ptr, y_ptr, inverse_ptr, D, EPS, BLOCK)


@triton.jit
def rms_norm_add_forward_kernel(
    x_ptr, residual_ptr, scale_ptr, sum_ptr, y_ptr, inverse_ptr,
    D: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes a row of sum = x + residual and the norm of the rounded sum, as `rms_norm_forward_kernel` does."""
    row = tl.program_id(0).to(tl.int64)
    added = _load_row(x_ptr, row, D, BLOCK) + _load_row(residual_ptr, row, D, BLOCK)
    added = added.to(sum_ptr.dtype.element_ty)
    _store_row(sum_ptr, row, added, D, BLOCK)
    _norm_row(added.to(tl.float32), row, scale_ptr, y_ptr, inverse_ptr, D, EPS, BLOCK)


@triton.jit
def rms_norm_backward_kernel(
    x_ptr, scale_ptr, inverse_ptr, dy_ptr, dsum_ptr, dx_ptr, dscale_ptr,
    ROWS: tl.constexpr, D: tl.constexpr, ADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes rows p, p + P, ... of dx, with dsum added if ADDED, and their part of dscale [P, D]."""
    scale = _load_row(scale_ptr, 0, D, BLOCK)
    dscale = tl.zeros([BLOCK], tl.float32)
    for row in tl.range(tl.program_id(0).to(tl.int64), ROWS, tl.num_programs(0)):
        x = _load_row(x_ptr, row, D, BLOCK)
        dy = _load_row(dy_ptr, row, D, BLOCK)
        inverse = tl.load(inverse_ptr + row)
        dscaled = dy * scale
        dx = inverse * (dscaled - x * (inverse * inverse * tl.sum(dscaled * x, 0) / D))
        if ADDED:
            dx += _load_row(dsum_ptr, row, D, BLOCK)
        _store_row(dx_ptr, row, dx, D, BLOCK)
        dscale += dy * x * inverse
    _store_row(dscale_ptr, tl.program_id(0), dscale, D, BLOCK)


def rms_norm(x_BTD, scale_D, residual_BTD, eps, chip: Chip):
    """Returns the normed [B, T, D] on one device, as `reference.rms_norm`; with a residual (normed, x + residual)."""
    x_BTD, scale_D = varying.together(x_BTD, scale_D)
    return _norm(x_BTD, scale_D, residual_BTD, eps, chip)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _norm(x_BTD, scale_D, residual_BTD, eps, chip):
    return _norm_fwd(x_BTD, scale_D, residual_BTD, eps, chip)[0]


def _norm_fwd(x_BTD, scale_D, residual_BTD, eps, chip):
    B, T, D = x_BTD.shape
    if residual_BTD is None:
        kernel, inputs = rms_norm_forward_kernel, (x_BTD,)
    else:
        kernel, inputs = rms_norm_add_forward_kernel, (x_BTD, residual_BTD)
    like = jax.ShapeDtypeStruct(x_BTD.shape, x_BTD.dtype)
    outputs = (like,) * len(inputs) + (jax.ShapeDtypeStruct((B, T), jnp.float32),)
    tile, block = chip.streaming['rms_norm_forward'], triton.next_power_of_2(D)
    *sums, y_BTD, inverse_BT = launch.call(
        chip, kernel, (*inputs, scale_D), outputs, grid=(B * T,), tile=tile, D=D, EPS=eps, BLOCK=block
    )
    if residual_BTD is None:
        return y_BTD, (x_BTD, scale_D, inverse_BT)
    return (y_BTD, *sums), (*sums, scale_D, inverse_BT)


def _norm_bwd(_, chip, residuals, gradients):
    x_BTD, scale_D, inverse_BT = residuals  # with a residual x is the sum, which has a gradient, too
    dy_BTD, dsum_BTD = gradients if isinstance(gradients, tuple) else (gradients, None)
    B, T, D = x_BTD.shape
    tile = chip.streaming['rms_norm_backward']
    programs = min(B * T, tile.programs * chip.multiprocessors)
    dx_BTD, dscale_PD = launch.call(
        chip,
        rms_norm_backward_kernel,
        (x_BTD, scale_D, inverse_BT, dy_BTD, dy_BTD if dsum_BTD is None else dsum_BTD),  # any array unless ADDED
        (jax.ShapeDtypeStruct(x_BTD.shape, x_BTD.dtype), jax.ShapeDtypeStruct((programs, D), jnp.float32)),
        grid=(programs,),
        tile=tile,
        ROWS=B * T,
        D=D,
        ADDED=dsum_BTD is not None,
        BLOCK=triton.next_power_of_2(D),
    )
    dscale_D = jnp.sum(dscale_PD, axis=0).astype(scale_D.dtype)
    return dx_BTD, dscale_D, None if dsum_BTD is None else dx_BTD


_norm.defvjp(_norm_fwd, _norm_bwd)
