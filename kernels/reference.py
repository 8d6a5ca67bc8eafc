"""Each op stated once in plain JAX; tests compare every faster implementation with it.

Shapes: B batch, T query time, S key time, D model, N query heads, K key-value
heads, G = N / K, H head dim, F feed-forward, V vocabulary.
Softmax, norms, rotary angles and the loss are computed in float32 (float64 inputs: in
float64); results return in the inputs' dtype.
"""

import functools

import jax
import jax.numpy as jnp

from kernels import rope_scaling
from kernels.rope_scaling import RopeScaling

_MASKED = -1e30  # finite, so that a fully masked row stays finite


def _wide(dtype):
    """Returns the dtype to compute in: float32, or float64 for float64 inputs."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def attention(q_BTNH, k_BSKH, v_BSKH, *, segment_ids_BT=None):
    """Returns causal grouped-query attention, scaled by 1 / sqrt(H): [B, T, N, H].

    Query head n reads key-value head n // G. With `segment_ids_BT`, a position
    attends only to earlier positions of its own segment.
    """
    positions_T = jnp.arange(q_BTNH.shape[1])
    mask_BTS = (positions_T[:, None] >= positions_T[None, :])[None]
    if segment_ids_BT is not None:
        mask_BTS = mask_BTS & (segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :])
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    logits_BKGTS = jnp.einsum(
        'btkgh,bskh->bkgts', q_BTKGH, k_BSKH, precision=precision(k_BSKH), preferred_element_type=_wide(q_BTNH.dtype)
    )
    logits_BKGTS = jnp.where(mask_BTS[:, None, None], logits_BKGTS * H**-0.5, _MASKED)
    weights_BKGTS = jax.nn.softmax(logits_BKGTS, axis=-1).astype(v_BSKH.dtype)
    out_BTKGH = jnp.einsum('bkgts,bskh->btkgh', weights_BKGTS, v_BSKH, precision=precision(v_BSKH))
    return out_BTKGH.reshape(B, T, N, H)


def cached_attention(q_B1NH, k_BKSH, v_BKSH, visible_BS):
    """Attends with one query per row to the visible slots of a key-value cache; returns [B, 1, N, H].

    The cache has heads before slots, [B, K, S, H].
    """
    B, _, N, H = q_B1NH.shape
    K = k_BKSH.shape[1]
    product = functools.partial(jnp.einsum, precision=precision(k_BKSH), preferred_element_type=_wide(q_B1NH.dtype))
    logits_BKGS = product('bkgh,bksh->bkgs', q_B1NH.reshape(B, K, N // K, H) * H**-0.5, k_BKSH)
    logits_BKGS = jnp.where(visible_BS[:, None, None], logits_BKGS, _MASKED)
    weights_BKGS = jnp.exp(logits_BKGS - jnp.max(logits_BKGS, axis=-1, keepdims=True))
    out_BKGH = product('bkgs,bksh->bkgh', weights_BKGS.astype(v_BKSH.dtype), v_BKSH)
    out_BKGH = out_BKGH / jnp.sum(weights_BKGS, axis=-1, keepdims=True)
    return out_BKGH.astype(q_B1NH.dtype).reshape(B, 1, N, H)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def linear(x, w, gradient_dtype=None):
    """Returns x [B, T, *inputs] times w [*inputs, *outputs]: [B, T, *outputs] in x's dtype; w is rounded to it.

    w's gradient leaves its matrix product, and is reduced between devices, in `gradient_dtype` (x's dtype by default).
    """
    return _linear_fwd(x, w, gradient_dtype)[0]


def _linear_fwd(x, w, _):
    return jnp.tensordot(x, w.astype(x.dtype), axes=x.ndim - 2, precision=precision(x)), (x, w)


def _linear_bwd(gradient_dtype, residuals, dy):
    x, w = residuals
    inputs, outputs = x.ndim - 2, dy.ndim - 2
    back = (tuple(range(2, 2 + outputs)), tuple(range(inputs, inputs + outputs)))
    dx = jnp.tensordot(dy, w.astype(x.dtype), axes=back, precision=precision(x))
    dtype = gradient_dtype or x.dtype
    dw = jnp.tensordot(x, dy, axes=((0, 1), (0, 1)), precision=precision(x), preferred_element_type=dtype)
    return dx, dw.astype(w.dtype)


linear.defvjp(_linear_fwd, _linear_bwd)


def precision(x):
    """Returns the precision to ask for in products of x: true float32 for float32 (GPUs default to TF32)."""
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


def rms_norm(x_BTD, scale_D, *, eps, residual_BTD=None):
    """Returns x / sqrt(mean(x^2) + eps) * scale (Zhang and Sennrich, 2019).

    With `residual_BTD` returns (the norm of x + residual, x + residual).
    """
    if residual_BTD is not None:
        x_BTD = x_BTD + residual_BTD
    wide_BTD = x_BTD.astype(_wide(x_BTD.dtype))
    inverse_BT1 = jax.lax.rsqrt(jnp.mean(jnp.square(wide_BTD), axis=-1, keepdims=True) + eps)
    y_BTD = (wide_BTD * inverse_BT1 * scale_D.astype(wide_BTD.dtype)[None, None, :]).astype(x_BTD.dtype)
    return y_BTD if residual_BTD is None else (y_BTD, x_BTD)


def rope(x_BTNH, positions_BT, *, base, scaling: float | RopeScaling = 1.0):
    """Returns x turned by rotary position embedding, half rotation (the layout Llama checkpoints use).

    The pair (x[i], x[i + H/2]) turns by position / scaling * base^(-2i / H). `scaling` > 1 is linear position
    interpolation; a RopeScaling changes the frequencies instead.
    """
    half, dtype = x_BTNH.shape[-1] // 2, _wide(x_BTNH.dtype)
    return turned(x_BTNH, *rotary_angles(positions_BT, half, base=base, scaling=scaling, dtype=dtype))


def rotary_angles(positions_BT, half: int, *, base, scaling: float | RopeScaling = 1.0, dtype=jnp.float32):
    """Returns the cosines and sines, [B, T, 1, half], of the angles that `rope` turns by."""
    if isinstance(scaling, RopeScaling):
        angle_BT1h = rope_scaling.angles(positions_BT, half, base, scaling, dtype)[:, :, None]
        factor = scaling.attention_factor
        return factor * jnp.cos(angle_BT1h), factor * jnp.sin(angle_BT1h)
    frequency_h = base ** (-jnp.arange(half, dtype=dtype) / half)
    angle_BT1h = (positions_BT.astype(dtype) / scaling)[:, :, None, None] * frequency_h[None, None, None, :]
    return jnp.cos(angle_BT1h), jnp.sin(angle_BT1h)


def turned(x_BTNH, cos_BT1h, sin_BT1h):
    """Turns the pairs (x[i], x[i + H/2]) by the angles with these cosines and sines."""
    a_BTNh, b_BTNh = jnp.split(x_BTNH.astype(cos_BT1h.dtype), 2, axis=-1)
    turned_BTNH = jnp.concatenate(
        (a_BTNh * cos_BT1h - b_BTNh * sin_BT1h, b_BTNh * cos_BT1h + a_BTNh * sin_BT1h), axis=-1
    )
    return turned_BTNH.astype(x_BTNH.dtype)


def swiglu(gate_BTF, up_BTF):
    """Returns silu(gate) * up (Shazeer, 2020)."""
    return jax.nn.silu(gate_BTF) * up_BTF


def cross_entropy(x_BTD, head_DV, targets_BT, *, weights_BT=None, z_loss=0.0):
    """Returns (loss, {'nll', 'z_loss'}), float32 scalars: the loss to minimise is the sum of the two parts.

    nll: mean negative log-likelihood, in nats, of `targets_BT` under softmax(x @ head).
    z_loss: `z_loss` times the mean squared log of the softmax's denominator (PaLM, section 5).
    `weights_BT` weights the means (0 leaves a position out). Only the loss has a gradient.
    """
    logits_BTV = jnp.einsum(
        'btd,dv->btv', x_BTD, head_DV, precision=precision(x_BTD), preferred_element_type=_wide(x_BTD.dtype)
    )
    picked_BT = jnp.take_along_axis(logits_BTV, targets_BT[:, :, None], axis=-1)[:, :, 0]
    lse_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    weights_BT = jnp.ones_like(lse_BT) if weights_BT is None else weights_BT.astype(lse_BT.dtype)
    shares_BT = weights_BT / jnp.maximum(jnp.sum(weights_BT), 1e-9)
    nll, z = jnp.sum(shares_BT * (lse_BT - picked_BT)), z_loss * jnp.sum(shares_BT * jnp.square(lse_BT))
    return nll + z, jax.lax.stop_gradient({'nll': nll, 'z_loss': z})
