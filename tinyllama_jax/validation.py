"""Validation loss per source: the same rows at every step and for every seed."""

import numpy as np

from tinyllama_jax.data import pipeline


def losses(eval_step, params, data: pipeline.Dataset, batch: int) -> dict[str, float]:
    """Mean next-token loss, in nats, over each source's validation rows (if it has any), `batch` at a time."""
    found = {}
    for name in data.sources:
        (rows_NR, segment_ids_NR), total = data.validation(name), 0.0
        if not len(rows_NR):  # a source too small to hold a row out, or told to hold none out
            continue
        for start in range(0, len(rows_NR), batch):
            rows_BR, segment_ids_BR = (_part(x_NR, start, batch) for x_NR in (rows_NR, segment_ids_NR))
            weights_B = (np.arange(start, start + batch) < len(rows_NR)).astype(np.float32)
            total += float(eval_step(params, rows_BR, segment_ids_BR, weights_B)) * weights_B.sum()
        found[name] = float(total / len(rows_NR))
    return found


def _part(x_NR: np.ndarray | None, start: int, batch: int) -> np.ndarray | None:
    """`batch` rows from `start` on, the last ones zeros where there are no more."""
    if x_NR is None:
        return None
    x_BR = x_NR[start : start + batch]
    return np.pad(x_BR, ((0, batch - len(x_BR)), (0, 0)))
