"""Ctrl-C and SIGTERM: noted, raised, or the end of the process."""

import os
import signal
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tinyllama_jax.process import signals


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_and_the_handlers_come_back(number):
    before = signal.getsignal(number)
    with signals.StopSignals() as stop_signals:
        assert stop_signals.received is None
        os.kill(os.getpid(), number)
        assert stop_signals.received == number
        assert signal.getsignal(number) == before  # a second one acts as before
    assert signal.getsignal(number) == before


def _with_ctrl_c(program, *prefix):
    """Runs a process, sends it SIGINT after its first line, and returns (status, rest of stdout, stderr)."""
    command = [
        *prefix,
        sys.executable,
        '-c',
        f'import pathlib, time\nfrom tinyllama_jax.process import signals\n{program}',
    ]
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
signals.end_on_ctrl_c('stopped here')
with signals.unfinished(pathlib.Path({str(tmp_path / 'done')!r})):
    pass
try:
    with signals.unfinished(pathlib.Path({str(tmp_path / 'begun')!r})):
        print('ready', flush=True)
        time.sleep(60)
except BaseException:
    print('as a library may that swallows all it sees')
"""
    assert _with_ctrl_c(program) == (130, '', 'stopped here\n')
    assert [path.name for path in tmp_path.iterdir()] == ['done']


def test_a_job_in_the_background_still_ignores_ctrl_c():
    program = "signals.end_on_ctrl_c('stopped here')\nprint('ready', flush=True)\ntime.sleep(0.3)\nprint('done')"
    assert _with_ctrl_c(program, 'sh', '-c', 'trap "" INT; exec "$0" "$@"') == (0, 'done\n', '')


def test_where_it_is_asked_for_ctrl_c_is_a_keyboard_interrupt():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(KeyboardInterrupt), signals.keyboard_interrupts():
            os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
