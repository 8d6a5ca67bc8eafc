"""Counts parameters and FLOPs per token, and knows the peak FLOP/s of chips.

Three conventions of training FLOPs per token are in use, and their figures cannot
be compared (L layers, d = heads x head_dim, T sequence length):

    C  6 (body + head) + 6 L d T     causal attention, as executed by flash attention
    F  6 (body + head) + 12 L d T    full attention (PaLM, appendix B, without the embedding)
    N  6 all parameters + 12 L d T   in the original's and many others' scripts
"""

import re

from kernels import chips
from tinyllama_jax.config import ModelConfig

# Dense bf16 FLOP/s of one GPU by its name, such as H100.
PEAK_FLOPS = {name: peak for chip in chips.CHIPS.values() for name, peak in chip.peak_flops.items()}


def parameter_counts(model: ModelConfig) -> dict[str, int]:
    """Returns the numbers of parameters of embed, body (layers and final norm) and head."""
    attention = model.embed_dim * model.head_dim * 2 * (model.num_heads + model.num_kv_heads)
    mlp = 3 * model.embed_dim * model.hidden_dim
    layer = attention + mlp + 2 * model.embed_dim
    vocabulary = model.vocab_size * model.embed_dim
    return {'embed': vocabulary, 'body': model.num_layers * layer + model.embed_dim, 'head': vocabulary}


def flops_per_token(model: ModelConfig, convention: str) -> float:
    """Returns training FLOPs (forward and backward) per token by convention C, F or N."""
    counts = parameter_counts(model)
    attention = model.num_layers * model.num_heads * model.head_dim * model.seq_len
    if convention == 'N':
        return 6 * sum(counts.values()) + 12 * attention
    return 6 * (counts['body'] + counts['head']) + {'C': 6, 'F': 12}[convention] * attention


def peak_flops(device_kind: str) -> float | None:
    """Returns the peak bf16 FLOP/s of a device by jax's device_kind, or None for one without a known peak (CPUs)."""
    names = re.findall(r'[A-Z]+\d+', device_kind)  # NVIDIA GB200: GB200, not B200
    return next((PEAK_FLOPS[name] for name in names if name in PEAK_FLOPS), None)


def mfu(model: ModelConfig, convention: str, tokens_per_second: float, device_kind: str, devices: int) -> float | None:
    """Returns the model FLOPs utilisation, 0 to 1, or None if the chip's peak is unknown."""
    peak = peak_flops(device_kind)
    return tokens_per_second * flops_per_token(model, convention) / (peak * devices) if peak else None
