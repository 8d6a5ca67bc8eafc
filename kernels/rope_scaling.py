"""Frequencies of rotary embedding that is stretched to texts longer than those of the first training.

As transformers computes them: Llama 3's (its config's rope_type `llama3`), YaRN (Peng et al., 2023) and dynamic NTK.
Linear interpolation needs no frequencies of its own: it divides positions.

Shapes: B batch, T time, h = half the head dim.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np


class RopeScaling(NamedTuple):
    """How frequencies are changed. A frequency's turns are those that it makes in `original_length` positions.

    kind: llama3 and yarn divide frequencies of few turns by `factor`, keep those of many, and mix the two between
      `slow_turns` and `fast_turns`: llama3 by a frequency's turns, yarn by its index. dynamic raises the base for
      rows longer than `original_length`, by the row's length.
    truncate: yarn's bounds are rounded to whole indices.
    attention_factor: yarn multiplies cosines and sines by it.
    """

    kind: str
    factor: float
    original_length: int
    slow_turns: float = 1.0
    fast_turns: float = 32.0
    truncate: bool = True
    attention_factor: float = 1.0


def angles(positions_BT, half: int, base: float, scaling: RopeScaling, dtype):
    """Returns the angles [B, T, half] by which the pairs turn at these positions."""
    positions_BT1 = positions_BT.astype(dtype)[:, :, None]
    if scaling.kind != 'dynamic':
        return positions_BT1 * jnp.asarray(_fixed_frequencies(half, base, scaling), dtype)[None, None, :]
    length_B11 = jnp.max(positions_BT1, axis=1, keepdims=True) + 1
    beyond_B11 = jnp.maximum(length_B11 / scaling.original_length, 1) - 1
    base_B11 = base * (1 + scaling.factor * beyond_B11) ** (half / (half - 1))
    return positions_BT1 * base_B11 ** (-jnp.arange(half, dtype=dtype) / half)[None, None, :]


def _fixed_frequencies(half: int, base: float, scaling: RopeScaling) -> np.ndarray:
    """Returns the frequencies [half] of llama3 and yarn, in float64."""
    index_h = np.arange(half)
    plain_h = float(base) ** (-index_h / half)
    if scaling.kind == 'llama3':
        turns_h = scaling.original_length * plain_h / (2 * math.pi)
        kept_h = (turns_h - scaling.slow_turns) / (scaling.fast_turns - scaling.slow_turns)
    elif scaling.kind == 'yarn':
        first, last = (_index(turns, half, base, scaling) for turns in (scaling.fast_turns, scaling.slow_turns))
        if scaling.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, 2 * half - 1)
        kept_h = 1 - (index_h - first) / (last - first if last != first else 0.001)
    else:
        raise ValueError(f'rope: there is no scaling of kind {scaling.kind!r}')
    kept_h = np.clip(kept_h, 0, 1)
    return plain_h * (kept_h + (1 - kept_h) / scaling.factor)


def _index(turns: float, half: int, base: float, scaling: RopeScaling) -> float:
    """Returns the index, not rounded, of the frequency that makes so many turns in the original length."""
    return half * math.log(scaling.original_length / (2 * math.pi * turns)) / math.log(base)
