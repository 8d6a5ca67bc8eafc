"""Whether a cluster is fit for a run, in a minute and before the real job: `main.py check`.

Says of each host its driver, devices, speed, files and clock, and of each mesh axis the bandwidth of its collectives
beside what a step needs: by the planner's account (`--plan`), or else by the parameters and gradients of the
configuration. That hosts agree in code and versions has been seen to when they joined (cluster.py).
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
_MFU = 0.5  # of a step whose time no plan says
_SKEW_SECONDS = 1.0  # logs of hosts further apart cannot be read beside one another
_SLOW_HOST = {'cpu': 0.25, 'gpu': 0.8}  # of the usual speed; a step waits for the slowest. CPUs have others to serve
_CHECKPOINT_SECONDS = 600.0


def check_run(config: Config, workdir: pathlib.Path, *, plan: str | None, members: Members) -> None:
    """Measures and prints a table.

    Raises RunError naming what would hold the run up, UsageError for what cannot run.
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
    """Prints a line for each process; returns what is wrong."""
    skews = measure.clock_skews(members)
    written, read = measure.files(workdir, _SIZES.get(platform, _SIZES['gpu'])[1], members)
    own = [driver.version(), jax.local_device_count(), written, read, measure.slowest_device(members)]
    rows, faults = members.gather('hosts', own), []
    checkpoint = 12 * sum(flops.parameter_counts(config.model).values())  # float32 parameters and both moments
    seconds = checkpoint / sum(row[2] for row in rows)
    usual = sorted(row[4] for row in rows)[len(rows) // 2]
    table = [('process', 'host', 'driver', 'devices', 'write', 'read', 'slowest device', 'clock')]
    for number, (host, row, skew) in enumerate(zip(members.hosts, rows, skews, strict=True)):
        version, devices, writes, reads, rate = row
        speed = f'{rate / 1e12:.3g} TFLOP/s'
        table.append((number, host, version or '-', devices, _rate(writes), _rate(reads), speed, f'{skew:+.3f} s'))
        if abs(skew) > _SKEW_SECONDS:
            faults.append(f'the clock of {host} is {skew:+.1f} s from that of {members.hosts[0]}; set it')
        if rate < _SLOW_HOST.get(platform, _SLOW_HOST['gpu']) * usual:
            faults.append(f'{host} is slow: {speed}, and {usual / 1e12:.3g} are usual; leave it out')
    if seconds > _CHECKPOINT_SECONDS:
        faults.append(f'{workdir} takes {seconds:,.0f} s to write a checkpoint of {_size(checkpoint)}')
    if members.primary:
        _print(table)
        print(f'a checkpoint of {_size(checkpoint)} takes {seconds:.3g} s to write to {workdir}', flush=True)
    return faults


def _check_collectives(size: int, needs: Sequence[dict], step_seconds: float | None, mesh, members) -> list[str]:
    """Prints a line for each collective on each axis; returns which take longer than a step."""
    table, faults = [('axis', 'collective', 'of', 'bandwidth', 'a step needs', 'takes')], []
    for axis, count in mesh.shape.items():
        if count == 1:
            continue
        total = 0.0
        for kind in measure.KINDS:
            rate, compiled = measure.collective(kind, axis, size, mesh, members)
            need = sum(row['bytes_per_step'] for row in needs if (_slowest(row['axis']), row['kind']) == (axis, kind))
            total += need / rate
            name = kind if compiled == kind else f'{kind} (as {compiled})'
            table.append((axis, name, _size(size), _rate(rate), _size(need), f'{need / rate:.3g} s'))
        if step_seconds and total > step_seconds:
            faults.append(
                f'the collectives of axis {axis} take {total:.3g} s, and a step without them {step_seconds:.3g} s; '
                'keep that axis within a node, or mend the network'
            )
    if members.primary:
        _print(table)
        if step_seconds:
            print(f'a step takes {step_seconds:.3g} s without waiting for them', flush=True)
    return faults


def _planned(path: str) -> tuple[list[dict[str, Any]], float | None]:
    """(collectives, seconds of a step) as `main.py plan --json` wrote them to a file."""
    try:
        plan = json.loads(pathlib.Path(path).read_text())
        return plan['collectives'], plan['tokens_per_step'] / plan['estimated_tokens_per_second']
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise errors.UsageError(f'--plan={path}: not what main.py plan --json prints ({error!r}).') from None


def _expected(config: Config, mesh) -> tuple[list[dict[str, Any]], float | None]:
    """The same by the parameters alone: gathered for the forward and the backward pass, their gradients reduced.

    Both once for each micro-batch (ZeRO-1 gathers once a step), in bytes of the compute dtype and of the gradients'.
    Activations that a step exchanges are in a plan only.
    """
    train, kind = config.train, mesh.devices.flat[0].device_kind
    micro_steps = max(train.global_batch_size // (train.micro_batch_size * sharding.batch_shards(mesh)), 1)
    compute = config.model.compute_dtype or ('bfloat16' if flops.peak_flops(kind) else 'float32')
    gathers = 1 if config.mesh.zero == 1 else 2 * micro_steps
    reduced = jnp.dtype(train.gradient_dtype or compute).itemsize * micro_steps
    needs = []
    for leaf in jax.tree.leaves(step_lib.abstract_state(config, mesh).params):
        axes = [axis for entry in leaf.sharding.spec if entry for axis in _names(entry)]
        for axis in sharding.BATCH:
            n = mesh.shape[axis]
            sent = leaf.size / math.prod(mesh.shape[other] for other in axes if other != axis) * (n - 1) / n
            if axis in axes:
                found = {'all-gather': gathers * jnp.dtype(compute).itemsize * sent, 'reduce-scatter': reduced * sent}
            else:
                found = {'all-reduce': 2 * reduced * sent}
            needs += [{'axis': axis, 'kind': name, 'bytes_per_step': count} for name, count in found.items()]
    peak = flops.peak_flops(kind)
    if peak is None:
        return needs, None
    work = train.global_batch_size * config.model.seq_len * flops.flops_per_token(config.model, 'C')
    return needs, work / (peak * _MFU * mesh.size)


def _slowest(axes: str) -> str:
    """The first, between nodes, of the axes that a plan names as `data+fsdp`."""
    return axes.partition('+')[0]


def _names(entry: str | tuple[str, ...]) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else entry


def _size(count: float) -> str:
    unit, name = next(((u, n) for u, n in ((1e9, 'GB'), (1e6, 'MB'), (1e3, 'kB')) if count >= u), (1, 'B'))
    return f'{count / unit:.3g} {name}'


def _rate(value: float) -> str:
    return f'{_size(value)}/s'


def _print(table: Sequence[Sequence[Any]]) -> None:
    """Columns as wide as their widest entry."""
    widths = [max(len(str(row[i])) for row in table) for i in range(len(table[0]))]
    for row in table:
        print('  '.join(str(entry).ljust(width) for entry, width in zip(row, widths, strict=True)).rstrip(), flush=True)
