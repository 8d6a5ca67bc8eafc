"""Validation loss per source: the same rows at every step and for every seed."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from tinyllama_jax.data import pipeline


def losses(
    eval_step: Callable,
    params: Any,
    data: pipeline.Dataset,
    batch: int,
    *,
    columns: slice = slice(None),
    put: Callable[[Any], Any] = jax.device_put,
) -> dict[str, float]:
    """Returns the mean next-token loss, in nats, over each source's validation rows, `batch` at a time.

    Each of several processes reads only its `columns` of a batch. `put` turns what they read into global arrays.
    """
    means = {}
    first, last, _ = columns.indices(batch)
    for name in data.sources:
        size, total = data.validation_size(name), 0.0
        for start in range(0, size, batch):
            rows_NR, segment_ids_NR = data.validation(name, slice(start + first, start + last))
            # The last batch is filled up with rows of zeros, whose weight is 0.
            pad = functools.partial(np.pad, pad_width=((0, last - first - len(rows_NR)), (0, 0)))
            rows_BR, segment_ids_BR = jax.tree.map(pad, (rows_NR, segment_ids_NR))
            weights_B = (np.arange(start + first, start + last) < size).astype(np.float32)
            loss = eval_step(params, *put((rows_BR, segment_ids_BR, weights_B)))
            total += float(jax.device_get(loss)) * min(batch, size - start)
        if size:
            means[name] = total / size
    return means
