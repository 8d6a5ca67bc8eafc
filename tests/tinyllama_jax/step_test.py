"""The train step: a loss snapshot for both stacks, accumulation, remat, document masks, one compilation."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.support import tiny
from tinyllama_jax import sharding
from tinyllama_jax import step as step_lib
from tinyllama_jax.config import MeshConfig

# Recorded once on jax 0.10.2; a change of these numbers is a change of the mathematics.
SNAPSHOT = (
    4.164623, 4.164011, 4.134698, 4.050786, 4.000085, 3.835012, 3.702057, 3.503018, 3.350966, 3.209358,
    3.029377, 2.940595, 2.753892, 2.723890, 2.617796, 2.538331, 2.527893, 2.424581, 2.467284, 2.414994,
)  # fmt: skip


def _run(config, batches, *, masked=False):
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    state, train_step = step_lib.init_state(config, mesh), step_lib.jit_train_step(config, mesh)
    scalars = []
    for rows_ABR in batches:
        state, step_scalars = train_step(state, rows_ABR, tiny.segment_ids(rows_ABR) if masked else None)
        scalars.append(jax.tree.map(float, step_scalars))
    return state, scalars, train_step


def _changed(**fields):
    model = {name: fields.pop(name) for name in ('scan_layers',) if name in fields}
    data = {name: fields.pop(name) for name in ('document_mask', 'restart_positions') if name in fields}
    return dataclasses.replace(
        tiny.CONFIG,
        model=dataclasses.replace(tiny.CONFIG.model, **model),
        data=dataclasses.replace(tiny.CONFIG.data, **data),
        train=dataclasses.replace(tiny.CONFIG.train, **fields),
    )


def test_twenty_losses_equal_the_snapshot():
    _, scalars, train_step = _run(tiny.CONFIG, tiny.batches(20))
    np.testing.assert_allclose([step['loss'] for step in scalars], SNAPSHOT, atol=1e-4, rtol=0)
    assert train_step._cache_size() == 1, 'the step was compiled more than once'


def test_step_counts_and_reports_the_rate_it_used():
    state, scalars, _ = _run(tiny.CONFIG, tiny.batches(3))
    assert int(state.step) == 3
    assert [step['learning_rate'] for step in scalars] == pytest.approx([0.0, 2e-3, 4e-3])


def test_accumulation_changes_nothing_but_rounding():
    masks = {'document_mask': True, 'restart_positions': True}
    _, whole, _ = _run(_changed(**masks), tiny.batches(5), masked=True)
    _, parts, _ = _run(_changed(**masks, micro_batch_size=2), tiny.batches(5, accumulation=4), masked=True)
    assert abs(whole[4]['loss'] - SNAPSHOT[4]) > 1e-3, 'masks that change nothing would show nothing'
    for name in ('loss', 'grad_norm'):
        np.testing.assert_allclose([s[name] for s in parts], [s[name] for s in whole], rtol=1e-5)


@pytest.mark.parametrize(
    'fields', [{'remat': 'full'}, {'remat': 'names'}, {'scan_layers': False}, {'scan_layers': False, 'remat': 'full'}]
)
def test_remat_and_unrolling_change_nothing_but_rounding(fields):
    _, expected, _ = _run(tiny.CONFIG, tiny.batches(5))
    _, got, _ = _run(_changed(**fields), tiny.batches(5))
    np.testing.assert_allclose([s['loss'] for s in got], [s['loss'] for s in expected], rtol=1e-6)


def test_eval_step_ignores_padding_rows():
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    params = step_lib.init_state(tiny.CONFIG, mesh).params
    eval_step = step_lib.jit_eval_step(tiny.CONFIG, mesh)
    rows_BR = tiny.batches(1)[0][0]
    padded_BR = np.concatenate([rows_BR[:5], np.zeros_like(rows_BR[5:])])
    alone = [float(eval_step(params, np.repeat(row[None], 8, 0), None, np.ones(8, np.float32))) for row in rows_BR[:5]]
    weights_B = np.array([1, 1, 1, 1, 1, 0, 0, 0], np.float32)
    assert float(eval_step(params, padded_BR, None, weights_B)) == pytest.approx(np.mean(alone), rel=1e-5)


def test_positions_count_from_the_start_of_each_segment():
    segment_ids_BT = np.array([[0, 0, 0, 1, 1, 2], [0, 1, 2, 2, 2, 2], [0, 0, 0, 0, 0, 0]])
    expected = [[0, 1, 2, 0, 1, 0], [0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]]
    assert step_lib._restarted_positions(segment_ids_BT).tolist() == expected
