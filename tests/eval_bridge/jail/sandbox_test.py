"""The jail: hostile programs stay inside and count as failed, good ones pass, without a jail nothing runs."""

import gzip
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import pytest

from eval_bridge.jail import sandbox
from tests.conftest import ROOT
from tinyllama_jax import errors

SHORT = sandbox.Limits(cpu_seconds=1, wall_seconds=4)
# What each tries: if it succeeded, it would reach its end, or this machine would suffer.
HOSTILE = {
    'bombs with forks': 'import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass',
    'outgrows the limit of processes': 'import os, time\nfor _ in range(40):\n    os.fork() or time.sleep(9)',
    'loops': 'while True: pass',
    'sleeps': 'import time; time.sleep(1000)',
    'allocates 10 GB': 'x = bytearray(10 ** 10); x[-1] = 1',
    'allocates 10 GB in steps': 'x = [bytearray(10 ** 8) for _ in range(100)]',
    'allocates 10 GB in files': 'import os\nfor _ in range(700): os.write(os.memfd_create("x"), bytes(15 * 10 ** 6))',
    'makes a file of memory': 'import os; os.memfd_create("x")',
    'allocates shared memory': 'import ctypes; assert ctypes.CDLL(None).shmget(0, 10 ** 6, 0o1600) >= 0',
    'writes outside': 'open({outside!r}, "w").write("x")',
    'writes into Python': 'import os, json; open(os.path.dirname(json.__file__) + "/jail.py", "w").write("x")',
    'fills the disk': 'open("/tmp/x", "wb").write(bytes(10 ** 8))',
    'fills it in files': 'for n in range(100): open(f"/tmp/{{n}}", "wb").write(bytes(10 ** 6))',
    'reads the environment': 'import os; assert os.environ["JAIL_SECRET"]',
    'reads it where Linux shows it': 'assert b"JAIL_SECRET" in open("/proc/{process}/environ", "rb").read()',
    "reads the user's files": 'open({secret!r}).read()',
    'looks around': 'import os; assert os.listdir({folder!r}) and os.listdir("/etc")',
    'kills its parent': 'import os, time\nos.kill(os.getppid(), 9)\ntime.sleep(1)\nassert os.getppid() != 1',
    'kills this process': 'import os; os.kill({process}, 9)',
    'kills everybody': 'import os; os.kill(-1, 9); assert False',
    'has process 1 look up': 'import os, time\nos.kill(1, 17)\ntime.sleep(1000)',
    'sends process 1 every signal': 'import os\nfor n in range(1, 32): os.kill(1, n)\nassert False',
    'limits process 1': 'import resource as r\nfor n in range(16): r.prlimit(1, n, (0, 0))\nassert False',
    'opens a socket': 'import socket; socket.create_connection(("127.0.0.1", {port}), timeout=1)',
    'becomes root': 'import os; os.setuid(0)',
    'mounts': 'import ctypes; assert ctypes.CDLL(None).mount(b"tmpfs", b"/tmp", b"tmpfs", 0, None) == 0',
    'exits in time': 'import sys; sys.exit(0)',
    'exits at once': 'import os; os._exit(0)',
    'is not a program': 'x = (',
}
GOOD = {
    'computes': 'assert sum(range(10 ** 5)) == 4999950000',
    'imports and writes': 'import json, pathlib\npathlib.Path("x").write_text("1")\nassert open("/tmp/x").read()',
    'outlives orphans': (
        'import os, time\nif not os.fork():\n    os.fork() or time.sleep(0.2)\n    os._exit(0)\ntime.sleep(0.5)'
    ),
    'ends its children': 'import os\nchild = os.fork() or os._exit(3)\nassert os.waitpid(child, 0)[1] >> 8 == 3',
}


@pytest.fixture(scope='module')
def jail():
    try:
        sandbox.require()
    except errors.UsageError as error:
        pytest.skip(str(error))


