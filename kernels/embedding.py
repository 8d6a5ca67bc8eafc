"""The embedding: rows of a table, whose gradient is added up in one order.

A row's gradient is the sum over all positions that read it. If added atomically, as GPUs do, it would
differ between runs in its last digits. Here positions are sorted by token and a scan adds up each
token's segment, so that every row of the table is written once. A CPU adds in order anyway.

Shapes: B batch, T time, M = B x T positions, D model, V rows of the table.
"""

import functools

import jax
import jax.numpy as jnp

from kernels import varying


def embed(table_VD, tokens_BT, *, by_sorting: bool):
    """Returns each token's row, [B, T, D]; zeros for tokens outside [0, V), which another device may own."""
    return _embed(*varying.together(table_VD, tokens_BT), by_sorting)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _embed(table_VD, tokens_BT, by_sorting):
    return _embed_fwd(table_VD, tokens_BT, by_sorting)[0]


def _embed_fwd(table_VD, tokens_BT, by_sorting):
    inside_BT = (tokens_BT >= 0) & (tokens_BT < table_VD.shape[0])
    x_BTD = jnp.where(inside_BT[:, :, None], table_VD[jnp.where(inside_BT, tokens_BT, 0)], 0)
    return x_BTD, (tokens_BT, jnp.zeros_like(table_VD, shape=table_VD.shape[:1]))


def _embed_bwd(by_sorting, residuals, dx_BTD):
    tokens_BT, column_V = residuals  # the column has the table's number of rows and its dtype
    V = column_V.shape[0]
    tokens_M, dx_MD = tokens_BT.reshape(-1), dx_BTD.reshape(-1, dx_BTD.shape[-1]).astype(jnp.float32)
    tokens_M = jnp.where(tokens_M < 0, V, tokens_M)  # V and above are dropped
    zeros_VD = jnp.zeros_like(dx_MD, shape=(V, dx_MD.shape[1]))
    if by_sorting:
        tokens_M, dx_MD = _segment_sums(tokens_M, dx_MD, V)
        dtable_VD = zeros_VD.at[tokens_M].set(dx_MD, mode='drop', unique_indices=True)
    else:
        dtable_VD = zeros_VD.at[tokens_M].add(dx_MD, mode='drop')
    return dtable_VD.astype(column_V.dtype), None


_embed.defvjp(_embed_fwd, _embed_bwd)


def _segment_sums(tokens_M, dx_MD, V: int):
    """Sorts by token; returns (tokens, sums so far). A token is V or above except at the end of its segment."""
    order_M = jnp.argsort(tokens_M)
    tokens_M, dx_MD = tokens_M[order_M], dx_MD[order_M]
    differs_M = tokens_M[1:] != tokens_M[:-1]
    first_M, last_M = (jnp.pad(differs_M, side, constant_values=True) for side in ((1, 0), (0, 1)))

    def add(earlier, later):
        (first_a, sum_a), (first_b, sum_b) = earlier, later
        return first_a | first_b, jnp.where(first_b, sum_b, sum_a + sum_b)

    _, sums_MD = jax.lax.associative_scan(add, (first_M[:, None], dx_MD))
    return jnp.where(last_M & (tokens_M < V), tokens_M, V + jnp.arange(tokens_M.shape[0])), sums_MD
