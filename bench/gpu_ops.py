"""The ops one by one: attention against other libraries', the fused ops against memory, the loss, tile shapes.

Every implementation is held to plain JAX in float32 at the highest precision before it is timed.

Shapes: B batch, T time, D model, N query heads, K key-value heads, H head dim, F feed-forward, V vocabulary.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from bench import gpu_record as record
from kernels import dispatch, launch, reference

# Error in norm, relative, of values and gradients in bfloat16: good kernels have 2e-3 to 4e-3, a wrong tile or mask
# many times this.
TOLERANCE = 1e-2
# (BLOCK_Q, BLOCK_K, warps, stages) of each attention kernel; BLOCK_Q divides BLOCK_K in dkv, BLOCK_K BLOCK_Q in dq.
TILES = {
    'forward': (
        (128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 4, 2), (128, 64, 4, 3), (128, 64, 8, 2), (128, 64, 8, 3),
        (64, 64, 4, 2), (64, 64, 4, 3),
    ),
    'dq': ((64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 2), (128, 32, 8, 2), (64, 32, 4, 2), (64, 32, 4, 3)),
    'dkv': ((64, 128, 8, 2), (64, 128, 8, 3), (64, 64, 4, 2), (32, 128, 8, 2), (32, 64, 4, 2), (32, 64, 4, 3)),
}  # fmt: skip
SMOKE_TILES = {'forward': ((32, 32, 4, 2),), 'dq': ((32, 32, 4, 2),), 'dkv': ((32, 32, 4, 2),)}
# jax's Mosaic kernel: (block_q, block_kv, steps in flight).
_MOSAIC_TILES = ((64, 256, 2), (64, 128, 2), (64, 128, 4), (128, 128, 2))


@dataclasses.dataclass(frozen=True)
class Attention:
    """One implementation on its own arrays, queries, keys, values and the output's cotangent."""

    forward: Callable[[], object]  # out
    both: Callable[[], tuple] | None  # (out, dq, dk, dv); None: it has no backward pass
    to_numpy: Callable[[object], np.ndarray]
    note: str = ''


def attention(setting: record.Setting) -> dict:
    """Forward, and forward and backward, of causal attention in bfloat16, in TFLOP/s of what a causal mask leaves."""
    arrays = _attention_arrays(setting)
    wanted = _wanted_attention(arrays)
    rows, found, failures = [], {}, []
    for name, make in _attentions(setting).items():
        row = {'implementation': name}
        rows.append(row)
        try:
            candidate = make(arrays)
            row |= _attention_errors(candidate, wanted) | {'note': candidate.note}
            _hold(name, {key: row[key] for key in row if key.startswith('error')}, failures)
            found[name] = candidate
        except record.Skipped as reason:
            row['note'] = f'skipped: {reason}'
        except Exception as error:  # another library's failure is recorded; one of ours fails the run
            row['note'] = f'failed: {type(error).__name__}: {error}'[:400]
            if name in (setting.kernels, 'xla', 'cudnn'):
                failures.append(f'{name} {row["note"]}')
    _time_attention(setting, rows, found)
    return {'rows': rows, 'failures': failures}


def _time_attention(setting: record.Setting, rows: list, found: dict[str, Attention]) -> None:
    how = _how_often(setting)
    forward = record.medians({name: each.forward for name, each in found.items()}, **how)
    both = record.medians({name: each.both for name, each in found.items() if each.both}, **how)
    flops = _attention_flops(setting)
    for row in rows:
        name = row['implementation']
        if name in forward:
            row |= {'forward_ms': 1e3 * forward[name], 'forward_tflops': flops / forward[name] / 1e12}
        if name in both:
            row |= {'both_ms': 1e3 * both[name], 'both_tflops': 3.5 * flops / both[name] / 1e12}


def _how_often(setting: record.Setting) -> dict[str, int]:
    return {'repeats': 1, 'count': 1} if setting.smoke else {'repeats': 7, 'count': 20}


