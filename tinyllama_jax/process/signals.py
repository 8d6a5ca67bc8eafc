"""Ctrl-C and SIGTERM: end at once, raise, or save first; folders that Ctrl-C removes."""

import atexit
import contextlib
import os
import pathlib
import shutil
import signal

_unfinished = set()  # folders that Ctrl-C removes


def end_on_ctrl_c(line: str) -> None:
    """From now on Ctrl-C ends the process, with `line` on stderr and status 130, and removes what is `unfinished`.

    KeyboardInterrupt would be raised wherever Python happens to be: in callbacks and plugins
    that swallow it, in C++ that aborts, beside threads that crash while Python ends.
    """

    def end(number, _):
        signal.signal(number, signal.SIG_IGN)
        for folder in _unfinished:
            shutil.rmtree(folder, ignore_errors=True)
        os.write(2, f'{line}\n'.encode())
        os._exit(128 + number)

    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # of a job in the background
        signal.signal(signal.SIGINT, end)
        # The first of these callbacks comes last. After it Python would put the default back: death without a word.
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)


@contextlib.contextmanager
def unfinished(folder: pathlib.Path):
    """A context in which `folder` is being made, and Ctrl-C removes it."""
    _unfinished.add(folder)
    try:
        yield
    finally:
        _unfinished.discard(folder)


@contextlib.contextmanager
def keyboard_interrupts():
    """A context in which Ctrl-C raises KeyboardInterrupt, for work that has to be wound up."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class StopSignals:
    """A context in which SIGTERM and Ctrl-C set `received` (the signal's number) instead of killing the process.

    A second signal of the same kind acts as before, so that a stuck save can be broken off.
    """

    def __init__(self):
        self.received: int | None = None
        self._previous = {}

    def __enter__(self):
        self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number, _):
        self.received = number
        signal.signal(number, self._previous[number])
