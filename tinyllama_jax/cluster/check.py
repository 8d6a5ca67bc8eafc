"""The command `check`: tests in a minute, before the real job, whether a cluster is fit for a run.

Prints the driver, devices, speed, file rates and clock of each host, and the bandwidth of the collectives of each mesh
axis beside the bytes that a step needs: those of a plan (`--plan`), else an estimate from the configuration's
parameters and gradients. Differences in code and versions were refused when the processes joined (members.py).
"""

import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from tinyllama_jax import errors, flops, sharding
from tinyllama_jax import step as step_lib
from tinyllama_jax.cluster import driver, measure
from tinyllama_jax.cluster.members import Members
from tinyllama_jax.config import Config
from tinyllama_jax.process import versions

_SIZES = {'cpu': (1 << 20, 4 << 20), 'gpu': (256 << 20, 512 << 20)}  # bytes of a collective, and of a file
_MFU = 0.5  # assumed for the time of a step without a plan
_SKEW_SECONDS = 1.0  # with clocks further apart, logs of several hosts cannot be read side by side
_SLOW_HOST = {'cpu': 0.25, 'gpu': 0.8}  # of the median speed; a step waits for the slowest. CPUs may be shared
_CHECKPOINT_SECONDS = 600.0


def check_run(config: Config, workdir: pathlib.Path, *, plan: str | None, members: Members) -> None:
    """Measures the cluster and prints tables.

    Raises RunError that names what would slow the run down, and UsageError for what cannot run.
    """
    members.agree(libraries=driver.libraries())
    mesh = sharding.make_mesh(config.mesh)
    needs, step_seconds = _planned(plan) if plan else _expected(config, mesh)
    device, installed = mesh.devices.flat[0], versions.installed() | driver.libraries()
    if members.primary:
        print(f'{members}, {mesh.size} x {device.device_kind}', flush=True)
        print(', '.join(f'{name} {version}' for name, version in installed.items()), flush=True)
    faults = _check_hosts(workdir, config, device.platform, members)
    faults += _check_collectives(_SIZES.get(device.platform, _SIZES['gpu'])[0], needs, step_seconds, mesh, members)
    if faults:
        raise errors.RunError('check: ' + '; '.join(faults) + '.')
    if members.primary:
        print('check: nothing stands in the way of the run', flush=True)


