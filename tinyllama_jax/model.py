"""The Llama of the paper (section 2.2): RoPE, pre-norm RMSNorm, SwiGLU, grouped-query attention.

Parameters are a plain nested dict in float32. Their paths and shapes are a contract
(tests/tinyllama_jax/model_test.py). NNX modules give them structure: each layer's
module is merged with its weights where it runs. Layers are stacked on a leading axis L.

Shapes: B batch, T time, D model, N query heads, K key-value heads, H head dim,
F feed-forward, V vocabulary, L layers.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from tinyllama_jax import config as config_lib
from tinyllama_jax import ops as ops_lib
from tinyllama_jax.config import ModelConfig
from tinyllama_jax.ops import Ops


def compute_dtype(config: ModelConfig, ops: Ops | None = None):
    """Returns the dtype of activations on the chip of `ops`, by default that of the first device."""
    return ops_lib.compute_dtype(config, (ops or ops_lib.make_ops(ops_lib.PLAIN)).chip)


def matmul_precision(dtype):
    """A context that makes float32 matmuls true float32 (GPUs default to TF32); other dtypes stay as they are."""
    return jax.default_matmul_precision(jnp.dtype(dtype).name)


def _stds(config: ModelConfig) -> tuple[float, float]:
    """Returns the standard deviations of (embedding, head and input projections; both outputs to the residual)."""
    if config.init == 'original':
        return (0.4 / config.embed_dim) ** 0.5, config.embed_dim**-0.5 / config.num_layers
    # 2 L outputs add up in the residual stream; scaled so, the sum keeps the variance of one (GPT-2).
    return 0.02, 0.02 * (2 * config.num_layers) ** -0.5


def _weight(rngs: nnx.Rngs, std: float, *shape: int) -> nnx.Param:
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32))


class RMSNorm(nnx.Module):
    """Root-mean-square norm with a learned scale (Zhang and Sennrich, 2019)."""

    def __init__(self, config: ModelConfig):
        self.eps = config.norm_eps
        # float32 like all parameters; the kernels multiply in float32 and round once.
        self.scale = nnx.Param(jnp.ones(config.embed_dim, jnp.float32))

    def __call__(self, x_BTD, ops: Ops, residual_BTD=None):
        """Returns the normed [B, T, D]; with a residual (normed sum, sum)."""
        return ops.rms_norm(x_BTD, self.scale[...], eps=self.eps, residual_BTD=residual_BTD)


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions, without biases."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        D, N, K, H = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim
        self.config = config
        std, residual_std = _stds(config)
        self.q = _weight(rngs, std, D, N, H)
        self.k = _weight(rngs, std, D, K, H)
        self.v = _weight(rngs, std, D, K, H)
        self.o = _weight(rngs, residual_std, N, H, D)

    def __call__(self, x_BTD, ops: Ops, positions_BT, attend, cache=None):
        """Returns the attention's output [B, T, D] and this layer's cache. `attend` is explained at `hidden`."""
        rotate = functools.partial(ops.rope, positions_BT=positions_BT, **ops_lib.rope_options(self.config))
        # Named residuals are what a remat policy may save (config.REMAT). Their bytes are per token and layer of the
        # 1.1 B model in bfloat16. Queries, keys and values, 4,096 + 512 + 512 bytes, are saved after the rotation.
        q_BTNH = checkpoint_name(rotate(ops.linear(x_BTD, self.q[...])), 'qkv')
        k_BTKH = checkpoint_name(rotate(ops.linear(x_BTD, self.k[...])), 'qkv')
        v_BTKH = checkpoint_name(ops.linear(x_BTD, self.v[...]), 'qkv')
        # Attention names its own residuals: attention_out, 4,096 bytes, and attention_lse, 256 (float32).
        out_BTNH, cache = attend(q_BTNH, k_BTKH, v_BTKH, cache)
        # 4,096 bytes. Without it the backward pass would repeat this product to get the MLP's input.
        return checkpoint_name(ops.linear(out_BTNH, self.o[...]), 'attended'), cache


class MLP(nnx.Module):
    """SwiGLU feed-forward."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        std, residual_std = _stds(config)
        self.gate = _weight(rngs, std, config.embed_dim, config.hidden_dim)
        self.up = _weight(rngs, std, config.embed_dim, config.hidden_dim)
        self.down = _weight(rngs, residual_std, config.hidden_dim, config.embed_dim)

    def __call__(self, x_BTD, ops: Ops):
        """Returns down(silu(gate(x)) * up(x)), [B, T, D]."""
        # 11,264 bytes each. SwiGLU's output, as large, is cheap to recompute from them.
        gate_BTF, up_BTF = (checkpoint_name(ops.linear(x_BTD, w[...]), 'mlp') for w in (self.gate, self.up))
        return ops.linear(ops.swiglu(gate_BTF, up_BTF), self.down[...])


