"""Packs continuations that share a context into rows, so that the context is read once.

A tree is a context (its trunk) with its continuations (its branches). A row of tokens holds several trees, one after
the other. A token sees the earlier tokens of its own branch and its own trunk, and the positions of a branch count on
from the trunk, so each branch is read as if it stood alone. Nothing is computed twice, little is padding, and requests
of all lengths up to `ROW` share one compiled program.

Shapes: B rows, T positions of a row, P predictions, D model, N query heads, K key-value heads, G = N / K, H head dim,
R = G x queries of a block, S keys.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from tinyllama_jax import generate
from tinyllama_jax import ops as ops_lib

ROW = 512  # positions of a row; longer trees have longer rows
_SMALLEST = 64
_QUERY_BLOCK = 128
_MOST_BRANCHES = 1 << 10  # in a tree; a branch id is (number of the tree) x this + (number of the branch, 0: trunk)
_MASKED = -1e30

Request = tuple[list[int], list[int]]  # context ids, at least one; continuation ids


@dataclasses.dataclass(frozen=True)
class Tree:
    """A context with its continuations: for each the index of its request, and its ids."""

    trunk: list[int]
    branches: list[tuple[int, list[int]]]

    @property
    def size(self) -> int:
        """How many tokens are read: all but the last of each continuation."""
        return len(self.trunk) + sum(len(ids) - 1 for _, ids in self.branches)

    @property
    def predictions(self) -> int:
        """How many tokens are scored."""
        return sum(len(ids) for _, ids in self.branches)


@dataclasses.dataclass(frozen=True)
class Batch:
    """The arrays of one call: the tokens to read, and the tokens to predict.

    Attributes:
      tokens_BT, positions_BT, branch_ids_BT: int32; branch id 0 is padding.
      indices_P: where each prediction is made, as row x T + column.
      targets_P: the token to predict there.
      spans: index of a request -> its continuation's slice of the predictions.
    """

    tokens_BT: np.ndarray
    positions_BT: np.ndarray
    branch_ids_BT: np.ndarray
    indices_P: np.ndarray
    targets_P: np.ndarray
    spans: dict[int, slice]


def make_trees(requests: Sequence[Request], longest: int) -> list[Tree]:
    """Returns a tree for each context, and several for one whose tree would have more than `longest` tokens."""
    by_context = defaultdict(list)
    for number, (context, continuation) in enumerate(requests):
        by_context[tuple(context)].append((number, continuation))
    trees = []
    for context, branches in by_context.items():
        tree = Tree(list(context), [])
        for branch in branches:
            grown = Tree(tree.trunk, [*tree.branches, branch])
            too_long = max(grown.size, grown.predictions) > longest
            if tree.branches and (too_long or len(grown.branches) >= _MOST_BRANCHES):
                trees.append(tree)
                grown = Tree(tree.trunk, [branch])
            tree = grown
        trees.append(tree)
    return trees


def make_batches(trees: Sequence[Tree], most_tokens: int, multiple: int = 1) -> Iterator[Batch]:
    """Packs trees into batches, the longest first.

    A batch has at most `most_tokens` positions, and a number of rows that is a multiple of `multiple`. The last batch
    of a length is smaller and has one of a few sizes: that costs one more program and saves padding.
    """
    by_length = defaultdict(list)
    for tree in sorted(trees, key=lambda tree: -tree.size):
        by_length[max(ROW, padded_length(max(tree.size, tree.predictions)))].append(tree)
    for T, group in by_length.items():
        rows, most = _pack(group, T), _rounded_up(max(1, most_tokens // T), multiple)
        quarter = _rounded_up(-(-most // 4), multiple)
        for start in range(0, len(rows), most):
            part = rows[start : start + most]
            power = _rounded_up(1 << (len(part) - 1).bit_length(), multiple)
            yield _batch(part, min(most, power, _rounded_up(len(part), quarter)), T)


def _rounded_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def padded_length(length: int) -> int:
    """Returns the smallest of 64 times 1, 2, 3, 4, 6, 8, 12, ... that is at least `length`."""
    return generate.padded_length(length, smallest=_SMALLEST)


def _pack(trees: Sequence[Tree], T: int) -> list[list[Tree]]:
    """Packs trees, sorted from the longest to the shortest, into rows of T positions by first fit."""
    rows: list[list[Tree]] = []
    room: list[tuple[int, int]] = []  # tokens and predictions that still fit into each row
    first = 0  # earlier rows are all but full; skipping them keeps this fast
    for tree in trees:
        need = tree.size, tree.predictions
        fitting = (i for i in range(first, len(rows)) if room[i][0] >= need[0] and room[i][1] >= need[1])
        row = next(fitting, len(rows))
        if row == len(rows):
            rows.append([])
            room.append((T, T))
        rows[row].append(tree)
        room[row] = (room[row][0] - need[0], room[row][1] - need[1])
        while first < len(rows) and min(room[first]) < _SMALLEST // 2:
            first += 1
    return rows


def _batch(rows: Sequence[Sequence[Tree]], B: int, T: int) -> Batch:
    """Writes each row's trees one after the other, each as its trunk and then its branches."""
    tokens_BT, positions_BT, branch_ids_BT = np.zeros((3, B, T), np.int32)
    indices_P, targets_P = np.zeros((2, B * T), np.int32)
    spans, indices, targets = {}, [], []
    for row, trees in enumerate(rows):
        tokens, positions, branch_ids = [], [], []
        for number, tree in enumerate(trees, start=1):
            length, trunk_id = len(tree.trunk), number * _MOST_BRANCHES
            tokens += tree.trunk
            positions += range(length)
            branch_ids += [trunk_id] * length
            end_of_trunk = row * T + len(tokens) - 1  # here the first token of every continuation is predicted
            for branch, (request, ids) in enumerate(tree.branches, start=1):
                begin, count = row * T + len(tokens), len(ids) - 1  # the last token is predicted, not read
                spans[request] = slice(len(targets), len(targets) + len(ids))
                indices += [end_of_trunk, *range(begin, begin + count)]
                targets += ids
                tokens += ids[:count]
                positions += range(length, length + count)
                branch_ids += [trunk_id + branch] * count
        read = row, slice(len(tokens))
        tokens_BT[read], positions_BT[read], branch_ids_BT[read] = tokens, positions, branch_ids
    indices_P[: len(indices)], targets_P[: len(targets)] = indices, targets
    return Batch(tokens_BT, positions_BT, branch_ids_BT, indices_P, targets_P, spans)