def _attention_flops(setting: record.Setting) -> float:
    """Of the forward pass: two products over half of the pairs of positions; the backward pass has 2.5 times those."""
    model = setting.model
    return 4 * setting.batch * model.num_heads * model.seq_len**2 * model.head_dim / 2


def _hold(name: str, errors: dict[str, float], failures: list[str]) -> None:
    """Notes a failure where an error is above the tolerance, or not a number."""
    failures += [f'{name}: {key} {value:.2g} > {TOLERANCE}' for key, value in errors.items() if not value <= TOLERANCE]


def _attention_arrays(setting: record.Setting) -> tuple:
    model, B = setting.model, setting.batch
    heads = (model.num_heads, model.num_kv_heads, model.num_kv_heads, model.num_heads)
    return tuple(_normals(0, jnp.bfloat16, *((B, model.seq_len, count, model.head_dim) for count in heads)))


def _normals(seed: int, dtype, *shapes) -> list:
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def _both(function, *arrays_and_cotangent):
    """(Value, *gradients) of a function of arrays, the last argument being the value's cotangent."""
    *arrays, cotangent = arrays_and_cotangent
    value, vjp = jax.vjp(function, *arrays)
    return value, *vjp(cotangent)


def _wanted_attention(arrays) -> list[np.ndarray]:
    """Plain JAX's (out, dq, dk, dv) of the first sequence, in float32."""
    first = [x[:1].astype(jnp.float32) for x in arrays]
    with jax.default_matmul_precision('highest'):
        return [np.asarray(x) for x in jax.jit(functools.partial(_both, reference.attention))(*first)]


def _attention_errors(candidate: Attention, wanted) -> dict[str, float]:
    results = candidate.both() if candidate.both else (candidate.forward(),)
    names = ('error', 'error_dq', 'error_dk', 'error_dv')
    first = (candidate.to_numpy(x)[:1] for x in results)
    return {name: record.relative_error(x, y) for name, x, y in zip(names, first, wanted, strict=False)}


def _attentions(setting: record.Setting) -> dict[str, Callable]:
    """{name: a function of the arrays that makes the implementation, or raises Skipped}."""
    chip = setting.chip
    made = {
        name: functools.partial(_ours, functools.partial(dispatch.attention, impl=name, chip=chip))
        for name in (setting.kernels, 'xla', 'cudnn')
    }
    if chip is None:
        made['cudnn'] = functools.partial(_skip, 'cuDNN needs a GPU')
    made['jax Mosaic'] = functools.partial(_mosaic, chip)
    for backend in ('MATH',) if setting.smoke else ('CUDNN_ATTENTION', 'FLASH_ATTENTION'):
        made[f'torch {backend}'] = functools.partial(_torch, backend, 'cpu' if setting.smoke else 'cuda')
    return made


def _skip(reason: str, arrays):
    raise record.Skipped(reason)


def _ours(function, arrays) -> Attention:
    forward, both = jax.jit(function), jax.jit(functools.partial(_both, function))
    return Attention(lambda: forward(*arrays[:3]), lambda: both(*arrays), _jax_to_numpy)


def _jax_to_numpy(x) -> np.ndarray:
    return np.asarray(x.astype(jnp.float32))


def _mosaic(chip: str | None, arrays) -> Attention:
    """jax's own Hopper kernel at its best tile; it scales nothing, so the queries come scaled."""
    if chip != 'sm_90':
        raise record.Skipped(f'it needs sm_90, not {chip}')
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    q_BTNH, k_BTKH, v_BTKH, _ = arrays
    scaled_BTNH = q_BTNH * q_BTNH.shape[-1] ** -0.5
    tried, reasons = {}, []
    for dtype in (jnp.bfloat16, jnp.float16):
        inputs = tuple(x.astype(dtype) for x in (scaled_BTNH, k_BTKH, v_BTKH))
        for tile in _MOSAIC_TILES:
            call = functools.partial(attention_mgpu.attention, *inputs, _mosaic_config(attention_mgpu, tile))
            try:
                record.wait(call())
                tried[f'{dtype.__name__}, blocks {tile}'] = call
            except Exception as error:
                reasons.append(f'{dtype.__name__} {tile}: {type(error).__name__}: {error}'[:200])
        if tried:
            break
    if not tried:
        raise record.Skipped(f'no tile runs; {"; ".join(reasons)}')
    times = record.medians(tried, repeats=3, count=10)
    best = min(times, key=times.__getitem__)
    backward = _mosaic_backward(attention_mgpu, scaled_BTNH, k_BTKH, v_BTKH)
    return Attention(tried[best], None, _jax_to_numpy, f'{best}; backward not supported: {backward}')


