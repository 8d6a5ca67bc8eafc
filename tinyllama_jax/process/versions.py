"""The package versions and the git commit that determine a run's numbers."""

import importlib.metadata
import os
import pathlib
import platform
import subprocess

_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'tensorstore', 'grain', 'numpy', 'sentencepiece')


def installed() -> dict[str, str]:
    """Returns the versions of Python and of the packages that determine a run's numbers."""
    return {'python': platform.python_version()} | {name: importlib.metadata.version(name) for name in _PACKAGES}


def commit() -> str | None:
    """Returns the code's git commit, with `+changes` if files differ from it.

    Outside a checkout returns TINYLLAMA_COMMIT (which launch/Dockerfile sets), or None.
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
