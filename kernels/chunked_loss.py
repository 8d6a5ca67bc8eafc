"""Cross-entropy of a linear head, computed with its gradient by chunks of tokens: whole logits never exist.

A few large chunks keep the matrix products large. The gradient is computed while a chunk's logits are
in memory, so that nothing is computed twice. The arithmetic on each row of logits is passed in
(`LogitRows`): plain JAX (cpu.py) or Triton kernels (cross_entropy.py).

The log-sum-exp of a row is kept as two terms, top (the row's maximum) and log (of the sum), because
their sum would lose digits where logits are large.

The vocabulary may be split over devices (`vocab_axis`): rows' maxima and sums are then reduced over
them, and each device computes its part of the head's gradient and its share of x's.

Shapes: B batch, T time, D model, V vocabulary (of this device), n chunks, C tokens of a chunk.
"""

import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from kernels import reference, varying

CHUNK = 2_048  # tokens: float32 logits of 262 MB at a vocabulary of 32,000


class LogitRows(Protocol):
    """The arithmetic on rows of logits; objects must be hashable."""

    def sums(self, logits_CV, targets_C, /) -> tuple[Any, Any, Any, Any]:
        """Returns each row's maximum, sum of exp(logit - maximum), logit at the target (0 if outside V); residuals."""
        ...

    def gradient(self, residuals, own_top_C, targets_C, top_C, log_C, growth_C, weight_C, dtype, /) -> Any:
        """Returns growth * exp(logits - top - log), minus weight at the target, as [C, V] of `dtype`.

        `residuals` and `own_top_C` (this device's maximum) come from `sums`.
        """
        ...


def cross_entropy(x_BTD, head_DV, targets_BT, weights_BT, *, z_loss: float, vocab_axis: str | None, rows: LogitRows):
    """Returns (loss, {'nll', 'z_loss'}), as `reference.cross_entropy` does; weights are constants."""
    if weights_BT is None:
        weights_BT = jnp.ones_like(targets_BT, jnp.float32)
    weights_BT = weights_BT.astype(jnp.float32)
    x_BTD, head_DV = varying.together(x_BTD, head_DV)
    if vocab_axis:
        targets_BT = targets_BT - jax.lax.axis_index(vocab_axis) * head_DV.shape[1]
    loss, nll, z = _loss(*map(_chunks, (x_BTD, targets_BT, weights_BT)), head_DV, z_loss, vocab_axis, rows)
    return loss, {'nll': nll, 'z_loss': z}


def _chunks(x):
    """Reshapes [B, T, ...] to [n, C, ...], padded with zeros at the end."""
    tokens = x.shape[0] * x.shape[1]
    count = -(-tokens // CHUNK)
    size = -(-tokens // count)
    x = x.reshape(tokens, *x.shape[2:])
    if count * size > tokens:
        x = jnp.pad(x, ((0, count * size - tokens),) + ((0, 0),) * (x.ndim - 1))
    return x.reshape(count, size, *x.shape[1:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _loss(x_nCD, targets_nC, weights_nC, head_DV, z_loss, vocab_axis, rows):
    """Returns (loss, nll, z_loss); only the loss has a gradient."""

    def add(parts, chunk):
        added, _ = _parts(chunk, head_DV, z_loss, vocab_axis, rows)
        return jax.tree.map(jnp.add, parts, added), None

    (nll, z), _ = jax.lax.scan(add, _zeros(weights_nC), (x_nCD, targets_nC, weights_nC))
    total = _total(weights_nC)
    return (nll + z) / total, nll / total, z / total


def _loss_fwd(x_nCD, targets_nC, weights_nC, head_DV, z_loss, vocab_axis, rows):
    def add(sums, chunk):
        parts, dhead_DV = sums
        x_CD, targets_C, weights_C = chunk
        added, (residuals, own_top_C, top_C, log_C) = _parts(chunk, head_DV, z_loss, vocab_axis, rows)
        growth_C = weights_C * (1 + 2 * z_loss * (top_C + log_C))
        dlogits_CV = rows.gradient(residuals, own_top_C, targets_C, top_C, log_C, growth_C, weights_C, x_CD.dtype)
        dhead_DV += _product(x_CD.T, dlogits_CV)
        dx_CD = _product(dlogits_CV, head_DV.T) / total
        return (jax.tree.map(jnp.add, parts, added), dhead_DV), dx_CD.astype(x_CD.dtype)

    # The division comes after the products: with weights of 1, dlogits at the target is near -1, where bfloat16 is
    # precise.
    total = _total(weights_nC)
    zeros = (_zeros(weights_nC), jnp.zeros_like(head_DV, jnp.float32))
    ((nll, z), dhead_DV), dx_nCD = jax.lax.scan(add, zeros, (x_nCD, targets_nC, weights_nC))
    return ((nll + z) / total, nll / total, z / total), (dx_nCD, (dhead_DV / total).astype(head_DV.dtype))


def _loss_bwd(z_loss, vocab_axis, rows, residuals, gradients):
    dx_nCD, dhead_DV = residuals
    dloss = gradients[0]
    dx_nCD, dhead_DV = ((dloss * x.astype(dloss.dtype)).astype(x.dtype) for x in (dx_nCD, dhead_DV))
    return dx_nCD, None, None, dhead_DV


_loss.defvjp(_loss_fwd, _loss_bwd)


def _product(x, y):
    return jnp.dot(x, y, precision=reference.precision(x), preferred_element_type=jnp.float32)


def _total(weights_nC):
    return jnp.maximum(jnp.sum(weights_nC), 1e-9)


def _zeros(weights_nC):
    return (jnp.zeros_like(weights_nC, shape=()),) * 2


def _parts(chunk, head_DV, z_loss, vocab_axis, rows):
    """Returns a chunk's (negative log-likelihood, z-loss), and (residuals, own_top, top, log) for its gradient."""
    x_CD, targets_C, weights_C = chunk
    logits_CV = _product(x_CD, head_DV)
    own_top_C, total_C, picked_C, residuals = rows.sums(logits_CV, targets_C)
    top_C = own_top_C
    if vocab_axis:  # from the maxima, sums and targets' logits of each device's part to those of the whole vocabulary
        top_C = jax.lax.pmax(own_top_C, vocab_axis)
        total_C = jax.lax.psum(total_C * jnp.exp(own_top_C - top_C), vocab_axis)
        picked_C = jax.lax.psum(picked_C, vocab_axis)
    log_C = jnp.log(total_C)
    nll = jnp.sum(weights_C * (top_C - picked_C + log_C))
    z = z_loss * jnp.sum(weights_C * jnp.square(top_C + log_C))
    return (nll, z), (residuals, own_top_C, top_C, log_C)
