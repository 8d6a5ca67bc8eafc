"""Benchmarks the fused ops against memory bandwidth, and the loss.

Every implementation is compared with plain JAX in float32 at the highest precision before it is timed.

Shapes: B batch, T time, D model, N query heads, H head dim, F feed-forward, V vocabulary.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from bench.gpu import benchmark
from kernels import chips, dispatch, launch, reference
from kernels.chips import Tile

# Kernel in `launch`'s table -> its op, the pass, and the tiles to try.
ROW_TILES = {
    'rms_norm_forward': ('rms_norm + residual', 'forward', [Tile({}, warps) for warps in (1, 2, 4, 8)]),
    'rms_norm_backward': (
        'rms_norm + residual', 'backward',
        [Tile({}, warps, programs=programs) for warps, programs in itertools.product((4, 8), (2, 4, 8))],
    ),
    'rope': (
        'rope', 'forward',
        [Tile({'BLOCK': block}, warps) for block, warps in itertools.product((32, 64, 128), (2, 4, 8))],
    ),
    'swiglu_forward': ('swiglu', 'forward', [Tile({'BLOCK': block}, 4) for block in (1024, 2048, 4096)]),
    'swiglu_backward': ('swiglu', 'backward', [Tile({'BLOCK': block}, 4) for block in (1024, 2048, 4096)]),
}  # fmt: skip
# Relative error in norm of values and gradients in bfloat16. Correct kernels have 2e-3 to 4e-3; a wrong tile or mask
# gives many times this.
TOLERANCE = 1e-2


def how_often(setting: benchmark.Setting) -> dict[str, int]:
    """Returns the `repeats` and `count` of `benchmark.medians`."""
    return {'repeats': 1, 'count': 1} if setting.smoke else {'repeats': 7, 'count': 20}


def hold(name: str, errors: dict[str, float], failures: list[str]) -> None:
    """Adds a failure for each error that is above the tolerance or NaN."""
    failures += [f'{name}: {key} {value:.2g} > {TOLERANCE}' for key, value in errors.items() if not value <= TOLERANCE]


def normals(seed: int, dtype, *shapes) -> list:
    """Returns a normally distributed array of each shape, from `seed`."""
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


@dataclasses.dataclass(frozen=True)
class StreamingOp:
    """A memory-bound op: the shapes of its bfloat16 arrays, and how many such arrays each pass must move."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    function: Callable[[str], Callable]  # implementation name -> op
    arrays_forward: int  # arrays of the first shape that the forward pass reads and writes
    arrays_backward: int


def _streaming_ops(setting: benchmark.Setting) -> list[StreamingOp]:
    model, chip, B = setting.model, setting.chip, setting.batch
    T, D, N, H = model.seq_len, model.embed_dim, model.num_heads, model.head_dim
    positions_BT = jnp.broadcast_to(jnp.arange(T)[None, :], (B, T))
    scale_D = jnp.ones(D, jnp.float32)

    def norm(impl):
        return lambda x: dispatch.rms_norm(x, scale_D, eps=model.norm_eps, impl=impl, chip=chip)

    def residual_norm(impl):
        return lambda x, r: dispatch.rms_norm(x, scale_D, eps=model.norm_eps, residual_BTD=r, impl=impl, chip=chip)

    def rope(impl):
        return lambda x: dispatch.rope(x, positions_BT, base=model.rope_base, impl=impl, chip=chip)

    def swiglu(impl):
        return lambda gate, up: dispatch.swiglu(gate, up, impl=impl, chip=chip)

    ops = [
        StreamingOp('rms_norm + residual', ((B, T, D),) * 2, residual_norm, 4, 4),
        StreamingOp('rms_norm', ((B, T, D),), norm, 2, 3),
        StreamingOp('rope', ((B, T, N, H),), rope, 2, 2),
        StreamingOp('swiglu', ((B, T, model.hidden_dim),) * 2, swiglu, 3, 5),
    ]
    return ops[:1] if setting.smoke else ops  # one covers the code


