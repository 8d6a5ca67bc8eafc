"""The exceptions that end a command on purpose, each with its exit status.

`main.py` prints the message of a `Failure` on stderr, without a traceback, and
exits with its `exit_code` (docs/design.md has the table). Any other exception is a
bug of ours and keeps its traceback.
"""


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
