"""A peer: Hugging Face's Llama as torch users train it (torch.compile, fused AdamW, bfloat16 autocast).

Imports torch and transformers, and touches no GPU through JAX.
"""

import contextlib
import functools

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch.nn import attention as torch_attention

from tinyllama_jax.config import Config, ModelConfig

_CAUSAL, _CAUSAL_REPEATED = 'causal_sdpa', 'causal_sdpa_repeated'
_KERNELS = ('flash', 'fmha', 'cudnn', 'sdpa', 'attention')  # parts of the names of attention kernels


def _causal_attention(module, query, key, value, attention_mask, *, scaling=None, **_):
    """Runs SDPA told that it is causal. Hugging Face's own builds a mask under torch.compile before torch 2.14."""
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None


def _repeated_attention(module, query, key, value, attention_mask, *, scaling=None, **_):
    """Runs causal SDPA for a backend that does not support grouped-query attention: repeats keys and values."""
    key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


def _knows_groups(backend, device: str) -> bool:
    """Returns whether a backend runs grouped-query attention, forward and backward."""
    q, k, v = (torch.ones(1, heads, 64, 64, dtype=torch.bfloat16, device=device) for heads in (4, 2, 2))
    try:
        with torch_attention.sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(q.requires_grad_(), k, v, is_causal=True, enable_gqa=True)
        out.sum().backward()
    except RuntimeError:
        return False
    return True


def make_net(config: ModelConfig, weights: dict[str, torch.Tensor], device: str) -> transformers.LlamaForCausalLM:
    """Returns Hugging Face's Llama in float32 with `state_dict`'s weights; the residual stream runs in bfloat16."""
    assert config.rope_base == 10_000 and config.rope_scaling == 1  # its defaults
    transformers.AttentionInterface.register(_CAUSAL, _causal_attention)
    transformers.AttentionInterface.register(_CAUSAL_REPEATED, _repeated_attention)
    theirs = transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.embed_dim,
        intermediate_size=config.hidden_dim,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.norm_eps,
        max_position_embeddings=config.seq_len,
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation=_CAUSAL,
    )
    with torch.device(device):
        net = transformers.LlamaForCausalLM(theirs).float()
    net.load_state_dict(weights)
    net.model.embed_tokens.register_forward_hook(lambda module, inputs, out: out.bfloat16())
    return net.train()


def state_dict(weights: dict[str, np.ndarray], num_layers: int) -> dict[str, torch.Tensor]:
    """Returns our weights, given by path, under Hugging Face's names and in its layout [out, in]."""

    def matrix(array, inputs: int):
        return array.reshape(int(np.prod(array.shape[:inputs])), -1).T

    state = {
        'model.embed_tokens.weight': weights['embed'],
        'model.norm.weight': weights['final_norm/scale'],
        'lm_head.weight': weights['lm_head'].T,
    }
    for i in range(num_layers):
        ours = {path: weights[f'layers/{path}'][i] for path in _LAYER}
        state |= {
            f'model.layers.{i}.{name}.weight': matrix(ours[path], inputs) if inputs else ours[path]
            for path, (name, inputs) in _LAYER.items()
        }
    return {name: torch.tensor(np.ascontiguousarray(array)) for name, array in state.items()}


_LAYER = {
    'attention_norm/scale': ('input_layernorm', 0),
    'attention/q': ('self_attn.q_proj', 1),
    'attention/k': ('self_attn.k_proj', 1),
    'attention/v': ('self_attn.v_proj', 1),
    'attention/o': ('self_attn.o_proj', 2),
    'mlp_norm/scale': ('post_attention_layernorm', 0),
    'mlp/gate': ('mlp.gate_proj', 1),
    'mlp/up': ('mlp.up_proj', 1),
    'mlp/down': ('mlp.down_proj', 1),
}


class Trainer:
    """One way to train a net: attention on cuDNN (`cudnn`) or as Hugging Face and torch choose, compiled or not.

    Several share one net, and each sets it up for itself before a step. `recomputes`: layers are run again
    in the backward pass.
    """

    def __init__(self, net, config: Config, *, cudnn: bool, compiled: bool):
        self.net, self.device = net, str(next(net.parameters()).device)
        self.clip_norm, self.recomputes = config.optimizer.clip_norm, False
        backends = torch_attention.SDPBackend
        backend = backends.CUDNN_ATTENTION if 'cuda' in self.device else backends.MATH
        self.implementation, self.backend = 'sdpa', contextlib.nullcontext
        if cudnn:
            self.implementation = _CAUSAL if _knows_groups(backend, self.device) else _CAUSAL_REPEATED
            self.backend = functools.partial(torch_attention.sdpa_kernel, backend)

        def loss_of(tokens_BT, targets_BT):
            with torch.autocast(net.device.type, torch.bfloat16):
                logits_BTV = net(input_ids=tokens_BT, use_cache=False).logits
            return F.cross_entropy(logits_BTV.float().flatten(0, 1), targets_BT.flatten())

        self.loss_of = torch.compile(loss_of, dynamic=False) if compiled else loss_of

    def __call__(self, rows_BR: np.ndarray, optimizer: torch.optim.Optimizer):
        """Takes one optimizer step; returns the loss, which may still be computing."""
        if self.net.config._attn_implementation != self.implementation:
            self.net.set_attn_implementation(self.implementation)
        if self.net.is_gradient_checkpointing != self.recomputes:
            (self.net.gradient_checkpointing_enable if self.recomputes else self.net.gradient_checkpointing_disable)()
        with self.backend():
            loss = self.loss_of(*_split(rows_BR, self.device))
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), self.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def _split(rows_BR: np.ndarray, device: str):
    rows_BR = torch.from_numpy(rows_BR.astype(np.int64)).to(device)
    return rows_BR[:, :-1], rows_BR[:, 1:]


def make_optimizer(net, config: Config) -> torch.optim.Optimizer:
    """Returns fused AdamW; norms are not decayed."""
    given = config.optimizer
    matrices = [p for p in net.parameters() if p.ndim > 1]
    scales = [p for p in net.parameters() if p.ndim == 1]
    groups = [{'params': matrices, 'weight_decay': given.weight_decay}, {'params': scales, 'weight_decay': 0.0}]
    betas = (given.beta1, given.beta2)
    return torch.optim.AdamW(groups, lr=given.peak_learning_rate, betas=betas, eps=given.eps, fused=True)


@torch.no_grad()
def token_losses(net, rows_BR: np.ndarray) -> np.ndarray:
    """Returns the negative log-likelihood [B, T] of each next token."""
    tokens_BT, targets_BT = _split(rows_BR, str(net.device))
    with torch.autocast(net.device.type, torch.bfloat16):
        logits_BTV = net(input_ids=tokens_BT, use_cache=False).logits
    return F.cross_entropy(logits_BTV.float().transpose(1, 2), targets_BT, reduction='none').cpu().numpy()


def attention_kernels(train) -> str:
    """Returns the names of the attention kernels that a call of `train` runs on the GPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        train()
        torch.cuda.synchronize()
    names = {event.key for event in profile.key_averages()}
    return ', '.join(sorted(name[:80] for name in names if any(part in name.lower() for part in _KERNELS)))
