"""Measures a cluster for `check`: collectives, files, clocks and the speed of each device."""

import os
import pathlib
import re
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tinyllama_jax import errors
from tinyllama_jax.cluster.members import Members

KINDS = ('all-gather', 'reduce-scatter', 'all-reduce')
_SECONDS = 1.0  # a measurement is repeated for this long
_PRODUCTS = 9  # repetitions of a device's matrix product
_MATMUL = {'cpu': (256, jnp.float32), 'gpu': (4_096, jnp.bfloat16)}  # platform -> size, dtype


def collective(kind: str, axis: str, size: int, mesh: Mesh, members: Members) -> tuple[float, str]:
    """Measures a collective on `size` bytes along an axis: the slowest process's median of about a second.

    Returns (bytes a second, the collective that XLA compiled it to). The bytes are those that each of n devices must at
    least send: (n - 1) / n of the gathered or reduced array, twice that for an all-reduce (NCCL's tests call the rate
    bus bandwidth).
    """
    devices = mesh.shape[axis]
    columns = size // 4 // devices * devices
    sharded, replicated = NamedSharding(mesh, P(axis)), NamedSharding(mesh, P())
    if kind == 'all-gather':
        shape, function, out = (columns,), lambda x: x, replicated
    else:
        out = sharded if kind == 'reduce-scatter' else replicated
        shape, function = (devices, columns), lambda x: x.sum(0)
    array = jax.jit(lambda: jnp.ones(shape, jnp.float32), out_shardings=sharded)()
    compiled = jax.jit(function, in_shardings=sharded, out_shardings=out).lower(array).compile()
    names = re.findall(r'(all-gather|reduce-scatter|all-reduce)(?:-start)?\(', compiled.as_text() or '')
    sent = columns * 4 * (devices - 1) / devices * (2 if kind == 'all-reduce' else 1)
    _timed(compiled, array)  # the first run is slower
    once = max(members.gather(f'{kind} {axis} once', _timed(compiled, array)))
    times = [_timed(compiled, array) for _ in range(int(min(max(_SECONDS / once, 3), 50)))]  # equally often in all
    seconds = max(members.gather(f'{kind} {axis}', float(np.median(times))))
    return sent / seconds, ' + '.join(dict.fromkeys(names))


def files(folder: pathlib.Path, size: int, members: Members) -> tuple[float, float]:
    """Returns the bytes a second at which this process (writes, reads) files while all others do.

    Each process writes a file into `folder` and reads its neighbour's. Raises UsageError in all processes if one does
    not see its neighbour's file: the hosts do not share the folder.
    """
    number = members.place.process_id
    own, others = (folder / f'check-{i}.tmp' for i in (number, (number + 1) % members.count))
    folder.mkdir(parents=True, exist_ok=True)
    content = np.random.default_rng(number).bytes(size)
    members.gather('before writing', None)
    try:
        written = _write(own, content)
        members.gather('written', None)
        rates = members.gather('read', _read(others, size))
    finally:
        own.unlink(missing_ok=True)
    members.gather('removed', None)  # a process that raises ends the others at once
    if None in rates:
        reader = rates.index(None)
        neighbour = (reader + 1) % members.count
        raise errors.UsageError(
            f'process {reader} on {members.hosts[reader]} does not see in {folder} what process {neighbour} on '
            f'{members.hosts[neighbour]} has written there; --workdir must be a folder that all hosts share.'
        )
    return written, rates[number]


def _write(path: pathlib.Path, content: bytes) -> float:
    began = time.perf_counter()
    with open(path, 'wb') as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return len(content) / (time.perf_counter() - began)


def _read(path: pathlib.Path, size: int) -> float | None:
    """Reads a file of `size` bytes; returns bytes a second, None if there is no such file."""
    try:
        file = open(path, 'rb', buffering=0)
    except FileNotFoundError:
        return None
    with file:
        if hasattr(os, 'posix_fadvise'):  # read from storage, not from this host's memory
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        began, left = time.perf_counter(), size
        while left and (part := file.read(1 << 20)):
            left -= len(part)
    return size / (time.perf_counter() - began)


def clock_skews(members: Members, rounds: int = 9) -> list[float]:
    """Returns the seconds by which each process's clock is ahead of process 0's.

    The error is the difference between the times at which one message reaches the processes.
    """
    times = []
    for i in range(rounds):
        members.gather(f'now {i}', None)  # returns in all processes at about the same time
        times.append(members.gather(f'time {i}', time.time()))
    return np.median(np.array(times) - np.array(times)[:, :1], axis=0).tolist()


def slowest_device(members: Members) -> float:
    """Returns the FLOP/s of a matrix product on this process's slowest device; all processes measure at once."""
    size, dtype = _MATMUL.get(jax.default_backend(), _MATMUL['gpu'])
    product = jax.jit(lambda x: x @ x)
    members.gather('products', None)
    rates = []
    for device in jax.local_devices():
        x = jax.device_put(np.ones((size, size), dtype), device)
        times = [_timed(product, x) for _ in range(_PRODUCTS + 1)][1:]  # the first compiles
        rates.append(2 * size**3 / min(times))
    return min(rates)


def _timed(run: Callable, *arguments) -> float:
    began = time.perf_counter()
    jax.block_until_ready(run(*arguments))
    return time.perf_counter() - began
