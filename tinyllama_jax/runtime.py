"""The process a command runs in: stop signals, versions, the commit."""

import importlib.metadata
import pathlib
import platform
import signal
import subprocess

_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'tensorstore', 'grain', 'numpy', 'sentencepiece')


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