@pytest.fixture(scope='module')
def outcomes(jail, tmp_path_factory):
    """Name -> outcome of every program above, run together; checks that none did anything outside."""
    folder = tmp_path_factory.mktemp('home')
    (folder / 'id_rsa').write_text('secret')
    with socket.create_server(('127.0.0.1', 0)) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv('JAIL_SECRET', 'secret')
        values = {
            'outside': str(folder / 'outside'), 'secret': str(folder / 'id_rsa'), 'folder': str(folder),
            'port': server.getsockname()[1], 'process': os.getpid(),
        }  # fmt: skip
        programs = [program.format(**values) for program in HOSTILE.values()]
        outcomes = dict(zip(HOSTILE, sandbox.run(programs, limits=SHORT), strict=True))
        server.setblocking(False)
        with pytest.raises(BlockingIOError):  # no program connected
            server.accept()
    outcomes |= zip(GOOD, sandbox.run([*GOOD.values()]), strict=True)
    assert [path.name for path in folder.iterdir()] == ['id_rsa']
    return outcomes


@pytest.mark.parametrize('name', HOSTILE)
def test_a_program_fails_that(outcomes, name):
    assert outcomes[name] in (sandbox.FAILED, sandbox.TIMED_OUT)


@pytest.mark.parametrize('name', GOOD)
def test_a_program_passes_that(outcomes, name):
    assert outcomes[name] == sandbox.PASSED


def test_programs_of_root_get_no_memory_outside_the_limits(jail):
    if os.getuid():
        pytest.skip('only root may forbid System V segments')
    program = 'import ctypes; assert ctypes.CDLL(None).shmget(0, 4096, 0o1666) == -1'
    assert sandbox.run([program]) == [sandbox.PASSED]


def test_a_program_that_takes_too_long_is_timed_out(outcomes):
    assert {outcomes[name] for name in ('loops', 'sleeps', 'bombs with forks')} == {sandbox.TIMED_OUT}


def test_nothing_is_left_running(outcomes):
    running = [path for path in pathlib.Path('/proc').glob('[0-9]*/cmdline') if _is_jail(path)]
    assert not running


def _is_jail(path: pathlib.Path) -> bool:
    """Returns whether the process of `path` is a jail that this process started."""
    try:
        parent = int((path.parent / 'stat').read_text().rpartition(')')[2].split()[1])
        return b'jail.py' in path.read_bytes() and parent == os.getpid()
    except OSError:  # it has ended
        return False


def test_the_canonical_solutions_pass(jail, test_data_dir):
    lines = gzip.open(test_data_dir / 'eval/humaneval/HumanEval.jsonl.gz', 'rt').readlines()
    docs = [json.loads(line) for line in lines]
    parts = ('prompt', 'canonical_solution', 'test')
    programs = [''.join(doc[part] for part in parts) + f'\ncheck({doc["entry_point"]})' for doc in docs]
    outcomes = sandbox.run(programs)
    assert {doc['task_id']: outcome for doc, outcome in zip(docs, outcomes, strict=True)} == {
        f'HumanEval/{number}': sandbox.PASSED for number in range(164)
    }


def test_a_jail_that_fails_does_not_count_as_a_failed_program(jail, monkeypatch):
    monkeypatch.setattr(sys, 'executable', shutil.which('false'))
    with pytest.raises(errors.RunError, match=r'jail could not be set up \(exit status 1\)'):
        sandbox.run(['pass'])


def test_without_namespaces_nothing_runs(jail, tmp_path):
    if not shutil.which('unshare'):
        pytest.skip('util-linux has no unshare here')
    code = (
        'from eval_bridge.jail import sandbox\nfrom tinyllama_jax import errors\n'
        f'try:\n    sandbox.run(["open({str(tmp_path / "x")!r}, chr(119))"])\n'
        'except errors.UsageError as error:\n    print(error)'
    )
    shell = f'echo 0 > /proc/sys/user/max_user_namespaces && exec {sys.executable} -c "$0"'
    command = ['unshare', '--user', '--map-root-user', 'sh', '-c', shell, code]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if 'max_user_namespaces' in run.stderr:
        pytest.skip(f'namespaces cannot be forbidden for a test here: {run.stderr}')
    assert 'run only in a jail, which cannot be made here' in run.stdout, run.stderr
    assert 'unshare' in run.stdout and not list(tmp_path.iterdir())
