"""Trees of continuations: packing, what each token sees, attention equal to that of each branch alone."""

import jax
import numpy as np
import pytest

from eval_bridge import branches

ROWS = [([5, 6, 7], [8, 9]), ([5, 6, 7], [10]), ([1], [2, 3, 4]), ([5, 6, 7], [8, 11, 12])]


def test_padded_lengths_are_few():
    lengths = {branches.padded_length(length) for length in range(2_049)}
    assert lengths == {64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048}


def test_a_context_is_the_trunk_of_its_continuations():
    first, second = branches.make_trees(ROWS, 64)
    assert (first.trunk, [number for number, _ in first.branches]) == ([5, 6, 7], [0, 1, 3])
    assert (first.size, first.predictions) == (3 + 1 + 0 + 2, 2 + 1 + 3)
    assert (second.trunk, second.branches) == ([1], [(2, [2, 3, 4])])


def test_a_tree_is_divided_where_it_is_too_long():
    sizes = [
        (tree.size, [number for number, _ in tree.branches]) for tree in branches.make_trees(ROWS[:2] + ROWS[3:], 5)
    ]
    assert sizes == [(4, [0, 1]), (5, [2])]


def test_a_batch_says_which_tokens_are_read_and_which_are_predicted_where():
    (batch,) = branches.make_batches(branches.make_trees(ROWS, 64), 4 * branches.ROW)
    assert batch.tokens_BT.shape == (1, branches.ROW)
    # The tree of three branches, then that of one.
    assert batch.tokens_BT[0, :9].tolist() == [5, 6, 7, 8, 8, 11, 1, 2, 3]
    assert batch.positions_BT[0, :9].tolist() == [0, 1, 2, 3, 3, 4, 0, 1, 2]
    W = branches._MOST_BRANCHES
    ids = [W, W, W, W + 1, W + 3, W + 3, 2 * W, 2 * W + 1, 2 * W + 1, 0]
    assert batch.branch_ids_BT[0, :10].tolist() == ids
    predictions = {
        n: (batch.indices_P[span].tolist(), batch.targets_P[span].tolist()) for n, span in batch.spans.items()
    }
    assert predictions == {0: ([2, 3], [8, 9]), 1: ([2], [10]), 3: ([2, 4, 5], [8, 11, 12]), 2: ([6, 7, 8], [2, 3, 4])}


def _random_rows(count, longest, rng):
    return [
        (rng.integers(1, 50, rng.integers(1, longest)).tolist(), rng.integers(1, 50, rng.integers(1, 9)).tolist())
        for _ in range(count)
    ]


@pytest.mark.parametrize('multiple', [1, 3])
def test_every_request_is_in_one_batch_and_little_is_padding(multiple):
    rows = _random_rows(400, 700, np.random.default_rng(0))
    batches = list(branches.make_batches(branches.make_trees(rows, 768), 8 * branches.ROW, multiple))
    assert sorted(number for batch in batches for number in batch.spans) == list(range(400))
    for batch in batches:
        B, T = batch.tokens_BT.shape
        assert B % multiple == 0 and batch.indices_P.shape == (B * T,)
        assert len(batch.tokens_BT) <= 8 * branches.ROW // T + multiple
        for number, span in batch.spans.items():
            context, continuation = rows[number]
            first = batch.indices_P[span][0]
            assert batch.targets_P[span].tolist() == continuation
            assert batch.tokens_BT.flat[first - len(context) + 1 : first + 1].tolist() == context
    shapes = {batch.tokens_BT.shape for batch in batches}
    assert len(shapes) <= 4 and {T for _, T in shapes} <= {branches.ROW, 768}
    short = [batch for batch in batches if batch.tokens_BT.shape[1] == branches.ROW]
    assert np.mean([batch.branch_ids_BT > 0 for batch in short[:-1]]) > 0.9


def test_attention_equals_that_of_each_branch_alone():
    rng = np.random.default_rng(0)
    (batch,) = branches.make_batches(branches.make_trees([*ROWS, *_random_rows(6, 90, rng)], 512), branches.ROW)
    B, T = batch.tokens_BT.shape
    q_BTNH, k_BTKH, v_BTKH = (rng.normal(size=(B, T, n, 8)).astype(np.float32) for n in (4, 2, 2))
    out_TNH = np.asarray(jax.jit(branches.attention)(q_BTNH, k_BTKH, v_BTKH, batch.branch_ids_BT))[0]
    ids_T = batch.branch_ids_BT[0]
    for branch in np.unique(ids_T[ids_T > 0]):
        trunk = branch - branch % branches._MOST_BRANCHES
        positions = np.flatnonzero((ids_T == branch) | (ids_T == trunk))
        alone = _attention(*(x[0, positions] for x in (q_BTNH, k_BTKH, v_BTKH)))
        own = ids_T[positions] == branch
        np.testing.assert_allclose(out_TNH[positions[own]], alone[own], atol=2e-6)


def _attention(q_TNH, k_TKH, v_TKH):
    """Returns the causal attention of one sequence, in float64."""
    k_TNH, v_TNH = (x.repeat(q_TNH.shape[1] // x.shape[1], axis=1).astype(np.float64) for x in (k_TKH, v_TKH))
    scores_NTS = np.einsum('tnh,snh->nts', q_TNH, k_TNH) / q_TNH.shape[2] ** 0.5
    weights_NTS = np.tril(np.exp(scores_NTS))
    return np.einsum('nts,snh->tnh', weights_NTS / weights_NTS.sum(-1, keepdims=True), v_TNH)
