"""The process a command runs in: JAX's and malloc's settings, cores kept awake, stop signals, versions, the commit."""

import atexit
import contextlib
import ctypes
import importlib.metadata
import os
import pathlib
import platform
import shutil
import signal
import subprocess

from tinyllama_jax import errors

_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'tensorstore', 'grain', 'numpy', 'sentencepiece')
_NVIDIA_DEVICES = ('/dev/nvidiactl', '/dev/dxg')  # Linux, and Linux in Windows
# glibc's mallopt: never take memory by mmap, never give it back, one arena for all threads.
_MALLOC_OPTIONS = ((-4, 0), (-1, 2_000_000_000), (-8, 1))
# For GPUs, unless XLA_FLAGS says otherwise; each is known to both versions of jaxlib.
GPU_XLA_FLAGS = {
    'xla_gpu_enable_latency_hiding_scheduler': 'true',  # collectives run beside matrix products
    # XLA 0.11.2 computes a product twice whose result is saved and used (plan counts its FLOPs: a sixth more).
    'xla_gpu_enable_dynamic_slice_fusion': 'false',
    'xla_gpu_all_gather_combine_threshold_bytes': str(128 << 20),  # a layer's weights at once: 88 MB in bfloat16
    'xla_gpu_reduce_scatter_combine_threshold_bytes': str(128 << 20),
    'xla_gpu_all_reduce_combine_threshold_bytes': str(128 << 20),
}
_DETERMINISTIC_XLA_FLAGS = {'xla_gpu_exclude_nondeterministic_ops': 'true'}
_GPU_ENVIRONMENT = {'XLA_PYTHON_CLIENT_MEM_FRACTION': '0.9', 'NCCL_NVLS_ENABLE': '1'}
_CPU_QUOTAS = ('/sys/fs/cgroup/cpu.max', '/sys/fs/cgroup/cpu/cpu.cfs_quota_us')  # of a container: cgroups v2, v1
_CPU_SET_BYTES = 128  # of the C library's cpu_set_t


def set_up_jax(*, deterministic: bool = False, compiled: pathlib.Path | None = None) -> None:
    """Chooses the platform and tunes for it; to be called before JAX is imported. The environment's own settings win.

    Without an NVIDIA device JAX is told so, which keeps an installed CUDA plugin quiet. Each step on
    a CPU allocates hundreds of megabytes anew; kept by malloc, they cost no page faults (a tenth of the demo's time).

    Args:
      deterministic: on GPUs, leave out operations whose sums come in any order.
      compiled: where compiled programs are kept, and with them what autotuning chose on these GPUs.
    """
    if any(os.path.exists(device) for device in _NVIDIA_DEVICES):
        _set_up_gpus(gpu_xla_flags(deterministic=deterministic), compiled)
    else:
        os.environ.setdefault('JAX_PLATFORMS', 'cpu')
    if platform.libc_ver()[0] == 'glibc':
        for option, value in _MALLOC_OPTIONS:
            ctypes.CDLL(None).mallopt(option, value)


def gpu_xla_flags(*, deterministic: bool) -> dict[str, str]:
    """What XLA is told on GPUs beside what XLA_FLAGS says already, by the name of the flag."""
    flags = GPU_XLA_FLAGS | (_DETERMINISTIC_XLA_FLAGS if deterministic else {})
    given = {flag.lstrip('-').partition('=')[0] for flag in os.environ.get('XLA_FLAGS', '').split()}
    return {name: value for name, value in flags.items() if name not in given}


def memory_fraction() -> float:
    """The share of a GPU's memory that JAX takes, as the environment says. Raises UsageError for what is no share."""
    name = 'XLA_PYTHON_CLIENT_MEM_FRACTION'
    text = os.environ.get(name) or _GPU_ENVIRONMENT[name]
    try:
        fraction = float(text)
    except ValueError:
        fraction = 0.0
    if not 0 < fraction <= 1:
        raise errors.usage(f'{name}={text}', "give the share of a GPU's memory that is for JAX, as 0.9")
    return fraction


def _set_up_gpus(flags: dict[str, str], compiled: pathlib.Path | None) -> None:
    given = os.environ.get('XLA_FLAGS', '').split()
    os.environ['XLA_FLAGS'] = ' '.join([*given, *(f'--{name}={value}' for name, value in flags.items())])
    for name, value in _GPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if compiled:
        os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(compiled.absolute()))


def gpu_settings() -> str:
    """One line with the environment's settings for GPUs, as `set_up_jax` and the user left them."""
    names = ('XLA_FLAGS', *_GPU_ENVIRONMENT, 'JAX_COMPILATION_CACHE_DIR')
    return 'environment: ' + ' '.join(f'{name}={os.environ[name]!r}' for name in names if name in os.environ)


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


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a run's numbers."""
    return {'python': platform.python_version()} | {name: importlib.metadata.version(name) for name in _PACKAGES}


def commit() -> str | None:
    """The code's git commit, with `+changes` if files differ from it.

    Outside a checkout TINYLLAMA_COMMIT (which launch/Dockerfile sets), or None.
    """
    here = pathlib.Path(__file__).parent

    def git(*arguments):
        return subprocess.run(
            ('git', '-C', here, *arguments), capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git('status', '--porcelain', '--untracked-files=no')
        return git('rev-parse', 'HEAD') + ('+changes' if changed else '')
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get('TINYLLAMA_COMMIT') or None


_unfinished = set()  # folders that Ctrl-C removes


def end_on_ctrl_c(line: str) -> None:
    """From now on Ctrl-C ends the process, with `line` on stderr and status 130, and removes what is `unfinished`.

    KeyboardInterrupt would be raised wherever Python happens to be: in callbacks and plugins
    that swallow it, in C++ that aborts, beside threads that crash while Python ends.
    """

    def end(number, _):
        signal.signal(number, signal.SIG_IGN)
        for folder in _unfinished:
            shutil.rmtree(folder, ignore_errors=True)
        os.write(2, f'{line}\n'.encode())
        os._exit(128 + number)

    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # of a job in the background
        signal.signal(signal.SIGINT, end)
        # The first of these callbacks comes last. After it Python would put the default back: death without a word.
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)


@contextlib.contextmanager
def unfinished(folder: pathlib.Path):
    """A context in which `folder` is being made, and Ctrl-C removes it."""
    _unfinished.add(folder)
    try:
        yield
    finally:
        _unfinished.discard(folder)


@contextlib.contextmanager
def keyboard_interrupts():
    """A context in which Ctrl-C raises KeyboardInterrupt, for work that has to be wound up."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class StopSignals:
    """A context in which SIGTERM and Ctrl-C set `received` (the signal's number) instead of killing the process.

    A second signal of the same kind acts as before, so that a stuck save can be broken off.
    """

    def __init__(self):
        self.received: int | None = None
        self._previous = {}

    def __enter__(self):
        self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number, _):
        self.received = number
        signal.signal(number, self._previous[number])
