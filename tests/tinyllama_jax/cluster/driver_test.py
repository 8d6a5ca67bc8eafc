"""The driver's version, read from a file like the driver's, and the refusal of one too old for the installed jax."""

import pytest

from tinyllama_jax import errors
from tinyllama_jax.cluster import driver

FILE = """NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024
GCC version:  gcc version 12.2.0 (Debian 12.2.0-14)
"""
OPEN_FILE = 'NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (builder)\n'


@pytest.fixture
def given(monkeypatch, tmp_path):
    """given(text) writes the driver's file."""
    monkeypatch.setattr(driver, '_VERSION_FILE', tmp_path / 'version')
    return (tmp_path / 'version').write_text


@pytest.mark.parametrize(('text', 'version'), [(FILE, '535.183.01'), (OPEN_FILE, '580.65.06')])
def test_the_version_is_the_drivers(given, text, version):
    given(text)
    assert driver.version() == version


def test_without_a_driver_there_is_no_version_and_nothing_is_refused(given, monkeypatch, tmp_path):
    monkeypatch.setenv('PATH', str(tmp_path))  # no nvidia-smi either
    assert driver.version() is None
    driver.refuse_old('host-a')


@pytest.mark.parametrize(
    ('plugin', 'version', 'refused'),
    [
        ('jax-cuda13-plugin', '580.65.06', False),
        ('jax-cuda13-plugin', '575.57.08', True),
        ('jax-cuda12-plugin', '525.60.13', False),
        ('jax-cuda12-plugin', '525.60.11', True),
        ('jax-cuda12-plugin', '470.82', True),
        (None, '470.82', False),
    ],
)
def test_a_driver_too_old_for_the_installed_jax_is_refused_with_its_host(given, monkeypatch, plugin, version, refused):
    given(f'NVRM version: NVIDIA UNIX x86_64 Kernel Module  {version}  Sun\n')
    monkeypatch.setattr(driver, '_installed', lambda name: '0.11.2' if name == plugin else None)
    if not refused:
        driver.refuse_old('host-a')
        return
    with pytest.raises(errors.UsageError, match=f'host-a: NVIDIA driver {version} is older than .* {plugin} 0.11.2'):
        driver.refuse_old('host-a')
