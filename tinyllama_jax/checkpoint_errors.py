"""What a failed read or write of a checkpoint means: damage, storage or memory that fails, a full disk.

orbax and tensorstore raise many kinds of errors, whose causes have to be looked for.
"""

import contextlib
import errno
import functools
import logging
import os
import pathlib
import re
import shutil
import sys
from collections.abc import Iterator

import jax

from tinyllama_jax import errors

_OS_ERROR = re.compile(r"os_error_code='(\d+)'")  # how tensorstore, whose errors are all ValueErrors, names errno
_MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)  # OSErrors that are damage


def damage(folder: pathlib.Path, damaged: dict[int, Exception]) -> str:
    """The sentence that names damaged checkpoints, {step: failure}, and what is wrong with the first."""
    step, error = next(iter(damaged.items()))
    reason = errors.first_line(error, limit=200)
    which = ', '.join(str(folder / str(step)) for step in damaged)
    return f'damaged checkpoint: {which} (step {step}: {reason}).'


def set_aside(folder: pathlib.Path, damaged: dict[int, Exception]) -> pathlib.Path:
    """Moves damaged checkpoints, {step: failure}, out of `folder`; returns where to. Several processes may do it."""
    aside = folder.with_name(folder.name + '-damaged')
    aside.mkdir(exist_ok=True)
    for step in map(str, damaged):
        with contextlib.suppress(FileNotFoundError):  # another process was quicker
            try:
                (folder / step).rename(aside / step)
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise
                shutil.rmtree(aside / step)  # of the same step, damaged before
                (folder / step).rename(aside / step)
    return aside


def moved(folder: pathlib.Path, damaged: dict[int, Exception]) -> errors.Unavailable:
    """The error of a process of several, after which all start again from the checkpoint before."""
    aside = set_aside(folder, damaged)
    return errors.Unavailable(
        f'{damage(folder, damaged)} Moved to {aside}; the same command goes on from the one before.'
    )


@contextlib.contextmanager
def reading(path: pathlib.Path, what: str) -> Iterator[None]:
    """A context that turns a failure to read `what` from `path` into Unavailable if its content is not to blame."""
    try:
        yield
    except errors.Failure:
        raise
    except Exception as error:
        if cause := _outside_cause(error) or _outside_cause(_unreadable(path)):
            reason = errors.first_line(cause, limit=300)
            raise errors.Unavailable(
                f'{path}: {what} cannot be read now ({reason}). Nothing was moved or changed. Mend the storage or its '
                'permissions or free memory, and run the same command again; to go on without it, move it away.'
            ) from error
        raise


def _outside_cause(error: BaseException | None) -> BaseException | None:
    """The error of storage, memory or a device behind `error`, if there is one."""
    while error is not None:
        code = _OS_ERROR.search(str(error))
        cause = OSError(int(code[1]), os.strerror(int(code[1]))) if code else error
        if isinstance(cause, OSError | MemoryError | jax.errors.JaxRuntimeError) and not isinstance(cause, _MISSING):
            return cause
        error = error.__cause__ or error.__context__
    return None


def _unreadable(folder: pathlib.Path) -> OSError | None:
    """Why the first that is unreadable in `folder` is so; orbax takes a folder that it cannot look at for missing."""

    def fail(error: OSError):
        raise error

    try:
        for parent, _, names in os.walk(folder, onerror=fail):
            for name in names:
                with open(os.path.join(parent, name), 'rb') as file:
                    file.read(1)
    except OSError as error:
        return error
    return None


class Writing:
    """A context that turns any failure to write a checkpoint into a RunError that names the folder."""

    def __init__(self, folder: pathlib.Path):
        self._folder = folder

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if isinstance(error, Exception) and not isinstance(error, errors.Failure):
            reason = errors.first_line(error, limit=300)
            raise errors.RunError(
                f'{self._folder}: a checkpoint could not be written ({type(error).__name__}: {reason}). Checkpoints '
                'that were complete before are untouched; make room or mend the storage and run the same command again.'
            ) from error


@functools.cache
def ignore_late_reads() -> None:
    """When a read fails orbax forgets the others, and closes the event loop they report to: not worth a traceback."""
    logging.getLogger('asyncio').setLevel(logging.CRITICAL)  # 'Task exception was never retrieved'
    before, late = sys.unraisablehook, ('Event loop is closed', 'Encountered error while reading array index')

    def hook(unraisable):
        if not str(unraisable.exc_value).startswith(late):
            before(unraisable)

    sys.unraisablehook = hook


def quiet_libraries() -> None:
    """Only errors of the libraries below are worth a line."""
    for name in ('absl', 'orbax'):
        logging.getLogger(name).setLevel(logging.ERROR)
