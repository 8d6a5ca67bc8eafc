"""Benchmarks attention on one GPU: ours against other libraries', and the tile shapes of our kernels.

Every implementation is compared with plain JAX in float32 at the highest precision before it is timed.

Shapes: B batch, T time, N query heads, K key-value heads, H head dim.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from bench.gpu import benchmark
from bench.gpu import ops as gpu_ops
from kernels import chips, dispatch, launch, reference
from kernels.chips import Tile

# (BLOCK_Q, BLOCK_K, warps, stages) of each attention kernel; BLOCK_Q divides BLOCK_K in dkv.
TILES = {
    'forward': (
        (128, 128, 8, 2), (128, 64, 4, 2), (128, 64, 4, 3), (128, 64, 8, 2), (128, 64, 8, 3), (64, 128, 4, 2),
        (64, 64, 4, 2), (64, 64, 4, 3),
    ),
    'dq': ((64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 2), (64, 128, 4, 2), (64, 32, 4, 3)),
    'dkv': ((64, 128, 8, 2), (64, 64, 4, 2), (64, 64, 4, 3), (32, 128, 8, 2), (32, 64, 4, 3)),
}  # fmt: skip
SMOKE_TILES = {'forward': ((32, 32, 4, 2),), 'dq': ((32, 32, 4, 2),), 'dkv': ((32, 32, 4, 2),)}
# jax's Mosaic kernel: (block_q, block_kv, steps in flight).
_MOSAIC_TILES = ((64, 256, 2), (64, 128, 2), (64, 128, 4), (128, 128, 2))


@dataclasses.dataclass(frozen=True)
class Attention:
    """One implementation, bound to its arrays: queries, keys, values and the cotangent of the output."""

    forward: Callable[[], object]  # out
    both: Callable[[], tuple] | None  # (out, dq, dk, dv); None: it has no backward pass
    to_numpy: Callable[[object], np.ndarray]
    note: str = ''


def attention(setting: benchmark.Setting) -> dict:
    """Measures causal attention in bfloat16, forward alone and with backward, in TFLOP/s of the unmasked half."""
    arrays = _attention_arrays(setting)
    wanted = _wanted_attention(arrays)
    rows, candidates, failures = [], {}, []
    for name, make in _attentions(setting).items():
        row = {'implementation': name}
        rows.append(row)
        try:
            candidate = make(arrays)
            row |= _attention_errors(candidate, wanted) | {'note': candidate.note}
            gpu_ops.hold(name, {key: row[key] for key in row if key.startswith('error')}, failures)
            candidates[name] = candidate
        except benchmark.Skipped as reason:
            row['note'] = f'skipped: {reason}'
        except Exception as error:  # another library's failure is only noted; one of ours fails the run
            row['note'] = f'failed: {type(error).__name__}: {error}'[:400]
            if name in (setting.kernels, 'xla', 'cudnn'):
                failures.append(f'{name} {row["note"]}')
    _time_attention(setting, rows, candidates)
    return {'rows': rows, 'failures': failures}


def _time_attention(setting: benchmark.Setting, rows: list, candidates: dict[str, Attention]) -> None:
    how = gpu_ops.how_often(setting)
    forward = benchmark.medians({name: each.forward for name, each in candidates.items()}, **how)
    both = benchmark.medians({name: each.both for name, each in candidates.items() if each.both}, **how)
    flops = _attention_flops(setting)
    for row in rows:
        name = row['implementation']
        if name in forward:
            row |= {'forward_ms': 1e3 * forward[name], 'forward_tflops': flops / forward[name] / 1e12}
        if name in both:
            row |= {'both_ms': 1e3 * both[name], 'both_tflops': 3.5 * flops / both[name] / 1e12}


def _attention_flops(setting: benchmark.Setting) -> float:
    """Returns the forward pass's FLOPs: two products over half of the pairs. Backward has 2.5 times as many."""
    model = setting.model
    return 4 * setting.batch * model.num_heads * model.seq_len**2 * model.head_dim / 2


def _attention_arrays(setting: benchmark.Setting) -> tuple:
    model, B = setting.model, setting.batch
    heads = (model.num_heads, model.num_kv_heads, model.num_kv_heads, model.num_heads)
    return tuple(gpu_ops.normals(0, jnp.bfloat16, *((B, model.seq_len, count, model.head_dim) for count in heads)))


def _both(function, *arrays_and_cotangent):
    """Returns (value, *gradients) of a function; the last argument is the cotangent of its value."""
    *arrays, cotangent = arrays_and_cotangent
    value, vjp = jax.vjp(function, *arrays)
    return value, *vjp(cotangent)


def _wanted_attention(arrays) -> list[np.ndarray]:
    """Returns plain JAX's (out, dq, dk, dv) for the last sequence, in float32."""
    last = [x[-1:].astype(jnp.float32) for x in arrays]
    with jax.default_matmul_precision('highest'):
        return [np.asarray(x) for x in jax.jit(functools.partial(_both, reference.attention))(*last)]


def _attention_errors(candidate: Attention, wanted) -> dict[str, float]:
    results = candidate.both() if candidate.both else (candidate.forward(),)
    names = ('error', 'error_dq', 'error_dk', 'error_dv')
    last = (candidate.to_numpy(x)[-1:] for x in results)
    return {name: benchmark.relative_error(x, y) for name, x, y in zip(names, last, wanted, strict=False)}


def _attentions(setting: benchmark.Setting) -> dict[str, Callable]:
    """Returns {name: function of the arrays that returns the implementation or raises Skipped}."""
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
    raise benchmark.Skipped(reason)


def _ours(function, arrays) -> Attention:
    forward, both = jax.jit(function), jax.jit(functools.partial(_both, function))
    return Attention(lambda: forward(*arrays[:3]), lambda: both(*arrays), _jax_to_numpy)


