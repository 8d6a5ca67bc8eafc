"""The process a command runs in: JAX's and malloc's settings, stop signals, versions, the commit."""

import ctypes
import importlib.metadata
import os
import pathlib
import platform
import signal
import subprocess

_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'tensorstore', 'grain', 'numpy', 'sentencepiece')
_NVIDIA_DEVICES = ('/dev/nvidiactl', '/dev/dxg')  # Linux, and Linux in Windows
# glibc's mallopt: never take memory by mmap, never give it back, one arena for all threads.
_MALLOC_OPTIONS = ((-4, 0), (-1, 2_000_000_000), (-8, 1))


def set_up_jax() -> None:
    """Chooses the platform and tunes for CPUs; to be called before JAX is imported.

    Without an NVIDIA device JAX is told so, which keeps an installed CUDA plugin quiet. What
    JAX_PLATFORMS and XLA_FLAGS already say wins. Each step on a CPU allocates hundreds of
    megabytes anew; kept by malloc, they cost no page faults (a tenth of the demo's time).
    """
    if not any(os.path.exists(device) for device in _NVIDIA_DEVICES):
        os.environ.setdefault('JAX_PLATFORMS', 'cpu')
    if platform.libc_ver()[0] == 'glibc':
        for option, value in _MALLOC_OPTIONS:
            ctypes.CDLL(None).mallopt(option, value)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a run's numbers."""
    return {'python': platform.python_version()} | {name: importlib.metadata.version(name) for name in _PACKAGES}


def commit() -> str | None:
    """The code's git commit, with `+changes` if files differ from it; None outside a checkout."""
    here = pathlib.Path(__file__).parent

    def git(*arguments):
        return subprocess.run(
            ('git', '-C', here, *arguments), capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git('status', '--porcelain', '--untracked-files=no')
        return git('rev-parse', 'HEAD') + ('+changes' if changed else '')
    except (OSError, subprocess.CalledProcessError):
        return None


class StopSignals:
    """A context in which SIGTERM and Ctrl-C set `received` (the signal's number) instead of killing the process.

    A second signal of the same kind acts as usual, so that a stuck save can be broken off.
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
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
