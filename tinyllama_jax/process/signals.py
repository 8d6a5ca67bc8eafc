"""What Ctrl-C and SIGTERM do: end the process, raise, or let it save first; which folders Ctrl-C removes."""

import atexit
import contextlib
import os
import pathlib
import shutil
import signal

_unfinished = set()  # folders that Ctrl-C removes
_stop_signals = []  # the StopSignals that are entered


def end_on_ctrl_c(line: str) -> None:
    """Makes Ctrl-C remove `unfinished` folders, print `line` on stderr and end the process with status 130.

    KeyboardInterrupt would be raised wherever Python happens to be: in callbacks and plugins
    that swallow it, in C++ that aborts, or beside threads that crash while Python exits.
    """

    def end(number, _):
        signal.signal(number, signal.SIG_IGN)
        for folder in _unfinished:
            shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # nobody reads standard error any more
            os.write(2, f'{line}\n'.encode())
        os._exit(128 + number)

    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # a background job keeps ignoring it
        signal.signal(signal.SIGINT, end)
        # atexit runs its first callback last. Without it Python restores the default: a late Ctrl-C kills silently.
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)


@contextlib.contextmanager
def unfinished(folder: pathlib.Path):
    """A context in which `folder` is incomplete: Ctrl-C removes it."""
    _unfinished.add(folder)
    try:
        yield
    finally:
        _unfinished.discard(folder)


@contextlib.contextmanager
def keyboard_interrupts():
    """A context in which Ctrl-C raises KeyboardInterrupt, for work that must clean up."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class StopSignals:
    """A context in which SIGTERM and Ctrl-C only set `received` to the signal's number.

    A second signal of the same kind has its previous effect, so that a user can interrupt a save that hangs.
    """

    def __init__(self):
        self.received: int | None = None
        self._previous = {}

    def __enter__(self):
        _stop_signals.append(self)
        self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        _stop_signals.remove(self)
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number, _):
        self.received = number
        signal.signal(number, self._previous[number])


def stopping() -> bool:
    """Returns whether a StopSignals context is entered and has received a signal."""
    return any(stop_signals.received for stop_signals in _stop_signals)
