"""A peer: the same Llama in plain JAX (a scan over layers, jax.nn's attention, optax's AdamW).

Takes our parameters, so that it starts from the same weights. Of the product it imports only configs and TrainState.

Shapes: A accumulation steps (1 here), B batch, T time, D model, N query heads, K key-value heads, H head dim,
F feed-forward, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
import optax

from tinyllama_jax.config import Config, ModelConfig
from tinyllama_jax.step import TrainState


def rms_norm(x_BTD, scale_D, eps: float):
    """Returns x / sqrt(mean(x^2) + eps) * scale, in float32 inside."""
    wide_BTD = x_BTD.astype(jnp.float32)
    inverse_BT1 = jax.lax.rsqrt(jnp.mean(wide_BTD**2, axis=-1, keepdims=True) + eps)
    return (wide_BTD * inverse_BT1 * scale_D[None, None, :]).astype(x_BTD.dtype)


def rotated(x_BTNH, base: float):
    """Returns x turned by rotary embedding, half rotation."""
    half = x_BTNH.shape[-1] // 2
    angle_Th = jnp.arange(x_BTNH.shape[1])[:, None] * base ** (-jnp.arange(half) / half)[None, :]
    cos, sin = (f(angle_Th)[None, :, None, :] for f in (jnp.cos, jnp.sin))
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate((a * cos - b * sin, b * cos + a * sin), axis=-1).astype(x_BTNH.dtype)


def layer(x_BTD, weights: dict, config: ModelConfig, attention: str):
    """Runs one decoder layer; `attention` is jax.nn.dot_product_attention's implementation."""
    w = jax.tree.map(lambda leaf: leaf.astype(x_BTD.dtype), weights)
    y_BTD = rms_norm(x_BTD, weights['attention_norm']['scale'], config.norm_eps)
    q_BTNH, k_BTKH, v_BTKH = (jnp.einsum('btd,dnh->btnh', y_BTD, w['attention'][name]) for name in 'qkv')
    q_BTNH, k_BTKH = (rotated(x, config.rope_base) for x in (q_BTNH, k_BTKH))
    out_BTNH = jax.nn.dot_product_attention(q_BTNH, k_BTKH, v_BTKH, is_causal=True, implementation=attention)
    x_BTD = x_BTD + jnp.einsum('btnh,nhd->btd', out_BTNH, w['attention']['o'])
    y_BTD = rms_norm(x_BTD, weights['mlp_norm']['scale'], config.norm_eps)
    hidden_BTF = jax.nn.silu(y_BTD @ w['mlp']['gate']) * (y_BTD @ w['mlp']['up'])
    return x_BTD + hidden_BTF @ w['mlp']['down']


def token_losses(params: dict, rows_BR, config: ModelConfig, attention: str, remat: str = 'none'):
    """Returns the negative log-likelihood [B, T] of each next token, float32, from whole logits."""
    rows_BR = rows_BR.astype(jnp.int32)
    x_BTD = params['embed'][rows_BR[:, :-1]].astype(config.compute_dtype)
    body = functools.partial(layer, config=config, attention=attention)
    body = jax.checkpoint(body) if remat == 'full' else body
    x_BTD, _ = jax.lax.scan(lambda x_BTD, weights: (body(x_BTD, weights), None), x_BTD, params['layers'])
    x_BTD = rms_norm(x_BTD, params['final_norm']['scale'], config.norm_eps)
    logits_BTV = jnp.dot(x_BTD, params['lm_head'].astype(x_BTD.dtype), preferred_element_type=jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits_BTV, rows_BR[:, 1:])


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """Returns clipping and AdamW at a constant rate; norms are not decayed."""
    given = config.optimizer
    rate = optax.constant_schedule(given.peak_learning_rate)  # a schedule: the state then has the form of ours
    return optax.chain(
        optax.clip_by_global_norm(given.clip_norm),
        optax.adamw(
            rate,
            b1=given.beta1,
            b2=given.beta2,
            eps=given.eps,
            weight_decay=given.weight_decay,
            mask=lambda params: jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key != 'scale', params),
        ),
    )


def train_step(state: TrainState, rows_ABR, *, config: Config, attention: str, remat: str):
    """Takes one optimizer step; returns (state, {'loss'})."""

    def loss_of(params):
        return jnp.mean(token_losses(params, rows_ABR[0], config.model, attention, remat))

    loss, grads = jax.value_and_grad(loss_of)(state.params)
    updates, opt_state = make_optimizer(config).update(grads, state.opt_state, state.params)
    return TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state), {'loss': loss}
