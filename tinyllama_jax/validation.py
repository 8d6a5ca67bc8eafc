"""Validation loss per source: the same rows at every step and for every seed."""

import numpy as np

from tinyllama_jax.data import pipeline


def losses(eval_step, params, data: pipeline.Dataset, batch: int) -> dict[str, float]:
    """Mean next-token loss, in nats, over each source's validation rows (if it has any), `batch` at a time."""
    found = {}
    for name in data.sources:
        rows_NR, total = data.validation(name), 0.0
        if not len(rows_NR):  # a source too small to hold a row out, or told to hold none out
            continue
        for start in range(0, len(rows_NR), batch):
            rows_BR, weights_B = _padded(rows_NR[start : start + batch], batch)
            total += float(eval_step(params, rows_BR, weights_B)) * weights_B.sum()
        found[name] = float(total / len(rows_NR))
    return found


def _padded(rows_BR: np.ndarray, batch: int) -> tuple[np.ndarray, np.ndarray]:
    missing = batch - len(rows_BR)
    weights_B = np.concatenate([np.ones(len(rows_BR), np.float32), np.zeros(missing, np.float32)])
    return np.pad(rows_BR, ((0, missing), (0, 0))), weights_B
