"""The Llama of the paper (section 2.2): RoPE, pre-norm RMSNorm, SwiGLU, grouped-query attention.

Parameters are a plain nested dict in float32, whose paths and shapes are a
contract (tests/tinyllama_jax/model_test.py); NNX modules give them structure and are merged
with them inside each call. Layers are stacked on a leading axis L.

Shapes: B batch, T time, D model, N query heads, K key-value heads, H head dim,
F feed-forward, V vocabulary, L layers.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from tinyllama_jax import ops as ops_lib
from tinyllama_jax.config import ModelConfig
from tinyllama_jax.ops import Ops

_ATTENTION = ('attention_out', 'attention_lse')
# Policies of jax.checkpoint by the names in config.train.remat.
_REMAT = {
    'full': None,
    'attention': jax.checkpoint_policies.save_only_these_names(*_ATTENTION),
    'names': jax.checkpoint_policies.save_only_these_names(*_ATTENTION, 'qkv', 'attended', 'mlp'),
}


def compute_dtype(config: ModelConfig, ops: Ops | None = None):
    """The dtype of activations, on the default device without `ops`; as `ops.compute_dtype`."""
    return ops_lib.compute_dtype(config, (ops or ops_lib.make_ops(ops_lib.PLAIN)).chip)


def matmul_precision(dtype):
    """A context in which products of `dtype` are of its precision: GPUs would make float32's of TensorFloat-32."""
    return jax.default_matmul_precision(jnp.dtype(dtype).name)


def _stds(config: ModelConfig) -> tuple[float, float]:
    """Standard deviations of (embedding, head and input projections; the two residual outputs)."""
    if config.init == 'original':
        return (0.4 / config.embed_dim) ** 0.5, config.embed_dim**-0.5 / config.num_layers
    return 0.02, 0.02 * (2 * config.num_layers) ** -0.5


def _weight(rngs: nnx.Rngs, std: float, *shape: int) -> nnx.Param:
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32))


class RMSNorm(nnx.Module):
    """Root-mean-square norm with a learned scale."""

    def __init__(self, config: ModelConfig):
        self.eps = config.norm_eps
        self.scale = nnx.Param(jnp.ones(config.embed_dim, jnp.float32))

    def __call__(self, x_BTD, ops: Ops, residual_BTD=None):
        """Normed [B, T, D]; with a residual (normed sum, sum)."""
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
        """Attended [B, T, D] and this layer's cache, as `attend` returns it."""
        rotate = functools.partial(
            ops.rope, positions_BT=positions_BT, base=self.config.rope_base, scaling=self.config.rope_scaling
        )
        q_BTNH = checkpoint_name(rotate(ops.linear(x_BTD, self.q[...])), 'qkv')
        k_BTKH = checkpoint_name(rotate(ops.linear(x_BTD, self.k[...])), 'qkv')
        v_BTKH = checkpoint_name(ops.linear(x_BTD, self.v[...]), 'qkv')
        out_BTNH, cache = attend(q_BTNH, k_BTKH, v_BTKH, cache)
        return checkpoint_name(ops.linear(out_BTNH, self.o[...]), 'attended'), cache


class MLP(nnx.Module):
    """SwiGLU feed-forward."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        std, residual_std = _stds(config)
        self.gate = _weight(rngs, std, config.embed_dim, config.hidden_dim)
        self.up = _weight(rngs, std, config.embed_dim, config.hidden_dim)
        self.down = _weight(rngs, residual_std, config.hidden_dim, config.embed_dim)

    def __call__(self, x_BTD, ops: Ops):
        """Fed forward [B, T, D]."""
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
        """The residual stream [B, T, D] after this layer, and its cache."""
        normed_BTD = self.attention_norm(x_BTD, ops)
        attended_BTD, cache = self.attention(normed_BTD, ops, positions_BT, attend, cache)
        normed_BTD, x_BTD = self.mlp_norm(attended_BTD, ops, x_BTD)
        return x_BTD + self.mlp(normed_BTD, ops), cache


class Llama(nnx.Module):
    """Embedding, L layers, a final norm; the untied head is applied by the loss or by `logits`."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        std, _ = _stds(config)
        self.config = config
        self.embed = _weight(rngs, std, config.vocab_size, config.embed_dim)
        keys_L = jax.random.split(rngs.params(), config.num_layers)
        self.layers = jax.vmap(lambda key: Layer(config, rngs=nnx.Rngs(key)))(keys_L)
        self.final_norm = RMSNorm(config)
        self.lm_head = _weight(rngs, std, config.embed_dim, config.vocab_size)

    def __call__(self, tokens_BT, ops: Ops, attend, positions_BT=None, cache=None, *, layers=None, remat='none'):
        """Final hidden states [B, T, D] and the layers' caches; `layers`: modules in place of the stacked ones."""
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        x_BTD = ops.embed(self.embed[...], tokens_BT, compute_dtype(self.config, ops))

        def body(x_BTD, layer_and_cache):
            layer, layer_cache = layer_and_cache
            return layer(x_BTD, ops, positions_BT, attend, layer_cache)

        if remat != 'none':
            body = jax.checkpoint(body, policy=_REMAT[remat], prevent_cse=not self.config.scan_layers)
        x_BTD, cache = self._run_layers(body, x_BTD, layers, cache)
        return self.final_norm(x_BTD, ops), cache

    def _run_layers(self, body, x_BTD, layers, cache):
        if layers is None and self.config.scan_layers:
            return jax.lax.scan(body, x_BTD, (self.layers, cache))
        layers, caches = layers or unstacked(self.layers, self.config.num_layers), []
        for layer_and_cache in zip(layers, cache or [None] * len(layers), strict=True):
            x_BTD, layer_cache = body(x_BTD, layer_and_cache)
            caches.append(layer_cache)
        return x_BTD, caches