class Layer(nnx.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = RMSNorm(config)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(self, x_BTD, ops: Ops, positions_BT, attend, cache=None):
        """Returns the residual stream [B, T, D] after this layer, and its cache."""
        normed_BTD = self.attention_norm(x_BTD, ops)
        attended_BTD, cache = self.attention(normed_BTD, ops, positions_BT, attend, cache)
        # One kernel adds to the residual stream and norms the sum, so the sum is read from memory once.
        normed_BTD, x_BTD = self.mlp_norm(attended_BTD, ops, x_BTD)
        return x_BTD + self.mlp(normed_BTD, ops), cache


class Llama(nnx.Module):
    """The tree of parameters: embedding, L stacked layers, a final norm and an untied head. `hidden` runs it."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        std, _ = _stds(config)
        self.embed = _weight(rngs, std, config.vocab_size, config.embed_dim)
        # vmap stacks the layers' weights on a leading axis L, which lax.scan runs over.
        keys_L = jax.random.split(rngs.params(), config.num_layers)
        self.layers = jax.vmap(lambda key: Layer(config, rngs=nnx.Rngs(key)))(keys_L)
        self.final_norm = RMSNorm(config)
        self.lm_head = _weight(rngs, std, config.embed_dim, config.vocab_size)


def random_key(seed: int):
    """Returns a jax.random key in which all bits of a seed below 2**63 count; jax.random.key drops those above 32."""
    key = jax.random.key(seed % 2**32)
    return jax.random.fold_in(key, seed >> 32) if seed >> 32 else key


def init_params(config: ModelConfig, key) -> dict:
    """Returns fresh float32 parameters as a plain nested dict; `key` is a jax.random key."""
    return nnx.to_pure_dict(nnx.state(Llama(config, rngs=nnx.Rngs(key))))


@functools.cache
def _layer_graphdef(config: ModelConfig):
    return nnx.split(nnx.eval_shape(lambda: Layer(config, rngs=nnx.Rngs(0))))[0]


def remat_policy(name: str):
    """Returns the policy of jax.checkpoint that saves what `config.REMAT[name]` lists."""
    saved, policies = config_lib.REMAT[name], jax.checkpoint_policies
    return policies.everything_saveable if saved is None else policies.save_only_these_names(*saved)


def unstacked(tree, count: int) -> list:
    """Returns the `count` slices of a stacked tree."""
    leaves, structure = jax.tree.flatten(tree)
    # One split per leaf: its transpose is one concatenation, while that of `count` slices is `count` padded sums.
    split = [[part[0] for part in jax.lax.split(leaf, [1] * count, axis=0)] for leaf in leaves]
    return [jax.tree.unflatten(structure, parts) for parts in zip(*split, strict=True)]


def hidden(
    params: dict,
    tokens_BT,
    config: ModelConfig,
    *,
    ops: Ops | None = None,
    positions_BT=None,
    segment_ids_BT=None,
    attend=None,
    cache=None,
    remat: str = 'none',
):
    """Returns the final hidden states [B, T, D] in the compute dtype, and what `attend` returned for each layer.

    Args:
      params: from `init_params`; the layers stacked, or a list (`unstacked`).
      ops: plain JAX on the first device by default.
      positions_BT: of the tokens in their documents; 0, 1, 2, ... in each row by default.
      segment_ids_BT: a token sees only tokens of its own segment.
      attend: (queries, keys, values, the layer's part of `cache`) -> (output, what to return), instead of causal
        attention over these tokens; decode.py attends over a cache.
      cache: the keys and values of earlier tokens, stacked or listed like the layers; none in training.
      remat: what the backward pass recomputes, a key of `config.REMAT`.
    """
    ops = ops or ops_lib.make_ops(ops_lib.PLAIN)
    attend = attend or (lambda q, k, v, _: (ops.attention(q, k, v, segment_ids_BT=segment_ids_BT), None))
    if positions_BT is None:
        positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)

    def layer(x_BTD, weights_and_cache):
        weights, layer_cache = weights_and_cache
        module = nnx.merge(_layer_graphdef(config), nnx.State(weights))
        return module(x_BTD, ops, positions_BT, attend, layer_cache)

    if remat != 'none':
        # In a scan XLA cannot merge the recomputation with the forward pass; unrolled, it would undo the remat.
        layer = jax.checkpoint(layer, policy=remat_policy(remat), prevent_cse=not config.scan_layers)
    # From the embedding on, the residual stream has the compute dtype; each op casts its float32 weight to it.
    dtype = compute_dtype(config, ops)
    with matmul_precision(dtype):
        x_BTD = ops.embed(params['embed'], tokens_BT, dtype)
        x_BTD, cache = _over_layers(layer, x_BTD, params['layers'], cache, config)
        x_BTD = ops.rms_norm(x_BTD, params['final_norm']['scale'], eps=config.norm_eps)
        return x_BTD, cache


def _over_layers(layer, x_BTD, layers, cache, config: ModelConfig):
    """Runs all layers: scanned, which compiles one layer, or unrolled, which runs faster. Returns (x_BTD, cache)."""
    if config.scan_layers and not isinstance(layers, list):
        return jax.lax.scan(layer, x_BTD, (layers, cache))
    layers = layers if isinstance(layers, list) else unstacked(layers, config.num_layers)
    caches = []
    for weights_and_cache in zip(layers, cache or [None] * len(layers), strict=True):
        x_BTD, layer_cache = layer(x_BTD, weights_and_cache)
        caches.append(layer_cache)
    return x_BTD, caches


def logits(params: dict, x_BTD):
    """Returns float32 logits [B, T, V] of final hidden states."""
    head_DV = params['lm_head'].astype(x_BTD.dtype)
    with matmul_precision(x_BTD.dtype):
        # Products of bfloat16 are summed in float32 anyway; asking for it keeps the logits from being rounded.
        return jnp.einsum('btd,dv->btv', x_BTD, head_DV, preferred_element_type=jnp.float32)


def forward(params: dict, tokens_BT, config: ModelConfig):
    """Returns float32 logits [B, T, V] for whole sequences."""
    return logits(params, hidden(params, tokens_BT, config)[0])


def loss(
    params: dict,
    tokens_BT,
    targets_BT,
    config: ModelConfig,
    *,
    ops: Ops | None = None,
    weights_BT=None,
    z_loss: float = 0.0,
    **options,
):
    """Returns (the loss that training minimises, its parts {nll, z_loss}), float32 scalars.

    nll is the mean next-token loss in nats, weighted by `weights_BT` (0: padding). `options` are those of `hidden`.
    """
    ops = ops or ops_lib.make_ops(ops_lib.PLAIN)
    x_BTD, _ = hidden(params, tokens_BT, config, ops=ops, **options)
    with matmul_precision(x_BTD.dtype):
        # The head and the loss are one op, which makes logits by chunks of tokens: whole ones would take 4 GB.
        return ops.cross_entropy(x_BTD, params['lm_head'], targets_BT, weights_BT=weights_BT, z_loss=z_loss)
