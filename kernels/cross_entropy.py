"""The cross-entropy's row arithmetic as Triton kernels; chunked_loss.py has its chunks and matrix products.

One kernel reads a chunk's float32 logits once and writes each row's maximum and sum. The other reads
them again and writes the gradient in the activations' dtype. Between the two, chunked_loss.py reduces
the log-sum-exp over the devices that split the vocabulary.

Shapes: B batch, T time, D model, V vocabulary, C tokens of a chunk.
"""

import dataclasses

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from kernels import chunked_loss, launch
from kernels.chips import Chip


@triton.jit
def cross_entropy_sums_kernel(
    logits_ptr, targets_ptr, top_ptr, total_ptr, picked_ptr, V: tl.constexpr, BLOCK: tl.constexpr
):
    """Writes a row's maximum, sum of exp(logit - maximum), and logit at the target (0 if outside V)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    top = -1.0e30
    total = 0.0
    for first in tl.range(0, V, BLOCK):
        logits = tl.load(logits_ptr + row * V + first + columns, mask=first + columns < V, other=-1.0e30)
        new_top = tl.maximum(top, tl.max(logits, 0))
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(logits - new_top), 0)
        top = new_top
    target = tl.load(targets_ptr + row)
    picked = tl.load(logits_ptr + row * V + target, mask=(target >= 0) & (target < V), other=0.0)
    tl.store(top_ptr + row, top)
    tl.store(total_ptr + row, total)
    tl.store(picked_ptr + row, picked)


@triton.jit
def cross_entropy_gradient_kernel(
    logits_ptr, targets_ptr, top_ptr, log_ptr, growth_ptr, weight_ptr, dlogits_ptr,
    V: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes BLOCK elements of a row of growth * exp(logits - top - log), minus weight at the target."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    logits = tl.load(logits_ptr + row * V + columns, mask=columns < V, other=-1.0e30)
    dlogits = tl.load(growth_ptr + row) * tl.exp(logits - tl.load(top_ptr + row) - tl.load(log_ptr + row))
    dlogits = tl.where(columns == tl.load(targets_ptr + row), dlogits - tl.load(weight_ptr + row), dlogits)
    tl.store(dlogits_ptr + row * V + columns, dlogits.to(dlogits_ptr.dtype.element_ty), mask=columns < V)


def cross_entropy(x_BTD, head_DV, targets_BT, *, weights_BT, z_loss, vocab_axis, chip: Chip):
    """Returns (loss, its parts), as `reference.cross_entropy` does."""
    rows = _TritonLogitRows(chip)
    return chunked_loss.cross_entropy(
        x_BTD, head_DV, targets_BT, weights_BT, z_loss=z_loss, vocab_axis=vocab_axis, rows=rows
    )


@dataclasses.dataclass(frozen=True)
class _TritonLogitRows:
    chip: Chip

    def sums(self, logits_CV, targets_C):
        C, V = logits_CV.shape
        outputs = (jax.ShapeDtypeStruct((C,), jnp.float32),) * 3
        inputs, tile = (logits_CV, targets_C), self.chip.streaming['cross_entropy_sums']
        sums = launch.call(self.chip, cross_entropy_sums_kernel, inputs, outputs, grid=(C,), tile=tile, V=V)
        return *sums, logits_CV

    def gradient(self, logits_CV, own_top_C, targets_C, top_C, log_C, growth_C, weight_C, dtype):
        C, V = logits_CV.shape
        tile = self.chip.streaming['cross_entropy_gradient']
        inputs = (logits_CV, targets_C, top_C, log_C, growth_C, weight_C)
        outputs, grid = (jax.ShapeDtypeStruct((C, V), dtype),), (C, -(-V // tile.sizes['BLOCK']))
        return launch.call(self.chip, cross_entropy_gradient_kernel, inputs, outputs, grid=grid, tile=tile, V=V)[0]