def _mosaic_config(attention_mgpu, tile):
    block_q, block_kv, steps = tile
    return attention_mgpu.TuningConfig(block_q=block_q, block_kv=block_kv, max_concurrent_steps=steps, causal=True)


def _mosaic_backward(attention_mgpu, *arrays) -> str:
    """Why the kernel has no gradient under a causal mask, in its own words."""

    def gradient(*arrays):
        out, vjp = jax.vjp(
            lambda *xs: attention_mgpu.attention(*xs, _mosaic_config(attention_mgpu, (64, 64, 2))), *arrays
        )
        return vjp(out)

    try:
        jax.eval_shape(gradient, *arrays)
    except Exception as error:
        return f'{error}'[:200]
    return 'it traces in this version of jax, and this benchmark does not time it yet'


def _torch(backend: str, device: str, arrays) -> Attention:
    """Torch's scaled_dot_product_attention by a named backend; keys and values repeated where it knows no groups."""
    try:
        import torch
        from torch.nn import attention as torch_attention
    except ImportError:
        raise record.Skipped('torch is not installed') from None
    *inputs, dout = (
        torch.tensor(_jax_to_numpy(x)).to(device, torch.bfloat16).transpose(1, 2) for x in arrays
    )  # fmt: skip
    inputs = [x.requires_grad_() for x in inputs]
    groups = inputs[0].shape[1] // inputs[1].shape[1]

    def out_of(q, k, v, *, repeat: bool):
        if repeat:
            k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
        with torch_attention.sdpa_kernel(getattr(torch_attention.SDPBackend, backend)):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=not repeat)

    def both_of(*, repeat: bool):
        out = out_of(*inputs, repeat=repeat)
        return out.detach(), *torch.autograd.grad(out, inputs, dout)

    repeat, note = False, 'enable_gqa'
    try:
        both_of(repeat=False)
    except RuntimeError as error:
        repeat, note = True, f'keys and values repeated, since enable_gqa failed: {error}'[:200]
    return Attention(
        torch.no_grad()(lambda: out_of(*inputs, repeat=repeat)),
        lambda: both_of(repeat=repeat),
        lambda x: x.detach().transpose(1, 2).float().cpu().numpy(),
        note,
    )


