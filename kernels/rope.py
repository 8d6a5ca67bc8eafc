"""Rotary position embedding, half rotation (Su et al., 2021), as a Triton kernel; its gradient turns back.

XLA computes the angles' cosines and sines [B, T, h] in float32 (`reference.rotary_angles`), which at 32
heads are a sixteenth of what the kernel reads.

Shapes: B batch, T time, N heads, H head dim, h = H / 2.
"""

import functools

import jax
import triton
import triton.language as tl

from kernels import launch, reference
from kernels.chips import Chip


@triton.jit
def rope_kernel(
    x_ptr, cos_ptr, sin_ptr, y_ptr,
    ROWS: tl.constexpr, N: tl.constexpr, HALF: tl.constexpr, SIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes BLOCK of the rows [B x T x N, H] of y: x turned by SIGN times the angles of its position."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.arange(0, HALF)[None, :]
    inside = rows[:, None] < ROWS
    angles = (rows // N)[:, None] * HALF + columns
    cos = tl.load(cos_ptr + angles, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + angles, mask=inside, other=0.0) * SIGN
    offsets = rows.to(tl.int64)[:, None] * (2 * HALF) + columns
    a = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + offsets + HALF, mask=inside, other=0.0).to(tl.float32)
    dtype = y_ptr.dtype.element_ty
    tl.store(y_ptr + offsets, (a * cos - b * sin).to(dtype), mask=inside)
    tl.store(y_ptr + offsets + HALF, (b * cos + a * sin).to(dtype), mask=inside)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def rope(x_BTNH, positions_BT, base, scaling, chip: Chip):
    """Turns queries or keys [B, T, N, H] on one device, as `reference.rope`; the gradient recomputes the angles."""
    return _turn(x_BTNH, positions_BT, base, scaling, chip, sign=1)


def _rope_fwd(x_BTNH, positions_BT, base, scaling, chip):
    return _turn(x_BTNH, positions_BT, base, scaling, chip, sign=1), positions_BT


def _rope_bwd(base, scaling, chip, positions_BT, dy_BTNH):
    return _turn(dy_BTNH, positions_BT, base, scaling, chip, sign=-1), None


rope.defvjp(_rope_fwd, _rope_bwd)


def _turn(x_BTNH, positions_BT, base, scaling, chip, *, sign):
    B, T, N, H = x_BTNH.shape
    angles = reference.rotary_angles(positions_BT, H // 2, base=base, scaling=scaling)
    cos_BTh, sin_BTh = (angle_BT1h[:, :, 0] for angle_BT1h in angles)
    tile, rows = chip.streaming['rope'], B * T * N
    like = jax.ShapeDtypeStruct(x_BTNH.shape, x_BTNH.dtype)
    sizes = {'ROWS': rows, 'N': N, 'HALF': H // 2, 'SIGN': sign}
    grid = (-(-rows // tile.sizes['BLOCK']),)
    return launch.call(chip, rope_kernel, (x_BTNH, cos_BTh, sin_BTh), (like,), grid=grid, tile=tile, **sizes)[0]
