"""CPU cores kept awake."""

import contextlib
import os
import time

import pytest

from tinyllama_jax.process import cores


def _policies() -> list[int]:
    policies = []
    for thread in os.listdir('/proc/self/task'):
        with contextlib.suppress(ProcessLookupError):  # it ended since
            policies.append(os.sched_getscheduler(int(thread)))
    return policies


@pytest.mark.skipif(not hasattr(os, 'SCHED_IDLE'), reason='needs Linux')
class TestAwakeCores:
    @pytest.fixture(autouse=True)
    def on_a_cpu_without_quota(self, monkeypatch, tmp_path):
        monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
        monkeypatch.setattr(cores, '_CPU_QUOTAS', (str(tmp_path / 'quota'),))

    def test_each_core_gets_a_thread_of_idle_priority_for_the_time_of_the_context(self):
        core_count = len(os.sched_getaffinity(0))
        with cores.awake_cores() as count:
            assert count == core_count
            assert _policies().count(os.SCHED_IDLE) >= core_count
        deadline = time.monotonic() + 60  # on a busy machine idle threads end late
        while os.SCHED_IDLE in _policies() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert os.SCHED_IDLE not in _policies()

    @pytest.mark.parametrize(('quota', 'awake'), [('max 100000', True), ('200000 100000', False), ('-1', True)])
    def test_a_quota_is_not_eaten_up(self, quota, awake, tmp_path):
        (tmp_path / 'quota').write_text(quota)
        with cores.awake_cores() as count:
            assert (count > 0) is awake

    def test_an_accelerators_host_is_left_alone(self, monkeypatch):
        monkeypatch.setenv('JAX_PLATFORMS', 'cuda')
        with cores.awake_cores() as count:
            assert count == 0