@dataclasses.dataclass(frozen=True)
class StreamingOp:
    """An op that memory bounds: shapes of its arrays (a shape alone: bfloat16), and what must at least be moved."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    function: Callable[[str], Callable]  # of the implementation
    arrays_forward: int  # how many arrays of the first's shape the forward pass reads and writes
    arrays_backward: int


def _streaming_ops(setting: record.Setting) -> list[StreamingOp]:
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
    return ops[:1] if setting.smoke else ops  # all are the same code


def streaming(setting: record.Setting) -> dict:
    """GB/s of each fused op, forward and backward alone, of what must at least move; beside a copy's in the same call.

    A call works on several sets of arrays, so that neither the start of a kernel nor the cache counts.
    """
    copies = 1 if setting.smoke else 8
    rows, failures, calls, sizes = [], [], {}, {}
    for op in _streaming_ops(setting):
        sets = [_normals(seed, jnp.bfloat16, *op.shapes) for seed in range(copies)]
        for impl in (setting.kernels, 'xla'):
            errors = _streaming_errors(op.function(impl), op.function('xla'), sets[0])
            _hold(f'{op.name} {impl}', {'error': errors}, failures)
            row = {'op': op.name, 'implementation': impl, 'error': errors}
            rows.append(row)
            for way, call, moved in _streaming_calls(op, impl, sets):
                calls[op.name, impl, way], sizes[op.name, impl, way] = call, moved
        seconds = record.medians(calls, **_how_often(setting))
        for (name, impl, way), each in seconds.items():
            row = next(row for row in rows if (row['op'], row['implementation']) == (name, impl))
            row |= {f'{way}_us': 1e6 * each / copies, f'{way}_gb_per_s': sizes[name, impl, way] / each / 1e9}
        calls.clear()
    rows.append(_copy_row(setting, copies))
    return {'rows': rows, 'failures': failures}


def _streaming_calls(op: StreamingOp, impl: str, sets):
    """('forward' and 'backward', the call, the bytes that it must move)."""
    function = op.function(impl)
    unit = 2 * math.prod(op.shapes[0]) * len(sets)
    forward = jax.jit(lambda sets: [function(*arrays) for arrays in sets])
    yield 'forward', functools.partial(forward, sets), op.arrays_forward * unit
    outs, vjps = jax.jit(lambda sets: tuple(zip(*(jax.vjp(function, *arrays) for arrays in sets), strict=True)))(sets)
    backward = jax.jit(lambda vjps, outs: [vjp(out) for vjp, out in zip(vjps, outs, strict=True)])
    yield 'backward', functools.partial(backward, vjps, outs), op.arrays_backward * unit


def _streaming_errors(function, plain, arrays) -> float:
    """The largest error of values and gradients under random cotangents."""

    def results(function, arrays):
        out, vjp = jax.vjp(function, *arrays)
        leaves, structure = jax.tree.flatten(out)
        cotangents = _normals(1, jnp.bfloat16, *(leaf.shape for leaf in leaves))
        pairs = zip(cotangents, leaves, strict=True)
        return leaves + jax.tree.leaves(vjp(structure.unflatten(x.astype(leaf.dtype) for x, leaf in pairs)))

    found = jax.jit(functools.partial(results, function))(arrays)
    with jax.default_matmul_precision('highest'):
        wanted = jax.jit(functools.partial(results, plain))([x.astype(jnp.float32) for x in arrays])
    return max(record.relative_error(x, y) for x, y in zip(found, wanted, strict=True))


def _copy_row(setting: record.Setting, copies: int) -> dict:
    """What the memory does when it only copies (negates, which XLA does not leave out)."""
    size = 2**12 if setting.smoke else 2**27
    arrays = [jnp.full(size, index, jnp.bfloat16) for index in range(copies)]
    negated = jax.jit(lambda arrays: [-x for x in arrays])
    seconds = record.medians({'copy': lambda: negated(arrays)}, **_how_often(setting))['copy']
    moved = 2 * 2 * size * copies
    return {'op': 'copy', 'implementation': 'xla', 'forward_us': 1e6 * seconds / copies,
            'forward_gb_per_s': moved / seconds / 1e9}  # fmt: skip


def cross_entropy(setting: record.Setting) -> dict:
    """Time and memory of head and loss with their gradients, against XLA's by chunks and with whole logits."""
    model, B, chip = setting.model, setting.batch, setting.chip
    x_BTD, head_DV = _normals(0, jnp.bfloat16, (B, model.seq_len, model.embed_dim), (model.embed_dim, model.vocab_size))
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
        found = compiled(x_BTD, head_DV, targets_BT)
        errors = [record.relative_error(x, y) for x, y in zip(found, wanted, strict=True)]
        row = dict(zip(('error', 'error_dx', 'error_dhead'), errors, strict=True))
        _hold(name, row, failures)
        memory = record.compiler_memory(compiled) | {'peak_bytes_so_far': record.peak_bytes()}
        rows.append({'implementation': name, **row, **memory})
        calls[name] = functools.partial(compiled, x_BTD, head_DV, targets_BT)
    flops = 6 * B * model.seq_len * model.embed_dim * model.vocab_size
    for row, seconds in zip(rows, record.medians(calls, **_how_often(setting)).values(), strict=True):
        row |= {'ms': 1e3 * seconds, 'tflops': flops / seconds / 1e12}
    return {'tokens': B * model.seq_len, 'rows': rows, 'failures': failures}


