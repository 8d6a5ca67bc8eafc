"""Validation over rows that do not fill the last batch, and a source without any."""

import numpy as np
import pytest

from tinyllama_jax import validation


class Rows:
    """Two sources; a row's loss, by the step below, is its first token."""

    sources = ('some', 'none')

    def validation(self, source):
        return np.arange(20, dtype=np.uint16).reshape(10, 2) if source == 'some' else np.zeros((0, 2), np.uint16)


@pytest.mark.parametrize('batch', [1, 4, 10, 16])
def test_the_mean_over_rows_does_not_depend_on_the_batch(batch):
    def eval_step(params, rows_BR, weights_B):
        assert rows_BR.shape == (batch, 2)
        return (rows_BR[:, 0] * weights_B).sum() / weights_B.sum() + params

    assert validation.losses(eval_step, 0.5, Rows(), batch) == {'some': pytest.approx(9.5)}