def _jax_to_numpy(x) -> np.ndarray:
    return np.asarray(x.astype(jnp.float32))


def _mosaic(chip: str | None, arrays) -> Attention:
    """Returns jax's Hopper kernel at its best tile. It does not scale, so the queries are scaled here."""
    if chip != 'sm_90':
        raise benchmark.Skipped(f'it needs sm_90, not {chip}')
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    q_BTNH, k_BTKH, v_BTKH, _ = arrays
    scaled_BTNH = q_BTNH * q_BTNH.shape[-1] ** -0.5
    tried, reasons = {}, []
    for dtype in (jnp.bfloat16, jnp.float16):
        inputs = tuple(x.astype(dtype) for x in (scaled_BTNH, k_BTKH, v_BTKH))
        for tile in _MOSAIC_TILES:
            call = functools.partial(attention_mgpu.attention, *inputs, _mosaic_config(attention_mgpu, tile))
            try:
                benchmark.wait(call())
                tried[f'{dtype.__name__}, blocks {tile}'] = call
            except Exception as error:
                reasons.append(f'{dtype.__name__} {tile}: {type(error).__name__}: {error}'[:200])
        if tried:
            break
    if not tried:
        raise benchmark.Skipped(f'no tile runs; {"; ".join(reasons)}')
    times = benchmark.medians(tried, repeats=3, count=10)
    best = min(times, key=times.__getitem__)
    backward = _mosaic_backward(attention_mgpu, *inputs)  # in the dtype that runs
    return Attention(tried[best], None, _jax_to_numpy, f'{best}; backward not supported: {backward}')


def _mosaic_config(attention_mgpu, tile):
    block_q, block_kv, steps = tile
    return attention_mgpu.TuningConfig(block_q=block_q, block_kv=block_kv, max_concurrent_steps=steps, causal=True)


def _mosaic_backward(attention_mgpu, *arrays) -> str:
    """Returns the kernel's own message that it has no gradient under a causal mask."""

    def gradient(*arrays):
        out, vjp = jax.vjp(
            lambda *xs: attention_mgpu.attention(*xs, _mosaic_config(attention_mgpu, (64, 64, 2))), *arrays
        )
        return vjp(out)

    try:
        jax.eval_shape(gradient, *arrays)
    except Exception as error:
        return f'{error}'[:200]
    return 'it traces in this version of jax, but this benchmark does not time it yet'


def _torch(backend: str, device: str, arrays) -> Attention:
    """Returns torch's SDPA on one backend; repeats keys and values where the backend does not support GQA."""
    try:
        import torch
        from torch.nn import attention as torch_attention
    except ImportError:
        raise benchmark.Skipped('torch is not installed') from None
    *inputs, dout = (torch.tensor(_jax_to_numpy(x)).to(device, torch.bfloat16).transpose(1, 2) for x in arrays)
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


@contextlib.contextmanager
def tile(setting: benchmark.Setting, kernel: str, values: tuple[int, int, int, int]):
    """A context in which attention kernel `kernel` is traced with `values` = (BLOCK_Q, BLOCK_K, warps, stages)."""
    block_q, block_kv, warps, stages = values
    new = {f'attention_{kernel}': Tile({'BLOCK_Q': block_q, 'BLOCK_K': block_kv}, warps, stages)}
    chip = launch.INTERPRETER if setting.smoke else chips.CHIPS[str(setting.chip)]
    tiles = chip.attention['bfloat16', setting.model.head_dim]
    before = dict(tiles)
    tiles.update(new)
    try:
        yield
    finally:
        tiles.update(before)


def sweep(setting: benchmark.Setting) -> dict:
    """Measures attention at other tile shapes, forward alone or backward alone; names the fastest of each kernel."""
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
                differences = [benchmark.relative_error(x, usual[i]) for i, x in _compared(kernel, calls[values]())]
            except Exception as error:  # for example, too much shared memory
                calls.pop(values, None)
                row['note'] = f'{type(error).__name__}: {error}'[:200]
                continue
            row['difference'] = float(np.max(differences))  # NaN stays
            gpu_ops.hold(f'{kernel} {values}', {'difference': row['difference']}, failures)
        times = benchmark.medians(calls, repeats=1 if setting.smoke else 3, count=1 if setting.smoke else 10)
        for values, seconds in times.items():
            next(row for row in rows if _named(kernel, values).items() <= row.items())['ms'] = 1e3 * seconds
        if times:
            best[kernel] = min(times, key=times.__getitem__)
    return {
        'best': ', '.join(f'{kernel} {values}' for kernel, values in best.items()),
        'rows': rows,
        'failures': failures or ([] if best else ['no tile ran']),
    }


def _named(kernel: str, values) -> dict:
    return {'kernel': kernel, 'tile': str(values)}


def _traced(kernel: str, arrays, setting: benchmark.Setting):
    """Compiles the forward or the backward pass with the current table of tiles; returns the call."""

    def function(*arrays):  # a new function each time, so that jit does not reuse a trace
        return dispatch.attention(*arrays, impl=setting.kernels, chip=setting.chip)

    if kernel == 'forward':
        compiled = jax.jit(function).lower(*arrays[:3]).compile()
        return functools.partial(compiled, *arrays[:3])
    _, vjp = jax.jit(lambda *arrays: jax.vjp(function, *arrays))(*arrays[:3])
    compiled = jax.jit(lambda vjp, dout: vjp(dout)).lower(vjp, arrays[3]).compile()
    return functools.partial(compiled, vjp, arrays[3])


def _compared(kernel: str, results):
    """Returns (index in (out, dq, dk, dv), array) for each result."""
    return [(0, results)] if kernel == 'forward' else list(enumerate(results, start=1))
