"""Stop signals, cores kept awake, versions and the commit."""

import os
import signal
import subprocess
import time

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


def _policies() -> list[int]:
    return [os.sched_getscheduler(int(thread)) for thread in os.listdir('/proc/self/task')]


@pytest.mark.skipif(not hasattr(os, 'SCHED_IDLE'), reason='needs Linux')
class TestAwakeCores:
    @pytest.fixture(autouse=True)
    def on_a_cpu_without_quota(self, monkeypatch, tmp_path):
        monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
        monkeypatch.setattr(runtime, '_CPU_QUOTAS', (str(tmp_path / 'quota'),))

    def test_each_core_gets_a_thread_of_idle_priority_for_the_time_of_the_context(self):
        cores = len(os.sched_getaffinity(0))
        with runtime.awake_cores() as count:
            assert count == cores
            assert _policies().count(os.SCHED_IDLE) >= cores
        deadline = time.monotonic() + 60  # on a busy machine idle threads end late
        while os.SCHED_IDLE in _policies() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert os.SCHED_IDLE not in _policies()

    @pytest.mark.parametrize(('quota', 'awake'), [('max 100000', True), ('200000 100000', False), ('-1', True)])
    def test_a_quota_is_not_eaten_up(self, quota, awake, tmp_path):
        (tmp_path / 'quota').write_text(quota)
        with runtime.awake_cores() as count:
            assert (count > 0) is awake

    def test_an_accelerators_host_is_left_alone(self, monkeypatch):
        monkeypatch.setenv('JAX_PLATFORMS', 'cuda')
        with runtime.awake_cores() as count:
            assert count == 0
