"""Tells why a checkpoint cannot be read or written: damage, failing storage or memory, a full disk.

orbax and tensorstore raise errors of many kinds, so their causes are searched.
"""

import contextlib
import errno
import functools
import logging
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax

from tinyllama_jax import errors, storage

_T = TypeVar('_T')


def damage(folder: pathlib.Path, damaged: dict[int, Exception]) -> str:
    """Returns a sentence that names the damaged checkpoints, {step: error}, and the reason for the first."""
    step, error = next(iter(damaged.items()))
    reason = errors.first_line(error, limit=200)
    which = ', '.join(str(folder / str(step)) for step in damaged)
    return f'damaged checkpoint: {which} (step {step}: {reason}).'


def set_aside(folder: pathlib.Path, damaged: dict[int, Exception]) -> pathlib.Path:
    """Moves damaged checkpoints, {step: error}, out of `folder`; returns where to. Processes may call it at once."""
    aside = folder.with_name(folder.name + '-damaged')
    aside.mkdir(exist_ok=True)
    for step in map(str, damaged):
        with contextlib.suppress(FileNotFoundError):  # another process was quicker
            try:
                (folder / step).rename(aside / step)
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise
                shutil.rmtree(aside / step)  # an earlier damaged checkpoint of the same step
                (folder / step).rename(aside / step)
    return aside


def move_aside(folder: pathlib.Path, damaged: dict[int, Exception]) -> errors.Unavailable:
    """Moves damaged checkpoints away; returns the error that makes all processes restart from the one before."""
    aside = set_aside(folder, damaged)
    return errors.Unavailable(
        f'{damage(folder, damaged)} Moved to {aside}; the same command resumes from the one before.'
    )


def read(path: pathlib.Path, what: str, read: Callable[[], _T]) -> _T:
    """Returns `read()`, which reads `what` from `path`. Raises as `storage.retried` does."""
    return storage.retried(
        f'{path}: {what}',
        read,
        lambda error: _outside_cause(error) or _outside_cause(_unreadable(path)),
        otherwise='; to resume without it, move it away',
    )


def _outside_cause(error: BaseException | None) -> BaseException | None:
    """Returns the error of storage, memory or a device that caused `error`, if any."""
    if cause := storage.failure(error):
        return cause
    while error is not None:
        if isinstance(error, MemoryError | jax.errors.JaxRuntimeError):
            return error
        error = error.__cause__ or error.__context__
    return None


def _unreadable(folder: pathlib.Path) -> OSError | None:
    """Returns the error of the first unreadable file in `folder`, which orbax would report as missing."""

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


@contextlib.contextmanager
def writing(folder: pathlib.Path) -> Iterator[None]:
    """A context that raises RunError, naming the folder, if writing a checkpoint fails."""
    try:
        yield
    except errors.Failure:
        raise
    except Exception as error:
        reason = errors.first_line(error, limit=300)
        raise errors.RunError(
            f'{folder}: a checkpoint could not be written ({type(error).__name__}: {reason}). Checkpoints '
            'that were complete before are untouched; make room or mend the storage and run the same command again.'
        ) from error


@functools.cache
def ignore_late_reads() -> None:
    """Silences reads that end after another one failed: orbax has closed the event loop they report to by then."""
    logging.getLogger('asyncio').setLevel(logging.CRITICAL)  # 'Task exception was never retrieved'
    before, late = sys.unraisablehook, ('Event loop is closed', 'Encountered error while reading array index')

    def hook(unraisable):
        if not str(unraisable.exc_value).startswith(late):
            before(unraisable)

    sys.unraisablehook = hook
