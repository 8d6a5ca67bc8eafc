"""Keeps CPU cores awake while a step runs on them."""

import contextlib
import ctypes
import os
import pathlib

_CPU_QUOTAS = ('/sys/fs/cgroup/cpu.max', '/sys/fs/cgroup/cpu/cpu.cfs_quota_us')  # of a container: cgroups v2, v1
_CPU_SET_BYTES = 128  # of the C library's cpu_set_t


@contextlib.contextmanager
def awake_cores():
    """A context in which no core falls asleep while a CPU trains; yields how many it keeps awake.

    A step on a CPU is hundreds of short operations, between which one of XLA's threads often
    has nothing to do. A virtual machine then hands its core back to the host, and waking it
    takes up to half a millisecond: a fifth of the step. So each core gets a thread that spins
    while nothing else wants the core (SCHED_IDLE), much as OpenMP's threads wait by themselves.
    It is left out (0) off Linux, for accelerators, and under a CPU quota, which it would eat up.
    """
    wanted = hasattr(os, 'SCHED_IDLE') and os.environ.get('JAX_PLATFORMS') == 'cpu' and not _has_cpu_quota()
    locks = [lock for core in os.sched_getaffinity(0) if (lock := _spin_on(core))] if wanted else []
    try:
        yield len(locks)
    finally:
        for lock in locks:
            ctypes.CDLL(None).pthread_spin_unlock(lock)


_spin_locks = []  # threads on a busy core look at theirs long after it is unlocked


def _spin_on(core: int):
    """The lock that a new idle-priority thread on `core` spins on until it is unlocked; None if that is not allowed."""
    libc, thread, lock = ctypes.CDLL(None), ctypes.c_ulong(), ctypes.byref(ctypes.c_int())
    _spin_locks.append(lock)
    libc.pthread_spin_init(lock, 0)
    libc.pthread_spin_lock(lock)
    # A bare C thread, whose whole work is this call: it never waits for Python's own lock, nor holds it.
    spin = ctypes.cast(libc.pthread_spin_lock, ctypes.c_void_p)
    if libc.pthread_create(ctypes.byref(thread), None, spin, lock):
        return None
    libc.pthread_setaffinity_np(thread, _CPU_SET_BYTES, (1 << core).to_bytes(_CPU_SET_BYTES, 'little'))
    refused = libc.pthread_setschedparam(thread, os.SCHED_IDLE, ctypes.byref(ctypes.c_int(0)))
    libc.pthread_detach(thread)
    if refused:
        libc.pthread_spin_unlock(lock)
        return None
    return lock


def _has_cpu_quota() -> bool:
    """Whether this container may use less than the whole time of its cores."""
    quotas = [path.read_text() for path in map(pathlib.Path, _CPU_QUOTAS) if path.exists()]
    return any(not quota.startswith(('max', '-1')) for quota in quotas)
