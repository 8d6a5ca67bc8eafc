"""What `plan` says about a compiled step: an object for --json, and text for a terminal."""

import os
from collections.abc import Mapping
from typing import Any

from tinyllama_jax import flops
from tinyllama_jax.plan import roofline
from tinyllama_jax.plan.compile import RESERVE_BYTES, Compiled
from tinyllama_jax.plan.memory import GIB

# A100-hours per 300 B tokens (TinyLlama's paper, section 2.4).
PUBLISHED_GPU_HOURS = {'TinyLlama-1.1B': 3_456, 'Pythia-1.0B': 4_830, 'MPT-1.3B': 7_920}


def make_plan(compiled: Compiled) -> dict[str, Any]:
    """Returns the plan as `--json` prints it."""
    config, model, cluster, estimate = compiled.config, compiled.config.model, compiled.cluster, compiled.estimate
    product_flops = roofline.product_flops(compiled.program) * cluster.size  # of a step, on all GPUs together
    run_seconds = config.train.num_steps * estimate.total
    collectives = compiled.collectives()
    axis_rates: dict[str, float] = {}  # bytes a second that a GPU sends along each axis, on average over a step
    for row in collectives:
        axis_rates[row['axis']] = axis_rates.get(row['axis'], 0.0) + row['bytes_per_step'] / estimate.total
    return {
        'fits': compiled.fits,
        'peak_bytes_per_gpu': compiled.peak_bytes,
        'capacity_bytes': cluster.capacity_bytes,
        'memory_fraction': cluster.memory_fraction,
        'xla_flags': os.environ.get('XLA_FLAGS', ''),
        'memory': compiled.memory,
        'target': cluster.target.device_name,
        'nodes': cluster.nodes,
        'devices': cluster.size,
        'mesh': dict(compiled.mesh.shape),
        'parameters': sum(flops.parameter_counts(model).values()),
        'tokens_per_step': compiled.tokens_per_step,
        'micro_batch_size': config.train.micro_batch_size,
        'accumulation_steps': compiled.accumulation_steps,
        'remat': config.train.remat,
        'kernels': compiled.kernels,
        'flops_per_token': {name: flops.flops_per_token(model, name) for name in 'CFN'},
        'product_flops_per_token': product_flops / compiled.tokens_per_step,
        'collectives': collectives,
        'bytes_per_second_per_axis': axis_rates,
        'seconds_per_step': estimate.seconds | {'hidden exchange': estimate.hidden},
        'estimated_tokens_per_second': compiled.tokens_per_second,
        'estimated_tokens_per_second_per_gpu': compiled.tokens_per_second / cluster.size,
        'estimated_days': run_seconds / 86_400,
        'estimated_gpu_hours': run_seconds * cluster.size / 3_600,
        'gpu_hours_per_300b_tokens': {'this plan': compiled.gpu_hours(300e9), **PUBLISHED_GPU_HOURS},
    }


def search_row(compiled: Compiled) -> dict[str, Any]:
    """Returns one row of the table that `--search` adds to a plan."""
    return {
        'micro_batch_size': compiled.config.train.micro_batch_size,
        'accumulation_steps': compiled.accumulation_steps,
        'remat': compiled.config.train.remat,
        'peak_bytes_per_gpu': compiled.peak_bytes,
        'estimated_tokens_per_second': compiled.tokens_per_second,
    }


def text(plan: Mapping[str, Any]) -> str:
    """Returns a plan of `make_plan` as text for a terminal; if it has the rows of a search, they come first."""
    mesh = ' x '.join(f'{axis} {size}' for axis, size in plan['mesh'].items())
    verdict = 'fits' if plan['fits'] else 'DOES NOT FIT'
    lines = []
    if plan.get('search'):
        lines.append('these fit, the fastest first:')
        for row in plan['search']:
            lines.append(
                f'  {row["micro_batch_size"]:3} sequences, remat {row["remat"]:10} '
                f'{row["peak_bytes_per_gpu"] / GIB:6.2f} GiB  {row["estimated_tokens_per_second"]:10,.0f} tokens/s'
            )
        lines += ['', 'the first of them:']
    lines += [
        f'{plan["devices"]} x {plan["target"]} on {plan["nodes"]} nodes: {mesh}',
        f'{plan["parameters"]:,} parameters; {plan["tokens_per_step"]:,} tokens a step in '
        f'{plan["accumulation_steps"]} x {plan["micro_batch_size"]} sequences a GPU; remat {plan["remat"]}',
        'kernels: ' + ', '.join(f'{op} {impl}' for op, impl in plan['kernels'].items()),
        'GFLOP a token: ' + ', '.join(f'{value / 1e9:.3f} ({name})' for name, value in plan['flops_per_token'].items()),
        f'GFLOP a token in the matrix products of the program: {plan["product_flops_per_token"] / 1e9:.3f}',
    ]
    if plan['xla_flags']:
        lines.append(f'from the environment: XLA_FLAGS={plan["xla_flags"]}')
    lines += [
        '',
        f'memory a GPU: {plan["peak_bytes_per_gpu"] / GIB:.2f} GiB of {plan["capacity_bytes"] / GIB:.2f} '
        f'({plan["memory_fraction"]:g} of the device, less {RESERVE_BYTES / GIB:g} GiB): {verdict}',
        *(f'  {size / GIB:8.2f} GiB  {part}' for part, size in plan['memory'].items() if size >= GIB / 200),
        '',
        'a GPU sends in a step:',
        *(
            f'  {row["bytes_per_step"] / 1e9:8.3f} GB  {row["count_per_step"]:6,} x {row["kind"]} {row["dtype"]} '
            f'over {row["axis"]}'
            for row in plan['collectives']
        ),
        *(
            f'  {rate / 1e9:8.3f} GB/s over {axis} on average'
            for axis, rate in plan['bytes_per_second_per_axis'].items()
        ),
        '',
        f'estimated: {plan["estimated_tokens_per_second"]:,.0f} tokens/s, '
        f'{plan["estimated_tokens_per_second_per_gpu"]:,.0f} a GPU; {plan["estimated_days"]:,.1f} days, '
        f'{plan["estimated_gpu_hours"]:,.0f} GPU-hours',
        *(f'  {seconds:8.3f} s a step  {kind}' for kind, seconds in plan['seconds_per_step'].items()),
        '',
        'GPU-hours per 300 B tokens (the others on A100, as published):',
        *(f'  {hours:8,.0f}  {name}' for name, hours in plan['gpu_hours_per_300b_tokens'].items()),
    ]
    return '\n'.join(lines)
