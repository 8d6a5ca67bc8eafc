"""Validation over rows that do not fill the last batch, and a source without any."""

import numpy as np
import pytest

from tinyllama_jax.run import validation


class Rows:
    """Two sources. By the steps below a row's loss is its first token; `masked` adds 100 times its last segment id."""

    sources = ('some', 'none')

    def __init__(self, *, masked=False):
        self.masked = masked

    def validation_size(self, source):
        return 10 if source == 'some' else 0

    def validation(self, source, chosen):
        assert source == 'some'
        rows_NR = np.arange(20, dtype=np.uint16).reshape(10, 2)[chosen]
        return rows_NR, rows_NR * np.array([0, 1], np.uint16) // 10 if self.masked else None


@pytest.mark.parametrize('batch', [1, 4, 10, 16])
def test_the_mean_over_rows_does_not_depend_on_the_batch(batch):
    def eval_step(params, rows_BR, segment_ids_BR, weights_B):
        assert rows_BR.shape == (batch, 2)
        assert segment_ids_BR is None
        return (rows_BR[:, 0].astype(weights_B.dtype) * weights_B).sum() / weights_B.sum() + params

    assert validation.losses(eval_step, 0.5, Rows(), batch) == {'some': pytest.approx(9.5)}


@pytest.mark.parametrize('batch', [4, 16])
def test_segment_ids_go_with_their_rows(batch):
    def eval_step(params, rows_BR, segment_ids_BR, weights_B):
        assert segment_ids_BR.shape == (batch, 2)
        losses_B = (rows_BR[:, 0] + 100 * segment_ids_BR[:, 1]).astype(weights_B.dtype)
        return (losses_B * weights_B).sum() / weights_B.sum()

    assert validation.losses(eval_step, None, Rows(masked=True), batch) == {'some': pytest.approx(9 + 50)}


@pytest.mark.parametrize('columns', [slice(0, 4), slice(4, 8)])
def test_a_process_reads_its_columns_only(columns):
    def eval_step(params, rows_BR, segment_ids_BR, weights_B):
        read.extend(rows_BR[weights_B > 0, 0])
        assert rows_BR.shape == (4, 2)
        return 1.0

    read = []
    assert validation.losses(eval_step, None, Rows(), 8, columns=columns) == {'some': 1.0}
    numbers = [number for number in range(10) if columns.start <= number % 8 < columns.stop]
    assert read == [2 * number for number in numbers]
