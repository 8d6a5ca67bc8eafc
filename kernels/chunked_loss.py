"""Cross-entropy of a linear head by chunks of tokens, the gradient made with the loss: whole logits never exist.

A few large chunks keep the matrix products large; as the gradient is made while a chunk's logits
are there, nothing is computed twice. What is done to the logits row by row is passed in (`Rows`):
plain JAX (cpu.py) or Triton kernels (cross_entropy.py).

The log-sum-exp of a row is kept as its two terms, top (the row's maximum) and log (of the sum): added up
they would lose digits where logits are large.

The vocabulary may be split over devices (`vocab_axis`): rows' maxima and sums are then taken over
all of them, and each makes its part of the head's gradient and its share of x's.

Shapes: B batch, T time, D model, V vocabulary (of this device), n chunks, C tokens of a chunk.
"""

import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from kernels import reference, varying

CHUNK = 2_048  # tokens: float32 logits of 262 MB at 32,000 pieces


class Rows(Protocol):
    """What a loss needs of the logits' rows; an implementation is hashable."""

    def sums(self, logits_CV, targets_C) -> tuple[Any, Any, Any, Any]:
        """Each row's maximum, sum of exp(logit - maximum), logit at the target (0 if outside V); what to keep."""
        ...

    def gradient(self, kept, own_top_C, targets_C, top_C, log_C, growth_C, weight_C, dtype) -> Any:
        """growth * exp(logits - top - log), less weight at the target, as [C, V] of `dtype`; own_top: of `sums`."""
        ...


def cross_entropy(x_BTD, head_DV, targets_BT, weights_BT, *, z_loss: float, vocab_axis: str | None, rows: Rows):
    """As `reference.cross_entropy`; weights are taken as constants."""
    if weights_BT is None:
        weights_BT = jnp.ones_like(targets_BT, jnp.float32)
    weights_BT = weights_BT.astype(jnp.float32)
    x_BTD, head_DV = varying.together(x_BTD, head_DV)
    if vocab_axis:
        targets_BT = targets_BT - jax.lax.axis_index(vocab_axis) * head_DV.shape[1]
    loss, nll, z = _loss(*map(_chunks, (x_BTD, targets_BT, weights_BT)), head_DV, z_loss, vocab_axis, rows)
    return loss, {'nll': nll, 'z_loss': z}


def _chunks(x):
    """[B, T, ...] as [n, C, ...], the end padded with zeros."""
    tokens = x.shape[0] * x.shape[1]
    count = -(-tokens // CHUNK)
    size = -(-tokens // count)
    x = x.reshape(tokens, *x.shape[2:])
    if count * size > tokens:
        x = jnp.pad(x, ((0, count * size - tokens),) + ((0, 0),) * (x.ndim - 1))
    return x.reshape(count, size, *x.shape[1:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _loss(x_nCD, targets_nC, weights_nC, head_DV, z_loss, vocab_axis, rows):
    """The loss and its two parts, of which only the loss has a gradient."""

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
        added, (kept, own_top_C, top_C, log_C) = _parts(chunk, head_DV, z_loss, vocab_axis, rows)
        growth_C = weights_C * (1 + 2 * z_loss * (top_C + log_C))
        dlogits_CV = rows.gradient(kept, own_top_C, targets_C, top_C, log_C, growth_C, weights_C, x_CD.dtype)
        dhead_DV += _product(x_CD.T, dlogits_CV)
        dx_CD = _product(dlogits_CV, head_DV.T) / total
        return (jax.tree.map(jnp.add, parts, added), dhead_DV), dx_CD.astype(x_CD.dtype)

    # Divided by after the products: weights of 1 leave the target's part of dlogits near -1, where bfloat16 is good.
    total = _total(weights_nC)
    zeros = (_zeros(weights_nC), jnp.zeros_like(head_DV, jnp.float32))
    ((nll, z), dhead_DV), dx_nCD = jax.lax.scan(add, zeros, (x_nCD, targets_nC, weights_nC))
    return ((nll + z) / total, nll / total, z / total), (dx_nCD, (dhead_DV / total).astype(head_DV.dtype))


def _loss_bwd(z_loss, vocab_axis, rows, residuals, gradients):
    dx_nCD, dhead_DV = residuals
    dloss = gradients[0]
    return (dloss * dx_nCD).astype(dx_nCD.dtype), None, None, (dloss * dhead_DV).astype(dhead_DV.dtype)


_loss.defvjp(_loss_fwd, _loss_bwd)


def _product(x, y):
    return jnp.dot(x, y, precision=reference.precision(x), preferred_element_type=jnp.float32)


def _total(weights_nC):
    return jnp.maximum(jnp.sum(weights_nC), 1e-9)


def _zeros(weights_nC):
    return (jnp.zeros_like(weights_nC, shape=()),) * 2


def _parts(chunk, head_DV, z_loss, vocab_axis, rows):
    """A chunk's (negative log-likelihood, z-loss), and what the rows' gradient takes: kept, own_top, top, log."""
    x_CD, targets_C, weights_C = chunk
    logits_CV = _product(x_CD, head_DV)
    own_top_C, total_C, picked_C, kept = rows.sums(logits_CV, targets_C)
    top_C, log_C, picked_C = _over_the_vocabulary(own_top_C, total_C, picked_C, vocab_axis)
    nll = jnp.sum(weights_C * (top_C - picked_C + log_C))
    z = z_loss * jnp.sum(weights_C * jnp.square(top_C + log_C))
    return (nll, z), (kept, own_top_C, top_C, log_C)


def _over_the_vocabulary(own_top_C, total_C, picked_C, vocab_axis):
    """(top, log, target's logit) of the whole vocabulary from those of each device's part."""
    if not vocab_axis:
        return own_top_C, jnp.log(total_C), picked_C
    top_C = jax.lax.pmax(own_top_C, vocab_axis)
    total_C = jax.lax.psum(total_C * jnp.exp(own_top_C - top_C), vocab_axis)
    return top_C, jnp.log(total_C), jax.lax.psum(picked_C, vocab_axis)
