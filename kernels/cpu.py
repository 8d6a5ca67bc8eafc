"""The ops in plain JAX that XLA compiles well for CPUs; tests compare them with `reference`.

They differ from `reference` in their gradients. Autodiff gives matrix products on transposed
operands, which take XLA two to five times as long as a plain product, and keeps what can be
recomputed.

- `linear` writes both gradients as plain 2-D products.
- `rms_norm`, `rope` and `swiglu` keep only their inputs, with row statistics or angles;
  `rope`'s gradient turns back by the same angles.
- `attention` loops over blocks of queries and reads keys only up to the block's end, so
  that most of the masked half is never computed; it keeps only row statistics.
- `cross_entropy` loops over chunks of tokens and computes the gradient with the loss
  (chunked_loss.py), so that whole logits never exist.

An optimization barrier keeps XLA from folding a small transpose into a large product, or
the statistics of a row into the passes over its elements.

Shapes: B batch, T query time, S key time, D model, N query heads, K key-value heads,
G = N / K, H head dim, V vocabulary, R = G x block rows, C tokens of a chunk.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kernels import chunked_loss, reference, varying

_MASKED = -1e30
_QUERY_BLOCK = 128
_MOST_BLOCKS = 16  # limits compile time


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def linear(x, w, gradient_dtype=None):
    """Returns x [B, T, *inputs] times w [*inputs, *outputs], in x's dtype, as `reference.linear` does."""
    return _linear_fwd(x, w, gradient_dtype)[0]


def _linear_fwd(x, w, _):
    y = _matrix(x) @ w.astype(x.dtype).reshape(math.prod(x.shape[2:]), -1)
    return y.reshape(x.shape[:2] + w.shape[x.ndim - 2 :]), (x, w)


def _linear_bwd(gradient_dtype, residuals, dy):
    x, w = residuals
    dy_matrix = _matrix(dy)
    w_matrix = w.astype(x.dtype).reshape(-1, dy_matrix.shape[1])
    dw = jnp.matmul(_matrix(x).T, dy_matrix, preferred_element_type=gradient_dtype or x.dtype)
    return (dy_matrix @ w_matrix.T).reshape(x.shape), dw.astype(w.dtype).reshape(w.shape)


linear.defvjp(_linear_fwd, _linear_bwd)


def _matrix(x):
    """Reshapes [B, T, ...] to a matrix of B x T rows."""
    return x.reshape(x.shape[0] * x.shape[1], -1)


def rms_norm(x_BTD, scale_D, *, eps, residual_BTD=None):
    """Returns the norm of x, or (the norm of x + residual, x + residual), as `reference.rms_norm` does."""
    if residual_BTD is None:
        return _rms_norm(*varying.together(x_BTD, scale_D), eps)
    sum_BTD = x_BTD + residual_BTD
    return _rms_norm(*varying.together(sum_BTD, scale_D), eps), sum_BTD


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rms_norm(x_BTD, scale_D, eps):
    return _rms_norm_fwd(x_BTD, scale_D, eps)[0]


def _rms_norm_fwd(x_BTD, scale_D, eps):
    x32_BTD = x_BTD.astype(jnp.float32)
    mean_BT1 = _row_sum(jnp.square(x32_BTD)) / x_BTD.shape[-1]
    inverse_BT1 = jax.lax.optimization_barrier(jax.lax.rsqrt(mean_BT1 + eps))
    y_BTD = x32_BTD * inverse_BT1 * scale_D.astype(jnp.float32)[None, None, :]
    return y_BTD.astype(x_BTD.dtype), (x_BTD, scale_D, inverse_BT1)


def _rms_norm_bwd(_, residuals, dy_BTD):
    x_BTD, scale_D, inverse_BT1 = residuals
    x32_BTD, dy32_BTD = x_BTD.astype(jnp.float32), dy_BTD.astype(jnp.float32)
    dscaled_BTD = dy32_BTD * scale_D.astype(jnp.float32)[None, None, :]
    mean_BT1 = _row_sum(dscaled_BTD * x32_BTD) / x_BTD.shape[-1]
    dx_BTD = inverse_BT1 * dscaled_BTD - x32_BTD * jax.lax.optimization_barrier(inverse_BT1**3 * mean_BT1)
    dscale_D = jnp.sum(dy32_BTD * x32_BTD * inverse_BT1, axis=(0, 1))
    return dx_BTD.astype(x_BTD.dtype), dscale_D.astype(scale_D.dtype)


_rms_norm.defvjp(_rms_norm_fwd, _rms_norm_bwd)