def _check_hosts(workdir: pathlib.Path, config: Config, platform: str, members: Members) -> list[str]:
    """Prints a line for each process; returns the faults."""
    skews = measure.clock_skews(members)
    written, read = measure.files(workdir, _SIZES.get(platform, _SIZES['gpu'])[1], members)
    own = [driver.version(), jax.local_device_count(), written, read, measure.slowest_device(members)]
    measured, faults = members.gather('hosts', own), []
    checkpoint = 12 * sum(flops.parameter_counts(config.model).values())  # float32 parameters and both moments
    seconds = checkpoint / sum(values[2] for values in measured)
    median = sorted(values[4] for values in measured)[len(measured) // 2]
    table: list[tuple] = [('process', 'host', 'driver', 'devices', 'write', 'read', 'slowest device', 'clock')]
    for number, (host, values, skew) in enumerate(zip(members.hosts, measured, skews, strict=True)):
        version, devices, writes, reads, rate = values
        speed, clock = f'{rate / 1e12:.3g} TFLOP/s', f'{skew:+.3f} s'
        files = f'{_size(writes)}/s', f'{_size(reads)}/s'
        table.append((number, host, version or '-', devices, *files, speed, clock))
        if abs(skew) > _SKEW_SECONDS:
            faults.append(f'the clock of {host} is {skew:+.1f} s from that of {members.hosts[0]}; set it')
        if rate < _SLOW_HOST.get(platform, _SLOW_HOST['gpu']) * median:
            faults.append(f'{host} is slow: {speed}, and the median is {median / 1e12:.3g}; leave it out')
    if seconds > _CHECKPOINT_SECONDS:
        faults.append(f'{workdir} takes {seconds:,.0f} s to write a checkpoint of {_size(checkpoint)}')
    if members.primary:
        _print_table(table)
        print(f'a checkpoint of {_size(checkpoint)} takes {seconds:.3g} s to write to {workdir}', flush=True)
    return faults


def _check_collectives(size: int, needs: Sequence[dict], step_seconds: float | None, mesh, members) -> list[str]:
    """Prints a line for each collective on each axis; returns a fault for each axis that takes longer than a step."""
    table, faults = [('axis', 'collective', 'of', 'bandwidth', 'a step needs', 'takes')], []
    for axis, count in mesh.shape.items():
        if count == 1:
            continue
        total = 0.0
        for kind in measure.KINDS:
            rate, compiled = measure.collective(kind, axis, size, mesh, members)
            # A plan names several axes as `data+fsdp`; the first, between nodes, is the slowest.
            need = sum(
                entry['bytes_per_step']
                for entry in needs
                if (entry['axis'].partition('+')[0], entry['kind']) == (axis, kind)
            )
            total += need / rate
            name = kind if compiled == kind else f'{kind} (as {compiled})'
            table.append((axis, name, _size(size), f'{_size(rate)}/s', _size(need), f'{need / rate:.3g} s'))
        if step_seconds and total > step_seconds:
            faults.append(
                f'the collectives of axis {axis} take {total:.3g} s, and a step without them {step_seconds:.3g} s; '
                'keep that axis within a node, or mend the network'
            )
    if members.primary:
        _print_table(table)
        if step_seconds:
            print(f'a step takes {step_seconds:.3g} s without waiting for them', flush=True)
    return faults


def _planned(path: str) -> tuple[list[dict[str, Any]], float | None]:
    """Returns (collectives, seconds of a step) from a file that `main.py plan --json` wrote."""
    try:
        plan = json.loads(pathlib.Path(path).read_text())
        return plan['collectives'], plan['tokens_per_step'] / plan['estimated_tokens_per_second']
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise errors.UsageError(f'--plan={path}: not what main.py plan --json prints ({error!r}).') from None


def _expected(config: Config, mesh) -> tuple[list[dict[str, Any]], float | None]:
    """Estimates (collectives, seconds of a step) from the parameters alone.

    Weights are all-gathered for the forward and again for the backward pass, in the compute dtype, and gradients are
    reduced in theirs, once for each micro-batch; ZeRO-1 gathers once a step. Only a plan has the activations that a
    step exchanges. The seconds are None for a device whose peak is unknown.
    """
    train, kind = config.train, mesh.devices.flat[0].device_kind
    micro_steps = max(train.global_batch_size // (train.micro_batch_size * sharding.batch_shards(mesh)), 1)
    compute = config.model.compute_dtype or ('bfloat16' if flops.peak_flops(kind) else 'float32')
    gathers = 1 if config.mesh.zero == 1 else 2 * micro_steps
    reduced = jnp.dtype(train.gradient_dtype or compute).itemsize * micro_steps
    needs = []
    for leaf in jax.tree.leaves(step_lib.abstract_state(config, mesh).params):
        entries = [entry for entry in leaf.sharding.spec if entry]
        axes = [axis for entry in entries for axis in ((entry,) if isinstance(entry, str) else entry)]
        for axis in sharding.BATCH:
            n = mesh.shape[axis]
            sent = leaf.size / math.prod(mesh.shape[other] for other in axes if other != axis) * (n - 1) / n
            if axis in axes:
                counts = {'all-gather': gathers * jnp.dtype(compute).itemsize * sent, 'reduce-scatter': reduced * sent}
            else:
                counts = {'all-reduce': 2 * reduced * sent}
            needs += [{'axis': axis, 'kind': name, 'bytes_per_step': count} for name, count in counts.items()]
    peak = flops.peak_flops(kind)
    if peak is None:
        return needs, None
    work = train.global_batch_size * config.model.seq_len * flops.flops_per_token(config.model, 'C')
    return needs, work / (peak * _MFU * mesh.size)


def _size(count: float) -> str:
    unit, name = next(((u, n) for u, n in ((1e9, 'GB'), (1e6, 'MB'), (1e3, 'kB')) if count >= u), (1, 'B'))
    return f'{count / unit:.3g} {name}'


def _print_table(table: Sequence[Sequence[Any]]) -> None:
    widths = [max(len(str(row[i])) for row in table) for i in range(len(table[0]))]
    for row in table:
        print('  '.join(str(entry).ljust(width) for entry, width in zip(row, widths, strict=True)).rstrip(), flush=True)