class BranchOps(ops_lib.Ops):
    """The ops of a model whose attention follows branches; it takes a batch's branch ids as segment ids."""

    def attention(self, q_BTNH, k_BTKH, v_BTKH, *, segment_ids_BT=None):
        """Returns grouped-query attention [B, T, N, H] of each token to its own branch and trunk."""
        return self._on_each_device('attention', attention, q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)


def make_ops(mesh) -> BranchOps:
    """Returns plain JAX's ops, which take any head dim, on `mesh` or the default device."""
    plain = ops_lib.make_ops(ops_lib.PLAIN, mesh)
    return BranchOps(**{field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)})


def attention(q_BTNH, k_BTKH, v_BTKH, branch_ids_BT):
    """Returns attention of each token to itself and the earlier ones of its branch and trunk, by blocks of queries."""
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    q_BKGTH = (q_BTNH * H**-0.5).reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    kt_BKHS, v_BKSH = k_BTKH.transpose(0, 2, 3, 1), v_BTKH.swapaxes(1, 2)
    outs = []
    for start in range(0, T, _QUERY_BLOCK):
        stop = min(start + _QUERY_BLOCK, T)
        mask_BTS = _visible(branch_ids_BT, start, stop)
        q_BKRH = q_BKGTH[:, :, :, start:stop].reshape(B, K, -1, H)
        scores_BKRS = jnp.matmul(q_BKRH, kt_BKHS[..., :stop], preferred_element_type=jnp.float32)
        scores_BKGTS = scores_BKRS.reshape(B, K, N // K, stop - start, stop)
        weights_BKGTS = jax.nn.softmax(jnp.where(mask_BTS[:, None, None], scores_BKGTS, _MASKED), axis=-1)
        weights_BKRS = weights_BKGTS.reshape(scores_BKRS.shape).astype(v_BTKH.dtype)
        out_BKRH = jnp.matmul(weights_BKRS, v_BKSH[:, :, :stop])
        outs.append(out_BKRH.reshape(B, K, N // K, stop - start, H))
    return jnp.concatenate(outs, axis=3).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def _visible(branch_ids_BT, start: int, stop: int):
    """Returns bools [B, queries, keys]: whether the queries `start` to `stop` see each key before `stop`."""
    own_BT1, keys_B1S = branch_ids_BT[:, start:stop, None], branch_ids_BT[:, None, :stop]
    trunk_BT1 = own_BT1 - own_BT1 % _MOST_BRANCHES
    before_TS = jnp.arange(start, stop)[:, None] >= jnp.arange(stop)[None, :]
    return before_TS[None] & ((keys_B1S == own_BT1) | (keys_B1S == trunk_BT1))