def rope(x_BTNH, positions_BT, *, base, scaling=1.0):
    """Returns x turned by rotary position embedding, half rotation, as `reference.rope` does."""
    angles = reference.rotary_angles(positions_BT, x_BTNH.shape[-1] // 2, base=base, scaling=scaling)
    return _turned(x_BTNH, *jax.lax.optimization_barrier(angles))


_turned = jax.custom_vjp(reference.turned)


def _turned_fwd(x_BTNH, cos_BT1h, sin_BT1h):
    return _turned(x_BTNH, cos_BT1h, sin_BT1h), (cos_BT1h, sin_BT1h)


def _turned_bwd(angles, dy_BTNH):
    cos_BT1h, sin_BT1h = angles
    return _turned(dy_BTNH, cos_BT1h, -sin_BT1h), None, None


_turned.defvjp(_turned_fwd, _turned_bwd)


@jax.custom_vjp
def swiglu(gate_BTF, up_BTF):
    """Returns silu(gate) * up, as `reference.swiglu` does."""
    return _swiglu_fwd(gate_BTF, up_BTF)[0]


def _swiglu_fwd(gate_BTF, up_BTF):
    return reference.swiglu(gate_BTF, up_BTF), (gate_BTF, up_BTF)


def _swiglu_bwd(residuals, dy_BTF):
    gate_BTF, up_BTF = residuals
    sigmoid_BTF = jax.nn.sigmoid(gate_BTF)
    silu_BTF = gate_BTF * sigmoid_BTF
    return dy_BTF * up_BTF * (sigmoid_BTF + silu_BTF * (1 - sigmoid_BTF)), dy_BTF * silu_BTF


swiglu.defvjp(_swiglu_fwd, _swiglu_bwd)


@jax.custom_vjp
def attention(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT=None):
    """Returns causal grouped-query attention over whole sequences (S = T), as `reference.attention` does."""
    return _attention_fwd(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT)[0]


def _attention_fwd(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT):
    q_BKGTH, kt_BKHS = _by_group(q_BTNH, k_BSKH), _transposed_heads(k_BSKH)
    v_BKSH = v_BSKH.swapaxes(1, 2)
    outs, stats = [], []
    for block in _blocks(q_BTNH.shape[1]):
        scores_BKRS = _scores(_block_matrix(q_BKGTH, block), kt_BKHS, block, segment_ids_BT)
        max_BKR1 = jax.lax.optimization_barrier(_row_max(scores_BKRS))
        weights_BKRS = jnp.exp(scores_BKRS - max_BKR1)
        sum_BKR1 = _row_sum(weights_BKRS)
        out_BKRH = _matmul(weights_BKRS.astype(v_BKSH.dtype), v_BKSH[:, :, : block.stop]) / sum_BKR1
        outs.append(_unrows(out_BKRH, block))
        stats.append(checkpoint_name(max_BKR1 + jnp.log(sum_BKR1), 'attention_lse'))
    out_BTNH = checkpoint_name(_by_time(outs).astype(q_BTNH.dtype), 'attention_out')
    return out_BTNH, (q_BTNH, k_BSKH, v_BSKH, segment_ids_BT, out_BTNH, stats)


def _attention_bwd(residuals, dout_BTNH):
    q_BTNH, k_BSKH, v_BSKH, segment_ids_BT, out_BTNH, stats = residuals
    T, dtype = q_BTNH.shape[1], q_BTNH.dtype
    q_BKGTH, dout_BKGTH = _by_group(q_BTNH, k_BSKH), _by_group(dout_BTNH, k_BSKH, scale=1.0)
    # d softmax: weights * (dweights - delta), where delta = sum_s weights dweights = sum_h out dout.
    delta_BTN1 = jnp.sum(out_BTNH.astype(jnp.float32) * dout_BTNH.astype(jnp.float32), axis=-1, keepdims=True)
    delta_BKGT1 = _by_group(delta_BTN1, k_BSKH, scale=1.0)
    k_BKSH = k_BSKH.swapaxes(1, 2)
    kt_BKHS, vt_BKHS = _transposed_heads(k_BSKH), _transposed_heads(v_BSKH)
    dqs, dkt_BKHS, dvt_BKHS = [], 0.0, 0.0
    for block, stat_BKR1 in zip(_blocks(T), stats, strict=True):
        q_BKRH, dout_BKRH = (_block_matrix(x, block) for x in (q_BKGTH, dout_BKGTH))
        weights_BKRS = jnp.exp(_scores(q_BKRH, kt_BKHS, block, segment_ids_BT) - stat_BKR1)
        dweights_BKRS = _matmul(dout_BKRH, vt_BKHS[..., : block.stop])
        dscores_BKRS = (weights_BKRS * (dweights_BKRS - _block_matrix(delta_BKGT1, block))).astype(dtype)
        dqs.append(_unrows(_matmul(dscores_BKRS, k_BKSH[:, :, : block.stop]), block))
        qt_BKHR, doutt_BKHR = jax.lax.optimization_barrier((q_BKRH.swapaxes(2, 3), dout_BKRH.swapaxes(2, 3)))
        later = ((0, 0), (0, 0), (0, 0), (0, T - block.stop))
        dkt_BKHS += jnp.pad(_matmul(qt_BKHR, dscores_BKRS), later)
        dvt_BKHS += jnp.pad(_matmul(doutt_BKHR, weights_BKRS.astype(dtype)), later)
    dq_BTNH = _by_time(dqs) * q_BTNH.shape[-1] ** -0.5
    dk_BSKH, dv_BSKH = (x.transpose(0, 3, 1, 2) for x in jax.lax.optimization_barrier((dkt_BKHS, dvt_BKHS)))
    return dq_BTNH.astype(dtype), dk_BSKH.astype(k_BSKH.dtype), dv_BSKH.astype(v_BSKH.dtype), None


attention.defvjp(_attention_fwd, _attention_bwd)


def _blocks(length: int) -> list[slice]:
    """Returns slices of `_QUERY_BLOCK` that cover `length`; larger ones if there would be more than `_MOST_BLOCKS`."""
    size = max(_QUERY_BLOCK, -(-length // _MOST_BLOCKS))
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _by_group(x_BTNH, k_BSKH, scale=None):
    """Reorders [B, T, N, H] to [B, K, G, T, H], times `scale` (1 / sqrt(H) by default)."""
    B, T, N, H = x_BTNH.shape
    K = k_BSKH.shape[2]
    scale = H**-0.5 if scale is None else scale
    return (x_BTNH * scale).reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)


def _by_time(blocks):
    """Joins blocks of [B, K, G, t, H] to one [B, T, N, H]."""
    x_BKGTH = jnp.concatenate(blocks, axis=3)
    B, K, G, T, H = x_BKGTH.shape
    return x_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, H)


def _transposed_heads(x_BSKH):
    return jax.lax.optimization_barrier(x_BSKH.transpose(0, 2, 3, 1))


def _block_matrix(x_BKGTH, block: slice):
    """Returns the block's queries of all heads of a group, as rows [B, K, R, H]."""
    B, K, _, _, H = x_BKGTH.shape
    return x_BKGTH[:, :, :, block].reshape(B, K, -1, H)


def _unrows(x_BKRH, block: slice):
    B, K, _, H = x_BKRH.shape
    return x_BKRH.reshape(B, K, -1, block.stop - block.start, H)


def _matmul(x, y):
    """Returns the float32 product of matrices, batched over two leading axes."""
    dims = (((3,), (2,)), ((0, 1), (0, 1)))
    return jax.lax.dot_general(x, y, dims, preferred_element_type=jnp.float32)


def _scores(q_BKRH, kt_BKHS, block: slice, segment_ids_BT):
    """Returns the masked float32 logits of a block's rows with all keys up to the block's end."""
    scores_BKRS = _matmul(q_BKRH, kt_BKHS[..., : block.stop])
    B, K, R, S = scores_BKRS.shape
    queries = block.stop - block.start
    mask_BKGTS = (jnp.arange(block.start, S)[:, None] >= jnp.arange(S)[None, :])[None, None, None]
    if segment_ids_BT is not None:
        same_BTS = segment_ids_BT[:, block, None] == segment_ids_BT[:, None, :S]
        mask_BKGTS = mask_BKGTS & same_BTS[:, None, None]
    scores_BKGTS = scores_BKRS.reshape(B, K, R // queries, queries, S)
    return jnp.where(mask_BKGTS, scores_BKGTS, _MASKED).reshape(scores_BKRS.shape)


def _row_max(x):
    return jnp.max(x, axis=-1, keepdims=True)


def _row_sum(x):
    return jnp.sum(x, axis=-1, keepdims=True)


def cross_entropy(x_BTD, head_DV, targets_BT, *, weights_BT=None, z_loss=0.0, vocab_axis=None):
    """Returns (loss, its parts) in nats, by chunks of tokens, as `reference.cross_entropy`; weights are constants."""
    return chunked_loss.cross_entropy(
        x_BTD, head_DV, targets_BT, weights_BT, z_loss=z_loss, vocab_axis=vocab_axis, rows=_PlainLogitRows()
    )


class _PlainLogitRows:
    """Computes exponentials once and keeps them for the gradient."""

    def sums(self, logits_CV, targets_C):
        top_C1 = jax.lax.optimization_barrier(_row_max(logits_CV))
        exp_CV = jax.lax.optimization_barrier(jnp.exp(logits_CV - top_C1))
        here_C = (targets_C >= 0) & (targets_C < logits_CV.shape[1])
        picked_C = jnp.take_along_axis(logits_CV, jnp.where(here_C, targets_C, 0)[:, None], axis=-1)[:, 0]
        return top_C1[:, 0], _row_sum(exp_CV)[:, 0], jnp.where(here_C, picked_C, 0.0), exp_CV

    def gradient(self, exp_CV, own_top_C, targets_C, top_C, log_C, growth_C, weight_C, dtype):
        hit_CV = targets_C[:, None] == jnp.arange(exp_CV.shape[1])[None, :]
        factor_C = growth_C * jnp.exp(own_top_C - top_C - log_C)
        dlogits_CV = exp_CV * factor_C[:, None] - jnp.where(hit_CV, weight_C[:, None], 0.0)
        return jax.lax.optimization_barrier(dlogits_CV.astype(dtype))
