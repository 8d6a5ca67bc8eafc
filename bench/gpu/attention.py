"""Attention on one GPU: ours against other libraries', and the tile shapes of our kernels.

Every implementation is held to plain JAX in float32 at the highest precision before it is timed.

Shapes: B batch, T time, N query heads, K key-value heads, H head dim.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from bench.gpu import ops as gpu_ops
from bench.gpu import record
from kernels import dispatch, launch, reference

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
            gpu_ops.hold(name, {key: row[key] for key in row if key.startswith('error')}, failures)
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
    how = gpu_ops.how_often(setting)
    forward = record.medians({name: each.forward for name, each in found.items()}, **how)
    both = record.medians({name: each.both for name, each in found.items() if each.both}, **how)
    flops = _attention_flops(setting)
    for row in rows:
        name = row['implementation']
        if name in forward:
            row |= {'forward_ms': 1e3 * forward[name], 'forward_tflops': flops / forward[name] / 1e12}
        if name in both:
            row |= {'both_ms': 1e3 * both[name], 'both_tflops': 3.5 * flops / both[name] / 1e12}


def _attention_flops(setting: record.Setting) -> float:
    """Of the forward pass: two products over half of the pairs of positions; the backward pass has 2.5 times those."""
    model = setting.model
    return 4 * setting.batch * model.num_heads * model.seq_len**2 * model.head_dim / 2


def _attention_arrays(setting: record.Setting) -> tuple:
    model, B = setting.model, setting.batch
    heads = (model.num_heads, model.num_kv_heads, model.num_kv_heads, model.num_heads)
    return tuple(gpu_ops.normals(0, jnp.bfloat16, *((B, model.seq_len, count, model.head_dim) for count in heads)))


def _both(function, *arrays_and_cotangent):
    """(Value, *gradients) of a function of arrays, the last argument being the value's cotangent."""
    *arrays, cotangent = arrays_and_cotangent
    value, vjp = jax.vjp(function, *arrays)
    return value, *vjp(cotangent)


def _wanted_attention(arrays) -> list[np.ndarray]:
    """Plain JAX's (out, dq, dk, dv) of the last sequence, in float32."""
    last = [x[-1:].astype(jnp.float32) for x in arrays]
    with jax.default_matmul_precision('highest'):
        return [np.asarray(x) for x in jax.jit(functools.partial(_both, reference.attention))(*last)]


def _attention_errors(candidate: Attention, wanted) -> dict[str, float]:
    results = candidate.both() if candidate.both else (candidate.forward(),)
    names = ('error', 'error_dq', 'error_dk', 'error_dv')
    last = (candidate.to_numpy(x)[-1:] for x in results)
    return {name: record.relative_error(x, y) for name, x, y in zip(names, last, wanted, strict=False)}


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
    backward = _mosaic_backward(attention_mgpu, *inputs)  # in the dtype that runs
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
            row['difference'] = float(np.max(found))  # NaN stays
            gpu_ops.hold(f'{kernel} {values}', {'difference': row['difference']}, failures)
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