def _loss_and_grads(function, x_BTD, head_DV, targets_BT):
    loss, grads = jax.value_and_grad(lambda *arrays: function(*arrays, targets_BT)[0], argnums=(0, 1))(x_BTD, head_DV)
    return loss, *grads


@contextlib.contextmanager
def tile(setting: record.Setting, kernel: str, values: tuple[int, int, int, int]):
    """A context in which an attention kernel of that name is traced with other (BLOCK_Q, BLOCK_K, warps, stages)."""
    block_q, block_kv, warps, stages = values
    new = {f'attention_{kernel}': launch.Tile({'BLOCK_Q': block_q, 'BLOCK_K': block_kv}, warps, stages)}
    key = (setting.chip, 'bfloat16', setting.model.head_dim)
    tiles = launch._INTERPRETED if setting.smoke else launch._ATTENTION[key]
    before = dict(tiles)
    tiles.update(new)
    try:
        yield
    finally:
        tiles.update(before)


def sweep(setting: record.Setting) -> dict:
    """Milliseconds of attention at other tile shapes, forward alone or backward alone; the fastest of each kernel."""
    arrays = _attention_arrays(setting)
    function = functools.partial(dispatch.attention, impl=setting.kernels, chip=setting.chip)
    usual = jax.jit(functools.partial(_both, function))(*arrays)
    rows, best, failures = [], {}, []
    for kernel, candidates in (SMOKE_TILES if setting.smoke else TILES).items():
        calls = {}
        for values in candidates:
            row = _named(kernel, values)
            rows.append(row)
            try:
                with tile(setting, kernel, values):
                    calls[values] = _traced(kernel, arrays, setting)
                found = [record.relative_error(x, usual[i]) for i, x in _compared(kernel, calls[values]())]
            except Exception as error:  # too much shared memory, say
                calls.pop(values, None)
                row['note'] = f'{type(error).__name__}: {error}'[:200]
                continue
            row['difference'] = max(found)
            _hold(f'{kernel} {values}', {'difference': max(found)}, failures)
        times = record.medians(calls, repeats=1 if setting.smoke else 3, count=1 if setting.smoke else 10)
        for values, seconds in times.items():
            next(row for row in rows if _named(kernel, values).items() <= row.items())['ms'] = 1e3 * seconds
        if times:
            best[kernel] = min(times, key=times.__getitem__)
    return {'best': ', '.join(f'{kernel} {values}' for kernel, values in best.items()), 'rows': rows,
            'failures': failures or ([] if best else ['no tile ran'])}  # fmt: skip


def _named(kernel: str, values) -> dict:
    return {'kernel': kernel, 'tile': str(values)}


def _traced(kernel: str, arrays, setting: record.Setting):
    """A call of the forward or the backward pass, compiled while the table of tiles is as it is now."""

    def function(*arrays):  # a new one each time: nothing traced before is found again
        return dispatch.attention(*arrays, impl=setting.kernels, chip=setting.chip)

    if kernel == 'forward':
        compiled = jax.jit(function).lower(*arrays[:3]).compile()
        return functools.partial(compiled, *arrays[:3])
    _, vjp = jax.jit(lambda *arrays: jax.vjp(function, *arrays))(*arrays[:3])
    compiled = jax.jit(lambda vjp, dout: vjp(dout)).lower(vjp, arrays[3]).compile()
    return functools.partial(compiled, vjp, arrays[3])


def _compared(kernel: str, results):
    """(Place among out, dq, dk, dv, result) of each array."""
    return [(0, results)] if kernel == 'forward' else list(enumerate(results, start=1))
