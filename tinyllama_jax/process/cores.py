"""Keeps CPU cores awake while steps run on them."""

import contextlib
import ctypes
import os
import pathlib

_CPU_QUOTAS = ('/sys/fs/cgroup/cpu.max', '/sys/fs/cgroup/cpu/cpu.cfs_quota_us')  # a container's: cgroups v2, v1
_CPU_SET_BYTES = 128  # size of the C library's cpu_set_t


@contextlib.contextmanager
def awake_cores():
    """A context in which no CPU core falls asleep; yields the number of cores it keeps awake.

    A step on a CPU is hundreds of short operations, and between them XLA's threads are often
    idle. A virtual machine then hands the idle core back to its host, and waking it takes up
    to half a millisecond: a fifth of the step. So each core gets a thread that spins while
    nothing else wants the core (SCHED_IDLE), as OpenMP's threads do on their own. There are
    none (0) outside Linux, with accelerators, and under a CPU quota, which they would use up.
    """
    quotas = [path.read_text() for path in map(pathlib.Path, _CPU_QUOTAS) if path.exists()]
    unlimited = all(quota.startswith(('max', '-1')) for quota in quotas)
    wanted = unlimited and hasattr(os, 'SCHED_IDLE') and os.environ.get('JAX_PLATFORMS') == 'cpu'
    locks = [lock for core in os.sched_getaffinity(0) if (lock := _spin_on(core))] if wanted else []
    try:
        yield len(locks)
    finally:
        for lock in locks:
            ctypes.CDLL(None).pthread_spin_unlock(lock)


def _spin_on(core: int):
    """Starts an idle-priority thread that spins on `core` until the returned lock is unlocked; None if not allowed."""
    libc, thread = ctypes.CDLL(None), ctypes.c_ulong()
    libc.calloc.restype = ctypes.c_void_p
    # Never freed: on a busy core the thread reads its lock long after it was unlocked, even while Python shuts down.
    lock = ctypes.c_void_p(libc.calloc(1, ctypes.sizeof(ctypes.c_int)))
    libc.pthread_spin_init(lock, 0)
    libc.pthread_spin_lock(lock)
    # A bare C thread that only makes this call: it neither waits for Python's own lock nor holds it.
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
