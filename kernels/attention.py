"""Causal grouped-query attention as Triton kernels: FlashAttention-2 (Dao, 2023), forward and backward.

The [T, T] scores never exist in memory: each program loops over tiles of keys (or queries) and keeps
a running maximum and sum. The forward pass saves the base-2 log-sum-exp of each row, from which the
backward pass recomputes the weights. It is kept as two terms, the row's maximum and the log of the
sum, because their sum would lose digits where logits are large. A program of the second backward
kernel owns a tile of keys and values and loops over all query heads that read them, so that nothing
is added atomically. The tiles with the most work start first, across all heads: head by head, a few
long tiles would run last while the other multiprocessors wait.

Shapes: B batch, T time (queries and keys alike), N query heads, K key-value heads, G = N / K,
H head dim; lse_BN2T: maximum and log2 of the sum. Query head n reads key-value head n // G. Sizes
are compile-time constants, so that the compiler knows which addresses are aligned.
"""

import functools
import math

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jax.ad_checkpoint import checkpoint_name

from kernels import launch
from kernels.chips import Chip

LOG2_E = 1 / math.log(2)


@triton.jit
def _tile(ptr, rows, ROW: tl.constexpr, H: tl.constexpr, T: tl.constexpr, EVEN: tl.constexpr):
    """Loads rows of one head as a [rows, H] tile; rows from T on are zeros."""
    ptrs = ptr + rows[:, None] * ROW + tl.arange(0, H)[None, :]
    if EVEN:
        return tl.load(ptrs)
    return tl.load(ptrs, mask=rows[:, None] < T, other=0.0)


