"""JAX's and XLA's settings."""

import os
import subprocess
import sys

import pytest

from tinyllama_jax import errors
from tinyllama_jax.process import xla


@pytest.mark.parametrize(('device', 'platforms'), [('there', None), ('missing', 'cpu')])
def test_without_an_nvidia_device_jax_is_told_so(device, platforms, tmp_path, monkeypatch):
    (tmp_path / 'there').touch()
    monkeypatch.setattr(xla, '_NVIDIA_DEVICES', (str(tmp_path / device),))
    monkeypatch.delenv('JAX_PLATFORMS', raising=False)
    xla.set_up_jax()
    assert os.environ.get('JAX_PLATFORMS') == platforms


@pytest.mark.parametrize('platforms', ['cuda', 'gpu', 'cuda,cpu'])
def test_gpus_that_are_not_there_are_named(platforms, tmp_path, monkeypatch):
    monkeypatch.setattr(xla, '_NVIDIA_DEVICES', (str(tmp_path / 'missing'),))
    monkeypatch.setattr(xla, '_AMD_DEVICE', str(tmp_path / 'missing'))
    monkeypatch.setenv('JAX_PLATFORMS', platforms)
    with pytest.raises(errors.UsageError, match=f'JAX_PLATFORMS={platforms}: this machine shows no NVIDIA device'):
        xla.set_up_jax()


FLAG = 'xla_gpu_enable_latency_hiding_scheduler'


@pytest.fixture
def with_a_gpu(tmp_path, monkeypatch):
    """A process that sees an NVIDIA device, and whose environment says nothing of GPUs."""
    (tmp_path / 'nvidiactl').touch()
    monkeypatch.setattr(xla, '_NVIDIA_DEVICES', (str(tmp_path / 'nvidiactl'),))
    for name in ('XLA_FLAGS', 'JAX_COMPILATION_CACHE_DIR', *xla._GPU_ENVIRONMENT):
        monkeypatch.setenv(name, '')  # so that the old value comes back
        monkeypatch.delenv(name)


def test_xla_knows_the_settings_for_gpus_and_they_are_shown(with_a_gpu, tmp_path):
    xla.set_up_jax(deterministic=True, compiled=tmp_path)
    flags = os.environ['XLA_FLAGS'].split()
    assert '--xla_gpu_exclude_nondeterministic_ops=true' in flags and f'--{FLAG}=true' in flags
    assert os.environ['JAX_COMPILATION_CACHE_DIR'] == str(tmp_path)
    assert all(flag in xla.gpu_settings() for flag in flags)
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION='0.9'" in xla.gpu_settings()
    program = 'import jax; jax.numpy.zeros(1) + 1'  # an unknown flag ends the process
    subprocess.run([sys.executable, '-c', program], check=True, env=os.environ | {'JAX_PLATFORMS': 'cpu'})


def test_the_environment_s_own_settings_win(with_a_gpu, monkeypatch):
    monkeypatch.setenv('XLA_FLAGS', f'--{FLAG}=false --xla_dump_to=x')
    monkeypatch.setenv('XLA_PYTHON_CLIENT_MEM_FRACTION', '0.5')
    xla.set_up_jax()
    flags = os.environ['XLA_FLAGS'].split()
    assert flags[:2] == [f'--{FLAG}=false', '--xla_dump_to=x'] and f'--{FLAG}=true' not in flags
    assert not any('nondeterministic' in flag for flag in flags)
    assert os.environ['XLA_PYTHON_CLIENT_MEM_FRACTION'] == '0.5'


def test_plan_s_flags_leave_out_what_the_environment_says(with_a_gpu, monkeypatch):
    monkeypatch.setenv('XLA_FLAGS', f'--{FLAG}=false --xla_gpu_exclude_nondeterministic_ops')
    flags = xla.gpu_xla_flags(deterministic=True)
    assert flags == {name: value for name, value in xla.GPU_XLA_FLAGS.items() if name != FLAG}


@pytest.mark.parametrize(('text', 'fraction'), [(None, 0.9), ('0.75', 0.75), ('1', 1.0)])
def test_the_share_of_memory_is_the_environment_s(with_a_gpu, monkeypatch, text, fraction):
    if text:
        monkeypatch.setenv('XLA_PYTHON_CLIENT_MEM_FRACTION', text)
    assert xla.memory_fraction() == fraction


@pytest.mark.parametrize('text', ['most', '0', '1.5', '-0.5', 'nan'])
def test_an_invalid_share_of_memory_is_refused(monkeypatch, text):
    monkeypatch.setenv('XLA_PYTHON_CLIENT_MEM_FRACTION', text)
    with pytest.raises(errors.UsageError, match=f'XLA_PYTHON_CLIENT_MEM_FRACTION={text}: give the share'):
        xla.memory_fraction()
