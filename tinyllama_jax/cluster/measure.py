"""What a cluster can do, measured in seconds: collectives, files, clocks, the devices one by one."""

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
_SECONDS = 1.0  # of repetitions of one measurement
_PRODUCTS = 9
_MATMUL = {'cpu': (256, jnp.float32), 'gpu': (4_096, jnp.bfloat16)}  # platform -> size, dtype


def _seconds(run: Callable, members: Members, name: str) -> float:
    """The median time of `run`, repeated for about a second and equally often by all, of the slowest process."""
    _timed(run)
    once = max(members.gather(f'{name} once', _timed(run)))
    times = [_timed(run) for _ in range(int(min(max(_SECONDS / once, 3), 50)))]
    return max(members.gather(name, float(np.median(times))))


def collective(kind: str, axis: str, size: int, mesh: Mesh, members: Members) -> tuple[float, str]:
    """(bytes a second over each device's links, what XLA compiled it to) of a collective on `size` bytes along an axis.

    The bytes are those that each of n devices must send in the best case: (n - 1) / n of the gathered or reduced
    array, twice that for an all-reduce (NCCL's tests call it bus bandwidth).
    """
    devices = mesh.shape[axis]
    columns = size // 4 // devices * devices
    split, whole = NamedSharding(mesh, P(axis)), NamedSharding(mesh, P())
    if kind == 'all-gather':
        shape, function, out = (columns,), lambda x: x, whole
    else:
        shape, function, out = (devices, columns), lambda x: x.sum(0), split if kind == 'reduce-scatter' else whole
    array = jax.jit(lambda: jnp.ones(shape, jnp.float32), out_shardings=split)()
    compiled = jax.jit(function, in_shardings=split, out_shardings=out).lower(array).compile()
    found = re.findall(r'(all-gather|reduce-scatter|all-reduce)(?:-start)?\(', compiled.as_text() or '')
    sent = columns * 4 * (devices - 1) / devices * (2 if kind == 'all-reduce' else 1)
    seconds = _seconds(lambda: compiled(array), members, f'{kind} {axis}')
    return sent / seconds, ' + '.join(dict.fromkeys(found))


def files(folder: pathlib.Path, size: int, members: Members) -> tuple[float, float]:
    """(written, read) bytes a second of this process, with all at it at once.

    Each writes a file into `folder` and reads its neighbour's. Raises UsageError in all where one does not see that:
    the folder is not the same for all.
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
    members.gather('removed', None)  # one that raises ends the others at once
    if None in rates:
        blind = rates.index(None)
        neighbour = (blind + 1) % members.count
        raise errors.UsageError(
            f'process {blind} on {members.hosts[blind]} does not see in {folder} what process {neighbour} on '
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
    """Bytes a second; None where there is no such file."""
    try:
        file = open(path, 'rb', buffering=0)
    except FileNotFoundError:
        return None
    with file:
        if hasattr(os, 'posix_fadvise'):  # not out of this host's memory
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        began, left = time.perf_counter(), size
        while left and (part := file.read(1 << 20)):
            left -= len(part)
    return size / (time.perf_counter() - began)


def clock_skews(members: Members, rounds: int = 9) -> list[float]:
    """Seconds by which each process's clock is ahead of process 0's, as exact as messages arrive at the same time."""
    times = []
    for i in range(rounds):
        members.gather(f'now {i}', None)  # returns in all processes at about the same time
        times.append(members.gather(f'time {i}', time.time()))
    return np.median(np.array(times) - np.array(times)[:, :1], axis=0).tolist()


def slowest_device(members: Members) -> float:
    """FLOP/s of a matrix product on the slowest of this process's devices, one after another; all processes at once."""
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