def streaming(setting: benchmark.Setting) -> dict:
    """Measures GB/s of each fused op, forward and backward alone, counting the least bytes to move; and of a copy.

    Each call works on several sets of arrays, so that neither kernel launches nor the cache count.
    """
    copies = 1 if setting.smoke else 8
    rows, failures, calls, sizes = [], [], {}, {}
    for op in _streaming_ops(setting):
        sets = [normals(seed, jnp.bfloat16, *op.shapes) for seed in range(copies)]
        for impl in (setting.kernels, 'xla'):
            errors = _streaming_errors(op.function(impl), op.function('xla'), sets[0])
            hold(f'{op.name} {impl}', {'error': errors}, failures)
            row = {'op': op.name, 'implementation': impl, 'error': errors}
            rows.append(row)
            for way, call, moved in _streaming_calls(op, impl, sets):
                calls[op.name, impl, way], sizes[op.name, impl, way] = call, moved
        seconds = benchmark.medians(calls, **how_often(setting))
        for (name, impl, way), each in seconds.items():
            row = next(row for row in rows if (row['op'], row['implementation']) == (name, impl))
            row |= {f'{way}_us': 1e6 * each / copies, f'{way}_gb_per_s': sizes[name, impl, way] / each / 1e9}
        calls.clear()
    rows.append(_copy_row(setting, copies))
    return {'rows': rows, 'failures': failures}


def sweep_streaming(setting: benchmark.Setting) -> dict:
    """Measures the memory-bound kernels at other tile shapes; names the fastest of each."""
    copies, rows, best = (1 if setting.smoke else 8), [], {}
    ops = {op.name: op for op in _streaming_ops(setting)}
    for kernel, (name, way, tiles) in ROW_TILES.items():
        if name not in ops:  # the smoke run has one op
            continue
        sets = [normals(seed, jnp.bfloat16, *ops[name].shapes) for seed in range(copies)]
        calls, moved = {}, 0
        for tile in tiles[:1] if setting.smoke else tiles:
            with _row_tile(setting, kernel, tile):
                ways = {each: (call, size) for each, call, size in _streaming_calls(ops[name], setting.kernels, sets)}
                calls[str(tile)], moved = ways[way]
                benchmark.wait(calls[str(tile)]())  # traced with this tile
        seconds = benchmark.medians(calls, **how_often(setting))
        rows += [{'kernel': kernel, 'tile': tile, 'gb_per_s': moved / each / 1e9} for tile, each in seconds.items()]
        best[kernel] = min(seconds, key=seconds.__getitem__)
    return {'best': '; '.join(f'{kernel} {tile}' for kernel, tile in best.items()), 'rows': rows}


@contextlib.contextmanager
def _row_tile(setting: benchmark.Setting, kernel: str, tile: Tile):
    """A context in which a memory-bound kernel is traced with another tile."""
    tiles = (launch.INTERPRETER if setting.smoke else chips.CHIPS[str(setting.chip)]).streaming
    before = tiles[kernel]
    tiles[kernel] = tile
    try:
        yield
    finally:
        tiles[kernel] = before


def _streaming_calls(op: StreamingOp, impl: str, sets):
    """Yields ('forward' or 'backward', the call, the bytes that it must move)."""
    function = op.function(impl)
    unit = 2 * math.prod(op.shapes[0]) * len(sets)
    forward = jax.jit(lambda sets: [function(*arrays) for arrays in sets])
    yield 'forward', functools.partial(forward, sets), op.arrays_forward * unit
    outs, vjps = jax.jit(lambda sets: tuple(zip(*(jax.vjp(function, *arrays) for arrays in sets), strict=True)))(sets)
    backward = jax.jit(lambda vjps, outs: [vjp(out) for vjp, out in zip(vjps, outs, strict=True)])
    yield 'backward', functools.partial(backward, vjps, outs), op.arrays_backward * unit


