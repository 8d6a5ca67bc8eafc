"""The jail's own processes: their user, their common end, the reason when the jail cannot be set up."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time

import pytest

from eval_bridge.jail import jail, sandbox
from tests.conftest import ROOT
from tinyllama_jax import errors


@pytest.fixture(scope='module', autouse=True)
def _jail():
    try:
        sandbox.require()
    except errors.UsageError as error:
        pytest.skip(str(error))


def _start(program: str, **changes) -> subprocess.Popen:
    folders, links = sandbox._folders()
    order = {'program': program, 'secret': 7, 'folders': folders, 'links': links, 'packages': []}
    order |= dataclasses.asdict(sandbox.LIMITS) | changes
    command = [sys.executable, '-I', '-S', jail.__file__]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env={})
    process.stdin.write(json.dumps(order).encode())
    process.stdin.close()
    process.stdin = None  # communicate() would use the closed pipe
    return process


def _family(process: int) -> list[int]:
    """Returns the launcher, its child, its child's child and so on."""
    family = [process]
    while children := pathlib.Path(f'/proc/{family[-1]}/task/{family[-1]}/children').read_text().split():
        family.append(int(children[0]))
    return family


def _sleeping() -> tuple[subprocess.Popen, list[int]]:
    process = _start('import time; time.sleep(100)', wall_seconds=100)
    deadline = time.monotonic() + 60
    while len(family := _family(process.pid)) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(family) == 4
    return process, family


def test_the_program_is_another_user_and_has_no_capability():
    process, family = _sleeping()
    with process:
        deadline = time.monotonic() + 60
        while (status := _status(family[-1]))['CapEff'] != '0' * 16 and time.monotonic() < deadline:
            time.sleep(0.01)  # it is about to drop them
        process.kill()
    assert status['CapEff'] == status['CapPrm'] == '0' * 16 and status['NoNewPrivs'] == '1'
    own = os.getuid()
    assert status['Uid'].split() == [str(own or jail.USER)] * 4
    assert own or status['Groups'].strip() == ''


def _status(process: int) -> dict[str, str]:
    lines = pathlib.Path(f'/proc/{process}/status').read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(':') for line in lines)}


def test_all_ends_with_the_launcher():
    process, family = _sleeping()
    with process:
        assert process.stdout.read(7) == b'begun: '
        process.kill()
        assert process.stdout.read() == b''  # the pipe ends when no process holds it
    deadline = time.monotonic() + 60
    while any(pathlib.Path(f'/proc/{number}').exists() for number in family) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not [number for number in family if pathlib.Path(f'/proc/{number}').exists()]


@pytest.mark.parametrize(
    ('changes', 'reason'),
    [
        ({'folders': ['/nowhere/at/all']}, 'No such file or directory'),
        ({'disk_bytes': -1}, 'mounting tmpfs on /tmp/tmp: Invalid argument'),
    ],
)
def test_a_jail_that_cannot_be_set_up_gives_a_reason_and_no_verdict(changes, reason):
    output, said = _start('pass', **changes).communicate()
    assert output == b'' and reason in said.decode()


def test_a_verdict_needs_the_secret():
    for program, verdict in {'pass': b'passed', 'import os; os._exit(0)': b'failed', '1/0': b'failed'}.items():
        process = _start(program)
        assert (process.communicate(), process.returncode) == ((b'begun: ' + verdict, b''), 0)


_SEARCH = 'ctypes.CDLL(None).syscall({keyctl}, 10, ctypes.c_long(-3), b"user", b"tinyllama-jail", 0)'
_WITH_A_KEY = """
import ctypes, sys
from eval_bridge.jail import sandbox
call = ctypes.CDLL(None).syscall
call({keyctl}, 1, None)
call({keyctl} - 2, b"user", b"tinyllama-jail", b"x", ctypes.c_size_t(1), ctypes.c_long(-3))
print("kept" if {search} > 0 else "none", *sandbox.run(["import ctypes; assert {search} == -1"]))
"""


def test_the_caller_s_keys_are_out_of_reach():
    keyctl = jail._FORBIDDEN[os.uname().machine][1][-1]
    code = _WITH_A_KEY.format(keyctl=keyctl, search=_SEARCH.format(keyctl=keyctl).replace('"', "'"))
    run = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    if run.stdout.startswith('none'):
        pytest.skip('no key can be kept here')
    assert run.stdout == 'kept passed\n', run.stderr
