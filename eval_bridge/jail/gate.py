"""Keeps tasks, while they score a model's answers, from running a program outside the jail.

The functions of a task get the model's texts, and reading a task's file cannot prove what they do with them. So
Python's audit events (PEP 578) are watched from the model's first answer on. To start a process is refused, and so is
to run code that did not come from a file that was there before. This does not hold a hostile task back, only one that
would run what the model wrote.
"""

import _posixsubprocess
import collections
import contextlib
import dataclasses
import pathlib
import stat
import sys
import threading
import time
import types
import weakref
from collections.abc import Iterator
from typing import Any

from tinyllama_jax import errors

_FORKING = 'eval_bridge.fork_exec'
_PROCESSES = {'os.exec', 'os.fork', 'os.forkpty', 'os.posix_spawn', 'os.spawn', 'os.system', 'pty.spawn'}
_PROCESSES |= {'subprocess.Popen', _FORKING}
_CODE = {'exec', 'function.__new__', 'object.__setattr__'}  # the last for __code__
_TEMPLATE = '<template>'  # the file that Jinja names for the code that it makes of a template
_CLASSES = {collections.__file__, dataclasses.__file__}  # make code for a class, of its fields' names


class _Watch:
    """What is watched, and the first thing that was refused.

    Attributes:
      outermost: the frame that watches.
      closed: whether the model has answered and is not at work.
      bystanders: threads that were there before and do the run's other work; those of tasks do not.
    """

    def __init__(self, tasks: str, outermost: types.FrameType):
        self.tasks, self.outermost, self.closed = tasks, outermost, False
        self.begun = time.time() - 0.02  # the clock of files is coarser
        others = {*threading.enumerate()} - {threading.current_thread(), *_of_tasks}
        self.bystanders = {thread.ident for thread in others}
        self.refused: errors.UsageError | None = None


_watch: _Watch | None = None
_installed = False
_jailing = threading.local()
_of_tasks: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


@contextlib.contextmanager
def watching(model: Any, tasks: str) -> Iterator[Any]:
    """A context in which `tasks`, whose names a refusal says, score the answers of `model`.

    Yields what is to be asked in the model's place. While the model itself works, anything may happen. Raises
    UsageError where a program would have run, even if the task caught that.
    """
    global _watch
    _install()
    _watch = watch = _Watch(tasks, sys._getframe(2))  # the caller of contextlib's __enter__
    try:
        with owning_threads():
            yield _Asked(model, watch)
    finally:
        _watch = None
        if watch.refused:
            raise watch.refused


@contextlib.contextmanager
def owning_threads() -> Iterator[None]:
    """A context in which tasks are imported or scored: a thread that begins in it and outlasts it is watched later."""
    before = {*threading.enumerate()}
    try:
        yield
    finally:
        _of_tasks.update({*threading.enumerate()} - before)


@contextlib.contextmanager
def starting_jail() -> Iterator[None]:
    """A context in which this thread may start a process: the jail's."""
    _jailing.now = True
    try:
        yield
    finally:
        _jailing.now = False


class _Asked:
    """Passes everything on to a model, and opens the gate while it works."""

    def __init__(self, model: Any, watch: _Watch):
        self._model, self._watch = model, watch

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._model, name)
        if not callable(value):
            return value

        def ask(*arguments, **options):
            self._watch.closed = False
            try:
                return value(*arguments, **options)
            finally:
                self._watch.closed = True

        return ask


def _install() -> None:
    """Sets the hook, once and for good: Python has no way to take one off."""
    global _installed
    if _installed:
        return
    _installed = True
    fork_exec = _posixsubprocess.fork_exec  # by which multiprocessing starts processes, without an event

    def audited(*arguments):
        sys.audit(_FORKING)
        return fork_exec(*arguments)

    _posixsubprocess.fork_exec = audited  # subprocess has the original, and an event of its own
    sys.addaudithook(_hook)


def _hook(event: str, arguments: tuple) -> None:
    watch = _watch
    if watch is None or not watch.closed or not (event in _CODE or event in _PROCESSES):
        return
    if threading.get_ident() in watch.bystanders or getattr(_jailing, 'now', False):
        return
    code = next((each for each in arguments if isinstance(each, types.CodeType)), None) if event in _CODE else None
    if event in _CODE and code is None:
        return
    frames = list(_frames(watch.outermost))
    if any(frame.f_code.co_name == '<module>' for frame in frames):  # a module is imported; that it is old was seen
        return
    if code:
        if (frames and frames[0].f_code.co_filename in _CLASSES) or _is_old(code.co_filename, watch.begun):
            return
        action = 'would run code that it made'
    else:
        action = f'would start a process ({event})'
    task = next((name for frame in frames if (name := _task(frame))), watch.tasks)
    watch.refused = watch.refused or errors.UsageError(
        f"the task {task} {action} while it scores the model's answers, and programs that a model wrote run only in "
        'our jail; leave the task out.'
    )
    raise watch.refused


def _is_old(file: str, begun: float) -> bool:
    """Returns whether code is older than the model's answers: Python's own, a template's, or a file's."""
    if file.startswith('<'):
        return file == _TEMPLATE or file.startswith('<frozen ')
    path = pathlib.Path(file)
    for there in (path, *path.parents):  # of a module in an archive, the archive is there
        with contextlib.suppress(OSError):
            status = there.stat()
            # Archives and copies keep the time of a file's content, but not that of its entry.
            return stat.S_ISREG(status.st_mode) and max(status.st_mtime, status.st_ctime) < begun
    return False


def _frames(outermost: types.FrameType) -> Iterator[types.FrameType]:
    """Yields the frames of this thread between an event and `outermost`, which another thread does not have."""
    frame = sys._getframe(2)
    while frame is not None and frame is not outermost:
        yield frame
        frame = frame.f_back


def _task(frame: types.FrameType) -> str | None:
    """Returns the name of the task whose method the frame runs, or that it works for."""
    objects = (frame.f_locals.get(name) for name in ('self', 'task'))
    return next((name for each in objects if (name := getattr(getattr(each, 'config', None), 'task', None))), None)
