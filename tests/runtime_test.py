"""Stop signals, cores kept awake, versions and the commit."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT
from tinyllama_jax import errors, runtime


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_and_the_handlers_come_back(number):
    before = signal.getsignal(number)
    with runtime.StopSignals() as signals:
        assert signals.received is None
        os.kill(os.getpid(), number)
        assert signals.received == number
        assert signal.getsignal(number) == before  # a second one acts as before
    assert signal.getsignal(number) == before


def _with_ctrl_c(program, *prefix):
    """How a process ends that gets SIGINT when it has printed a line: (status, rest of stdout, stderr)."""
    command = [*prefix, sys.executable, '-c', f'import pathlib, time\nfrom tinyllama_jax import runtime\n{program}']
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    output, said = process.communicate(timeout=60)
    return process.returncode, output, said


def test_ctrl_c_ends_the_process_with_a_line_and_without_what_is_unfinished(tmp_path):
    (tmp_path / 'begun' / 'sub').mkdir(parents=True)
    (tmp_path / 'done').mkdir()
    program = f"""
runtime.end_on_ctrl_c('stopped here')
with runtime.unfinished(pathlib.Path({str(tmp_path / 'done')!r})):
    pass
try:
    with runtime.unfinished(pathlib.Path({str(tmp_path / 'begun')!r})):
        print('ready', flush=True)
        time.sleep(60)
except BaseException:
    print('as a library may that swallows all it sees')
"""
    assert _with_ctrl_c(program) == (130, '', 'stopped here\n')
    assert [path.name for path in tmp_path.iterdir()] == ['done']


def test_a_job_in_the_background_still_ignores_ctrl_c():
    program = "runtime.end_on_ctrl_c('stopped here')\nprint('ready', flush=True)\ntime.sleep(0.3)\nprint('done')"
    assert _with_ctrl_c(program, 'sh', '-c', 'trap "" INT; exec "$0" "$@"') == (0, 'done\n', '')


def test_where_it_is_asked_for_ctrl_c_is_a_keyboard_interrupt():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(KeyboardInterrupt), runtime.keyboard_interrupts():
            os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


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


FLAG = 'xla_gpu_enable_latency_hiding_scheduler'


@pytest.fixture
def with_a_gpu(tmp_path, monkeypatch):
    """A process that sees an NVIDIA device, and whose environment says nothing of GPUs."""
    (tmp_path / 'nvidiactl').touch()
    monkeypatch.setattr(runtime, '_NVIDIA_DEVICES', (str(tmp_path / 'nvidiactl'),))
    for name in ('XLA_FLAGS', 'JAX_COMPILATION_CACHE_DIR', *runtime._GPU_ENVIRONMENT):
        monkeypatch.setenv(name, '')  # so that the old value comes back
        monkeypatch.delenv(name)


def test_settings_for_gpus_are_known_to_xla_and_shown(with_a_gpu, tmp_path):
    runtime.set_up_jax(deterministic=True, compiled=tmp_path)
    flags = os.environ['XLA_FLAGS'].split()
    assert '--xla_gpu_exclude_nondeterministic_ops=true' in flags and f'--{FLAG}=true' in flags
    assert os.environ['JAX_COMPILATION_CACHE_DIR'] == str(tmp_path)
    assert all(flag in runtime.gpu_settings() for flag in flags)
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION='0.9'" in runtime.gpu_settings()
    program = 'import jax; jax.numpy.zeros(1) + 1'  # an unknown flag ends the process
    subprocess.run([sys.executable, '-c', program], check=True, env=os.environ | {'JAX_PLATFORMS': 'cpu'})


def test_the_environment_s_own_settings_win(with_a_gpu, monkeypatch):
    monkeypatch.setenv('XLA_FLAGS', f'--{FLAG}=false --xla_dump_to=x')
    monkeypatch.setenv('XLA_PYTHON_CLIENT_MEM_FRACTION', '0.5')
    runtime.set_up_jax()
    flags = os.environ['XLA_FLAGS'].split()
    assert flags[:2] == [f'--{FLAG}=false', '--xla_dump_to=x'] and f'--{FLAG}=true' not in flags
    assert not any('nondeterministic' in flag for flag in flags)
    assert os.environ['XLA_PYTHON_CLIENT_MEM_FRACTION'] == '0.5'


def test_plan_s_flags_leave_out_what_the_environment_says(with_a_gpu, monkeypatch):
    monkeypatch.setenv('XLA_FLAGS', f'--{FLAG}=false --xla_gpu_exclude_nondeterministic_ops')
    flags = runtime.gpu_xla_flags(deterministic=True)
    assert flags == {name: value for name, value in runtime.GPU_XLA_FLAGS.items() if name != FLAG}


@pytest.mark.parametrize(('text', 'fraction'), [(None, 0.9), ('0.75', 0.75), ('1', 1.0)])
def test_the_share_of_memory_is_the_environment_s(with_a_gpu, monkeypatch, text, fraction):
    if text:
        monkeypatch.setenv('XLA_PYTHON_CLIENT_MEM_FRACTION', text)
    assert runtime.memory_fraction() == fraction


@pytest.mark.parametrize('text', ['most', '0', '1.5', '-0.5', 'nan'])
def test_what_is_no_share_of_memory_is_refused(monkeypatch, text):
    monkeypatch.setenv('XLA_PYTHON_CLIENT_MEM_FRACTION', text)
    with pytest.raises(errors.UsageError, match=f'XLA_PYTHON_CLIENT_MEM_FRACTION={text}: give the share'):
        runtime.memory_fraction()


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