def unstacked(tree, count: int) -> list:
    """The `count` slices of a stacked tree; one split, whose transpose is one concatenation."""
    leaves, structure = jax.tree.flatten(tree)
    split = [[part[0] for part in jax.lax.split(leaf, [1] * count, axis=0)] for leaf in leaves]
    return [jax.tree.unflatten(structure, parts) for parts in zip(*split, strict=True)]


@functools.cache
def _graphdef(config: ModelConfig):
    return nnx.split(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0))))[0]


def init_params(config: ModelConfig, key) -> dict:
    """Fresh float32 parameters as a plain nested dict; `key` is a jax.random key."""
    return nnx.to_pure_dict(nnx.state(Llama(config, rngs=nnx.Rngs(key))))


def hidden(params: dict, tokens_BT, config: ModelConfig, *, ops: Ops | None = None, positions_BT=None,
           segment_ids_BT=None, attend=None, cache=None, remat='none'):  # fmt: skip
    """Final hidden states [B, T, D] in the compute dtype, and what `attend` returned for each layer.

    Args:
      params: of `init_params`, or with the layers `unstacked`.
      ops: by default plain JAX on the default device.
      segment_ids_BT: tokens see only those of their own segment.
      attend: (queries, keys, values, the layer's part of `cache`) -> (attended, what to return), in place of
        attention over the tokens given; see decode.py.
    """
    ops = ops or ops_lib.make_ops(ops_lib.PLAIN)
    attend = attend or (lambda q, k, v, _: (ops.attention(q, k, v, segment_ids_BT=segment_ids_BT), None))
    apart = isinstance(params['layers'], list)
    llamas = [_merged(params, config, layers) for layers in (params['layers'] if apart else [params['layers']])]
    llama, layers = llamas[0], [llama.layers for llama in llamas] if apart else None
    with matmul_precision(compute_dtype(config, ops)):
        return llama(tokens_BT, ops, attend, positions_BT, cache, layers=layers, remat=remat)


def _merged(params: dict, config: ModelConfig, layers: dict) -> Llama:
    return nnx.merge(_graphdef(config), nnx.State({**params, 'layers': layers}))


def logits(params: dict, x_BTD):
    """Float32 logits [B, T, V] of final hidden states."""
    head_DV = params['lm_head'].astype(x_BTD.dtype)
    with matmul_precision(x_BTD.dtype):
        return jnp.einsum('btd,dv->btv', x_BTD, head_DV, preferred_element_type=jnp.float32)


def forward(params: dict, tokens_BT, config: ModelConfig):
    """Float32 logits [B, T, V] for whole sequences."""
    return logits(params, hidden(params, tokens_BT, config)[0])


def loss(params: dict, tokens_BT, targets_BT, config: ModelConfig, *, ops: Ops | None = None, weights_BT=None,
         z_loss=0.0, **how):  # fmt: skip
    """(what training minimises, its parts {nll, z_loss}), float32 scalars; `how` is `hidden`'s.

    nll is the mean next-token loss in nats.
    """
    ops = ops or ops_lib.make_ops(ops_lib.PLAIN)
    x_BTD, _ = hidden(params, tokens_BT, config, ops=ops, **how)
    with matmul_precision(x_BTD.dtype):
        return ops.cross_entropy(x_BTD, params['lm_head'], targets_BT, weights_BT=weights_BT, z_loss=z_loss)
