"""The exceptions that end a command on purpose, each with its exit status.

`main.py` prints the message of a `Failure` on stderr, without a traceback, and
exits with its `exit_code` (docs/design.md has the table). Any other exception is a
bug of ours and keeps its traceback, except what `foreseen` knows.
"""

import errno
import os

# What may be wrong with a file without a fault of ours.
_NOT_WRITABLE = 'EACCES EPERM EROFS ENOTDIR EISDIR ENAMETOOLONG ELOOP EBUSY'.split()
_FAILING = 'ENOSPC EDQUOT EIO ESTALE'.split()


class Failure(Exception):
    """A foreseen failure whose message tells the user what to do."""

    exit_code = 1


class RunError(Failure):
    """The run failed: a non-finite loss, a full disk, a corrupted chunk."""


class UsageError(Failure, ValueError):
    """Bad usage, config or input: names the field or file, the value and the remedy."""

    exit_code = 2


class DoesNotFit(Failure):
    """A plan whose program needs more memory than the GPUs have."""

    exit_code = 3


class Unavailable(Failure):
    """A cause outside the run: storage, memory, a device, another process. A restart may succeed."""

    exit_code = 75  # sysexits.h: EX_TEMPFAIL


class Stopped(Failure):
    """The run was told to stop, and has saved; the exit status is 128 + `signal_number`."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_code = 128 + signal_number


def usage(where: str, problem: str) -> UsageError:
    """Returns a UsageError whose message begins with `where`, the flag or field it is about."""
    return UsageError(f'{where}: {problem}.')


def first_line(error: BaseException, *, limit: int | None = None) -> str:
    """Returns the first line of an exception's text, or its type's name if it has none; at most `limit` characters."""
    lines = str(error).strip().splitlines()
    return lines[0][:limit] if lines else type(error).__name__


def foreseen(error: BaseException) -> BaseException:
    """Returns a Failure if the cause of `error` is a file, a disk or a device of this machine, else `error` itself."""
    if isinstance(error, OSError):
        name = errno.errorcode.get(error.errno or 0)
        where = error.filename if error.filename is not None else 'a file'
        if name in _NOT_WRITABLE and error.filename is not None:
            return usage(where, f'{error.strerror}; give a path that can be read and written')
        if name in _FAILING:
            return RunError(f'{where}: {error.strerror}; make room, or mend the disk.')
    setting = next((name for name in ('JAX_PLATFORMS', 'JAX_PLATFORM_NAME') if os.environ.get(name)), None)
    chain: BaseException | None = error  # libraries ask for the platform again, and JAX then fails in other ways
    while setting and chain:
        if isinstance(chain, RuntimeError) and ('initialize backend' in str(chain) or 'Unknown backend' in str(chain)):
            return usage(f'{setting}={os.environ[setting]}', f'{first_line(chain).rstrip(".")}; unset it, or set cpu')
        chain = chain.__cause__ or chain.__context__
    return error
