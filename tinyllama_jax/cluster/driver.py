"""NVIDIA's driver on this host: its version, and whether jax's CUDA runs on it."""

import importlib.metadata
import pathlib
import re
import subprocess

from tinyllama_jax import errors

_VERSION_FILE = pathlib.Path('/proc/driver/nvidia/version')
# jax's plugin -> the oldest driver on Linux that CUDA's compatibility table (CUDA toolkit release notes) lists for it.
_OLDEST = {'jax-cuda13-plugin': (580,), 'jax-cuda12-plugin': (525, 60, 13)}
_LIBRARIES = [f'nvidia-{name}-cu{cuda}' for name in ('nccl', 'cudnn') for cuda in (12, 13)]


def version() -> str | None:
    """Returns the driver's version, such as 580.65.06; None without a driver."""
    if _VERSION_FILE.exists() and (match := re.search(r'\b\d{3}\.\d+(\.\d+)*', _VERSION_FILE.read_text())):
        return match[0]
    try:  # WSL has no such file
        command = ['nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader']
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.split('\n')[0].strip() or None if done.returncode == 0 else None


def libraries() -> dict[str, str]:
    """Returns the versions of jax's CUDA plugin and of NVIDIA's libraries, where installed."""
    return {name: number for name in (*_OLDEST, *_LIBRARIES) if (number := _installed(name))}


def refuse_old(host: str) -> None:
    """Raises UsageError if the driver is older than the installed CUDA plugin of jax needs."""
    if (driver := version()) is None:
        return
    for plugin, oldest in _OLDEST.items():
        if _installed(plugin) and tuple(map(int, driver.split('.'))) < oldest:
            raise errors.UsageError(
                f'{host}: NVIDIA driver {driver} is older than {".".join(map(str, oldest))}, the first that '
                f'{plugin} {_installed(plugin)} runs on; install a newer driver there, or a jax with an older CUDA.'
            )


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
