"""NVIDIA's driver on this host: its version, and whether the CUDA that jax brings can run on it."""

import importlib.metadata
import pathlib
import re
import subprocess

from tinyllama_jax import errors

_VERSION_FILE = pathlib.Path('/proc/driver/nvidia/version')
# jax's plugin -> the first driver that CUDA's compatibility table (CUDA toolkit release notes) has for it, on Linux.
_OLDEST = {'jax-cuda13-plugin': (580,), 'jax-cuda12-plugin': (525, 60, 13)}
_LIBRARIES = [f'nvidia-{name}-cu{cuda}' for name in ('nccl', 'cudnn') for cuda in (12, 13)]


def version() -> str | None:
    """The version of the driver, such as 580.65.06; None where there is none."""
    if _VERSION_FILE.exists() and (found := re.search(r'\b\d{3}\.\d+(\.\d+)*', _VERSION_FILE.read_text())):
        return found[0]
    try:  # in Windows' Linux there is no such file
        command = ['nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader']
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.split('\n')[0].strip() or None if done.returncode == 0 else None


def libraries() -> dict[str, str]:
    """Versions of jax's CUDA plugin and of NVIDIA's libraries that it brings, of those that are installed."""
    return {name: found for name in (*_OLDEST, *_LIBRARIES) if (found := _installed(name))}


def refuse_old(host: str) -> None:
    """Raises UsageError where the driver is older than the installed CUDA plugin of jax needs."""
    if (found := version()) is None:
        return
    for plugin, oldest in _OLDEST.items():
        if _installed(plugin) and tuple(map(int, found.split('.'))) < oldest:
            raise errors.UsageError(
                f'{host}: NVIDIA driver {found} is older than {".".join(map(str, oldest))}, the first that '
                f'{plugin} {_installed(plugin)} runs on; install a newer driver there, or a jax with an older CUDA.'
            )


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
