"""Stop signals, versions and the commit."""

import os
import signal
import subprocess

import pytest

from tinyllama_jax import runtime


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_and_the_handlers_come_back(number):
    before = signal.getsignal(number)
    with runtime.StopSignals() as signals:
        assert signals.received is None
        os.kill(os.getpid(), number)
        assert signals.received == number
        assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)  # a second one acts as usual
    assert signal.getsignal(number) == before


def test_versions_name_what_decides_the_numbers():
    assert {'python', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy'} <= set(runtime.versions())


def test_the_commit_is_that_of_the_code():
    head = subprocess.run(['git', 'rev-parse', 'HEAD'], capture_output=True, text=True)
    if head.returncode:
        pytest.skip('the tests do not run in a git checkout')
    assert runtime.commit().removesuffix('+changes') == head.stdout.strip()


@pytest.mark.parametrize(('device', 'platforms'), [('there', None), ('missing', 'cpu')])
def test_without_an_nvidia_device_jax_is_told_so(device, platforms, tmp_path, monkeypatch):
    (tmp_path / 'there').touch()
    monkeypatch.setattr(runtime, '_NVIDIA_DEVICES', (str(tmp_path / device),))
    monkeypatch.delenv('JAX_PLATFORMS', raising=False)
    runtime.set_up_jax()
    assert os.environ.get('JAX_PLATFORMS') == platforms