def _streaming_errors(function, plain, arrays) -> float:
    """Returns the largest error of values and gradients under random cotangents."""

    def results(function, arrays):
        out, vjp = jax.vjp(function, *arrays)
        leaves, structure = jax.tree.flatten(out)
        cotangents = normals(1, jnp.bfloat16, *(leaf.shape for leaf in leaves))
        pairs = zip(cotangents, leaves, strict=True)
        return leaves + jax.tree.leaves(vjp(structure.unflatten(x.astype(leaf.dtype) for x, leaf in pairs)))

    got = jax.jit(functools.partial(results, function))(arrays)
    with jax.default_matmul_precision('highest'):
        wanted = jax.jit(functools.partial(results, plain))([x.astype(jnp.float32) for x in arrays])
    return float(np.max([benchmark.relative_error(x, y) for x, y in zip(got, wanted, strict=True)]))  # NaN stays


def _copy_row(setting: benchmark.Setting, copies: int) -> dict:
    """Measures a copy's bandwidth; it negates, because XLA would drop a plain copy."""
    size = 2**12 if setting.smoke else 2**27
    arrays = [jnp.full(size, index, jnp.bfloat16) for index in range(copies)]
    negated = jax.jit(lambda arrays: [-x for x in arrays])
    seconds = benchmark.medians({'copy': lambda: negated(arrays)}, **how_often(setting))['copy']
    moved = 2 * 2 * size * copies
    return {
        'op': 'copy',
        'implementation': 'xla',
        'forward_us': 1e6 * seconds / copies,
        'forward_gb_per_s': moved / seconds / 1e9,
    }


def cross_entropy(setting: benchmark.Setting) -> dict:
    """Measures time and memory of head and loss with gradients: ours, XLA's by chunks, XLA's with whole logits."""
    model, B, chip = setting.model, setting.batch, setting.chip
    x_BTD, head_DV = normals(0, jnp.bfloat16, (B, model.seq_len, model.embed_dim), (model.embed_dim, model.vocab_size))
    head_DV = head_DV * model.embed_dim**-0.5
    targets_BT = jax.random.randint(jax.random.key(1), (B, model.seq_len), 0, model.vocab_size)
    functions = {
        impl: functools.partial(dispatch.cross_entropy, impl=impl, chip=chip) for impl in (setting.kernels, 'xla')
    } | {'whole logits': reference.cross_entropy}
    with jax.default_matmul_precision('highest'):
        wide = (x_BTD.astype(jnp.float32), head_DV.astype(jnp.float32), targets_BT)
        wanted = [np.asarray(x) for x in jax.jit(functools.partial(_loss_and_grads, reference.cross_entropy))(*wide)]
    rows, failures, calls = [], [], {}
    for name, function in functions.items():  # the least memory first: the measured peak only ever grows
        traced = jax.jit(functools.partial(_loss_and_grads, function)).lower(x_BTD, head_DV, targets_BT)
        compiled = traced.compile()
        results = compiled(x_BTD, head_DV, targets_BT)
        errors = [benchmark.relative_error(x, y) for x, y in zip(results, wanted, strict=True)]
        row = dict(zip(('error', 'error_dx', 'error_dhead'), errors, strict=True))
        hold(name, row, failures)
        memory = benchmark.compiler_memory(compiled) | {'peak_bytes_so_far': benchmark.peak_bytes()}
        rows.append({'implementation': name, **row, **memory})
        calls[name] = functools.partial(compiled, x_BTD, head_DV, targets_BT)
    flops = 6 * B * model.seq_len * model.embed_dim * model.vocab_size
    for row, seconds in zip(rows, benchmark.medians(calls, **how_often(setting)).values(), strict=True):
        row |= {'ms': 1e3 * seconds, 'tflops': flops / seconds / 1e12}
    return {'tokens': B * model.seq_len, 'rows': rows, 'failures': failures}


def _loss_and_grads(function, x_BTD, head_DV, targets_BT):
    loss, grads = jax.value_and_grad(lambda *arrays: function(*arrays, targets_BT)[0], argnums=(0, 1))(x_BTD, head_DV)
    return loss, *grads