@triton.jit
def _row_values(ptr, rows, T: tl.constexpr, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(ptr + rows)
    return tl.load(ptr + rows, mask=rows < T, other=0)


@triton.jit
def _visible(queries, keys, query_segments, keys_segments, DIAGONAL: tl.constexpr, SEGMENTS: tl.constexpr):
    """Returns which [queries, keys] pairs attend; called only for tiles in which some may not."""
    if DIAGONAL and SEGMENTS:
        return (queries >= keys) & (query_segments == keys_segments)
    if SEGMENTS:
        return query_segments == keys_segments
    return queries >= keys


@triton.jit
def _visible_keys(
    queries, query_segments, keys, segments_ptr,
    T: tl.constexpr, EVEN: tl.constexpr, DIAGONAL: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """Loads the keys' segments and returns what `_visible` does."""
    key_segments = _row_values(segments_ptr, keys, T, EVEN) if SEGMENTS else keys
    return _visible(queries[:, None], keys[None, :], query_segments[:, None], key_segments[None, :], DIAGONAL, SEGMENTS)


@triton.jit
def _attend(
    out, total, top, q, k_ptr, v_ptr, segments_ptr, queries, query_segments, start, stop,
    SCALE: tl.constexpr, ROW: tl.constexpr, H: tl.constexpr, T: tl.constexpr, EVEN: tl.constexpr,
    DIAGONAL: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Continues the running softmax of a tile of queries over the keys in [start, stop).

    `out` is the unnormalised sum of values, `total` and `top` are each row's sum of weights and maximum.
    """
    for first in tl.range(start, stop, BLOCK):
        keys = tl.multiple_of(first, BLOCK) + tl.arange(0, BLOCK)
        k = _tile(k_ptr, keys, ROW, H, T, EVEN or not DIAGONAL)
        scores = tl.dot(q, tl.trans(k), input_precision='ieee')
        if DIAGONAL or SEGMENTS:
            seen = _visible_keys(queries, query_segments, keys, segments_ptr, T, EVEN, DIAGONAL, SEGMENTS)
            scores = tl.where(seen, scores, -1.0e30)
        new_top = tl.maximum(top, tl.max(scores, 1) * SCALE)
        weights = tl.exp2(scores * SCALE - new_top[:, None])  # one fused multiply-add per element
        if SEGMENTS:  # a row may see no key of the first tiles: its maximum is then still -1e30, and exp2 gives 1
            weights = tl.where(scores > -1.0e30, weights, 0.0)
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        v = _tile(v_ptr, keys, ROW, H, T, EVEN or not DIAGONAL)
        out = tl.dot(weights.to(v.dtype), v, out * shrink[:, None], input_precision='ieee')
        top = new_top
    return out, total, top


@triton.jit
def attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, segments_ptr, out_ptr, lse_ptr,
    T: tl.constexpr, N: tl.constexpr, K: tl.constexpr, H: tl.constexpr, SCALE: tl.constexpr,
    SEGMENTS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Attends with a tile of queries of one head. q, out: [B, T, N, H]; k, v: [B, T, K, H]; lse: [B, N, 2, T].

    SCALE includes log2(e), since weights are powers of 2.
    """
    EVEN: tl.constexpr = T % BLOCK_Q == 0 and T % BLOCK_K == 0
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    b = (tl.program_id(0) // N).to(tl.int64)
    n = tl.program_id(0) % N
    queries = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    k_ptr += (b * T * K + n // (N // K)) * H
    v_ptr += (b * T * K + n // (N // K)) * H
    head = (b * T * N + n) * H
    q = _tile(q_ptr + head, queries, N * H, H, T, EVEN)
    segments_ptr += b * T
    query_segments = _row_values(segments_ptr, queries, T, EVEN) if SEGMENTS else queries
    out = tl.zeros([BLOCK_Q, H], tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    top = tl.full([BLOCK_Q], -1.0e30, tl.float32)
    diagonal = tile * BLOCK_Q // BLOCK_K * BLOCK_K
    out, total, top = _attend(
        out, total, top, q, k_ptr, v_ptr, segments_ptr, queries, query_segments, 0, diagonal,
        SCALE, K * H, H, T, EVEN, False, SEGMENTS, BLOCK_K,
    )  # fmt: skip
    out, total, top = _attend(
        out, total, top, q, k_ptr, v_ptr, segments_ptr, queries, query_segments, diagonal,
        tl.minimum((tile + 1) * BLOCK_Q, T), SCALE, K * H, H, T, EVEN, True, SEGMENTS, BLOCK_K,
    )  # fmt: skip
    out = (out / total[:, None]).to(out_ptr.dtype.element_ty)
    out_ptrs = out_ptr + head + queries[:, None] * (N * H) + tl.arange(0, H)[None, :]
    lse_ptrs = lse_ptr + (b * N + n) * 2 * T + queries
    if EVEN:
        tl.store(out_ptrs, out)
        tl.store(lse_ptrs, top)
        tl.store(lse_ptrs + T, tl.log2(total))
    else:
        tl.store(out_ptrs, out, mask=queries[:, None] < T)
        tl.store(lse_ptrs, top, mask=queries < T)
        tl.store(lse_ptrs + T, tl.log2(total), mask=queries < T)


@triton.jit
def attention_delta_kernel(
    out_ptr, dout_ptr, delta_ptr, T: tl.constexpr, N: tl.constexpr, H: tl.constexpr, BLOCK_Q: tl.constexpr
):
    """Computes delta [B, N, T], the sum of out * dout over H, which the softmax's gradient subtracts from dP.

    Taken from the diagonal of dO·Oᵀ so that it rounds exactly as dP does: with one visible key, dS is exactly 0.
    """
    EVEN: tl.constexpr = T % BLOCK_Q == 0
    b = (tl.program_id(0) // N).to(tl.int64)
    n = tl.program_id(0) % N
    rows = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    head = (b * T * N + n) * H
    out = _tile(out_ptr + head, rows, N * H, H, T, EVEN)
    dout = _tile(dout_ptr + head, rows, N * H, H, T, EVEN)
    pairs = tl.dot(dout, tl.trans(out), input_precision='ieee')
    delta = tl.sum(tl.where(rows[:, None] == rows[None, :], pairs, 0.0), 1)
    tl.store(delta_ptr + (b * N + n) * T + rows, delta, mask=rows < T)


@triton.jit
def _accumulate_dq(
    dq, q, dout, top, log, delta, k_ptr, v_ptr, segments_ptr, queries, query_segments, start, stop,
    SCALE: tl.constexpr, ROW: tl.constexpr, H: tl.constexpr, T: tl.constexpr, EVEN: tl.constexpr,
    DIAGONAL: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds the keys in [start, stop) to dq, unscaled, of a tile of queries."""
    for first in tl.range(start, stop, BLOCK):
        keys = tl.multiple_of(first, BLOCK) + tl.arange(0, BLOCK)
        k = _tile(k_ptr, keys, ROW, H, T, EVEN or not DIAGONAL)
        v = _tile(v_ptr, keys, ROW, H, T, EVEN or not DIAGONAL)
        weights = tl.exp2(tl.dot(q, tl.trans(k), input_precision='ieee') * SCALE - top[:, None] - log[:, None])
        if DIAGONAL or SEGMENTS:
            seen = _visible_keys(queries, query_segments, keys, segments_ptr, T, EVEN, DIAGONAL, SEGMENTS)
            weights = tl.where(seen, weights, 0.0)
        dscores = weights * (tl.dot(dout, tl.trans(v), input_precision='ieee') - delta[:, None])
        dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision='ieee')
    return dq


@triton.jit
def attention_dq_kernel(
    q_ptr, k_ptr, v_ptr, segments_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr,
    T: tl.constexpr, N: tl.constexpr, K: tl.constexpr, H: tl.constexpr,
    SCALE: tl.constexpr, GRADIENT_SCALE: tl.constexpr, SEGMENTS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Computes dq of a tile of queries of one head; shapes as in `attention_forward_kernel`."""
    EVEN: tl.constexpr = T % BLOCK_Q == 0 and T % BLOCK_K == 0
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    b = (tl.program_id(0) // N).to(tl.int64)
    n = tl.program_id(0) % N
    queries = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    k_ptr += (b * T * K + n // (N // K)) * H
    v_ptr += (b * T * K + n // (N // K)) * H
    head = (b * T * N + n) * H
    q = _tile(q_ptr + head, queries, N * H, H, T, EVEN)
    dout = _tile(dout_ptr + head, queries, N * H, H, T, EVEN)
    lse_ptr += (b * N + n) * 2 * T
    top = _row_values(lse_ptr, queries, T, EVEN)
    log = _row_values(lse_ptr + T, queries, T, EVEN)
    delta = _row_values(delta_ptr + (b * N + n) * T, queries, T, EVEN)
    segments_ptr += b * T
    query_segments = _row_values(segments_ptr, queries, T, EVEN) if SEGMENTS else queries
    dq = tl.zeros([BLOCK_Q, H], tl.float32)
    diagonal = tile * BLOCK_Q // BLOCK_K * BLOCK_K
    dq = _accumulate_dq(
        dq, q, dout, top, log, delta, k_ptr, v_ptr, segments_ptr, queries, query_segments, 0, diagonal,
        SCALE, K * H, H, T, EVEN, False, SEGMENTS, BLOCK_K,
    )  # fmt: skip
    dq = _accumulate_dq(
        dq, q, dout, top, log, delta, k_ptr, v_ptr, segments_ptr, queries, query_segments, diagonal,
        tl.minimum((tile + 1) * BLOCK_Q, T), SCALE, K * H, H, T, EVEN, True, SEGMENTS, BLOCK_K,
    )  # fmt: skip
    dq_ptrs = dq_ptr + head + queries[:, None] * (N * H) + tl.arange(0, H)[None, :]
    dq = (dq * GRADIENT_SCALE).to(dq_ptr.dtype.element_ty)
    if EVEN:
        tl.store(dq_ptrs, dq)
    else:
        tl.store(dq_ptrs, dq, mask=queries[:, None] < T)


@triton.jit
def _accumulate_dkv(
    dk, dv, k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, segments_ptr, keys, key_segments, start, count,
    SCALE: tl.constexpr, ROW: tl.constexpr, H: tl.constexpr, T: tl.constexpr, EVEN: tl.constexpr,
    DIAGONAL: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds `count` tiles of one head's queries, from `start` on, to dk (unscaled) and dv of a tile of keys.

    Scores are transposed, [keys, queries]. Pointers are incremented, which takes fewer registers than computing them.
    """
    queries = start + tl.arange(0, BLOCK)
    q_ptrs = q_ptr + queries[:, None] * ROW + tl.arange(0, H)[None, :]
    dout_ptrs = dout_ptr + queries[:, None] * ROW + tl.arange(0, H)[None, :]
    lse_ptrs = lse_ptr + queries
    delta_ptrs = delta_ptr + queries
    for _ in tl.range(0, count):
        if EVEN:
            q = tl.load(q_ptrs)
            top = tl.load(lse_ptrs)
            log = tl.load(lse_ptrs + T)
        else:
            q = tl.load(q_ptrs, mask=queries[:, None] < T, other=0.0)
            top = tl.load(lse_ptrs, mask=queries < T, other=0.0)
            log = tl.load(lse_ptrs + T, mask=queries < T, other=0.0)
        weights = tl.exp2(tl.dot(k, tl.trans(q), input_precision='ieee') * SCALE - top[None, :] - log[None, :])
        if DIAGONAL or SEGMENTS:
            query_segments = _row_values(segments_ptr, queries, T, EVEN) if SEGMENTS else queries
            seen = _visible(
                queries[None, :], keys[:, None], query_segments[None, :], key_segments[:, None], DIAGONAL, SEGMENTS
            )
            weights = tl.where(seen, weights, 0.0)
        if EVEN:
            dout = tl.load(dout_ptrs)
            delta = tl.load(delta_ptrs)
        else:  # dout is zero for queries from T on, so that their weights add nothing
            dout = tl.load(dout_ptrs, mask=queries[:, None] < T, other=0.0)
            delta = tl.load(delta_ptrs, mask=queries < T, other=0.0)
        dv = tl.dot(weights.to(dout.dtype), dout, dv, input_precision='ieee')
        dscores = weights * (tl.dot(v, tl.trans(dout), input_precision='ieee') - delta[None, :])
        dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision='ieee')
        q_ptrs += BLOCK * ROW
        dout_ptrs += BLOCK * ROW
        lse_ptrs += BLOCK
        delta_ptrs += BLOCK
        if DIAGONAL or SEGMENTS or not EVEN:
            queries += BLOCK
    return dk, dv


@triton.jit
def attention_dkv_kernel(
    q_ptr, k_ptr, v_ptr, segments_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    T: tl.constexpr, N: tl.constexpr, K: tl.constexpr, H: tl.constexpr,
    SCALE: tl.constexpr, GRADIENT_SCALE: tl.constexpr, SEGMENTS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Computes dk and dv of a tile of keys, from all query heads of its group; BLOCK_Q divides BLOCK_K."""
    EVEN: tl.constexpr = T % BLOCK_Q == 0 and T % BLOCK_K == 0
    G: tl.constexpr = N // K
    DIAGONAL_TILES: tl.constexpr = BLOCK_K // BLOCK_Q
    start = tl.program_id(1) * BLOCK_K
    b = (tl.program_id(0) // K).to(tl.int64)
    kv_head = tl.program_id(0) % K
    keys = start + tl.arange(0, BLOCK_K)
    head = (b * T * K + kv_head) * H
    k = _tile(k_ptr + head, keys, K * H, H, T, EVEN)
    v = _tile(v_ptr + head, keys, K * H, H, T, EVEN)
    segments_ptr += b * T
    key_segments = _row_values(segments_ptr, keys, T, EVEN) if SEGMENTS else keys
    dk = tl.zeros([BLOCK_K, H], tl.float32)
    dv = tl.zeros([BLOCK_K, H], tl.float32)
    rest = tl.cdiv(tl.maximum(T - start - BLOCK_K, 0), BLOCK_Q)
    for g in tl.range(0, G):
        n = kv_head * G + g
        query_head = (b * T * N + n) * H
        row = (b * N + n) * T
        dk, dv = _accumulate_dkv(
            dk, dv, k, v, q_ptr + query_head, dout_ptr + query_head, lse_ptr + 2 * row, delta_ptr + row, segments_ptr,
            keys, key_segments, start, DIAGONAL_TILES, SCALE, N * H, H, T, EVEN, True, SEGMENTS, BLOCK_Q,
        )  # fmt: skip
        dk, dv = _accumulate_dkv(
            dk, dv, k, v, q_ptr + query_head, dout_ptr + query_head, lse_ptr + 2 * row, delta_ptr + row, segments_ptr,
            keys, key_segments, start + BLOCK_K, rest, SCALE, N * H, H, T, EVEN, False, SEGMENTS, BLOCK_Q,
        )  # fmt: skip
    kv_offsets = head + keys[:, None] * (K * H) + tl.arange(0, H)[None, :]
    dk = (dk * GRADIENT_SCALE).to(dk_ptr.dtype.element_ty)
    dv = dv.to(dv_ptr.dtype.element_ty)
    if EVEN:
        tl.store(dk_ptr + kv_offsets, dk)
        tl.store(dv_ptr + kv_offsets, dv)
    else:
        tl.store(dk_ptr + kv_offsets, dk, mask=keys[:, None] < T)
        tl.store(dv_ptr + kv_offsets, dv, mask=keys[:, None] < T)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attention(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, chip: Chip):
    """Returns causal attention, scaled by 1 / sqrt(H), on one device; as `reference.attention`.

    The output and the log-sum-exp are named 'attention_out' and 'attention_lse'. A remat policy that keeps
    these does not run the forward kernel again.
    """
    return _forward(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, chip)[0]


def _like(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _sizes(q_BTNH, k_BTKH, segment_ids_BT) -> dict:
    _, T, N, H = q_BTNH.shape
    scale = H**-0.5 * LOG2_E
    return {'T': T, 'N': N, 'K': k_BTKH.shape[2], 'H': H, 'SCALE': scale, 'SEGMENTS': segment_ids_BT is not None}


def _forward(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, chip):
    B, T, N, H = q_BTNH.shape
    tile = chip.attention_tile('attention_forward', q_BTNH.dtype.name, H, segments=segment_ids_BT is not None)
    segments = q_BTNH if segment_ids_BT is None else segment_ids_BT  # without SEGMENTS any array: it is not read
    return launch.call(
        chip,
        attention_forward_kernel,
        (q_BTNH, k_BTKH, v_BTKH, segments),
        (_like(q_BTNH), jax.ShapeDtypeStruct((B, N, 2, T), jnp.float32)),
        grid=(B * N, -(-T // tile.sizes['BLOCK_Q'])),
        tile=tile,
        **_sizes(q_BTNH, k_BTKH, segment_ids_BT),
    )


def _attention_fwd(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, chip):
    out_BTNH, lse_BN2T = _forward(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, chip)
    out_BTNH = checkpoint_name(out_BTNH, 'attention_out')
    lse_BN2T = checkpoint_name(lse_BN2T, 'attention_lse')
    return out_BTNH, (q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, out_BTNH, lse_BN2T)


def _attention_bwd(chip, residuals, dout_BTNH):
    q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, out_BTNH, lse_BN2T = residuals
    B, T, N, H = q_BTNH.shape
    delta_tile = chip.streaming['attention_delta']
    (delta_BNT,) = launch.call(
        chip,
        attention_delta_kernel,
        (out_BTNH, dout_BTNH),
        (jax.ShapeDtypeStruct((B, N, T), jnp.float32),),
        grid=(B * N, -(-T // delta_tile.sizes['BLOCK_Q'])),
        tile=delta_tile,
        T=T,
        N=N,
        H=H,
    )
    segments = q_BTNH if segment_ids_BT is None else segment_ids_BT
    inputs = (q_BTNH, k_BTKH, v_BTKH, segments, dout_BTNH, lse_BN2T, delta_BNT)
    sizes = _sizes(q_BTNH, k_BTKH, segment_ids_BT) | {'GRADIENT_SCALE': H**-0.5}

    def call(name, kernel, outputs, heads, block):
        tile = chip.attention_tile(name, q_BTNH.dtype.name, H, segments=segment_ids_BT is not None)
        grid = (B * heads, -(-T // tile.sizes[block]))
        return launch.call(chip, kernel, inputs, tuple(map(_like, outputs)), grid=grid, tile=tile, **sizes)

    (dq_BTNH,) = call('attention_dq', attention_dq_kernel, (q_BTNH,), N, 'BLOCK_Q')
    dk_BTKH, dv_BTKH = call('attention_dkv', attention_dkv_kernel, (k_BTKH, v_BTKH), k_BTKH.shape[2], 'BLOCK_K')
    return dq_BTNH, dk_BTKH, dv_BTKH, None


attention.defvjp(_attention_fwd, _attention_bwd)
