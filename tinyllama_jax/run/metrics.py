"""What a run says about itself while it runs: entries of scalars to every sink, lines on the terminal, throughput.

Sinks are passengers: one that fails never ends or delays the run. What it could not take waits in memory, and it is
tried again. `records` reads the files back.
"""

import collections
import contextlib
import errno
import os
import pathlib
import socket
import struct
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import tqdm

from tinyllama_jax import errors
from tinyllama_jax.config import Config
from tinyllama_jax.run import records

_MOST_WAITING = 20_000  # entries that wait for a sink: a day of five-second steps
_SAID_EVERY_S = 60.0  # while a sink fails


class Sink(Protocol):
    """A destination of entries. What it raises is said, and the entry is given again with the next one."""

    def write(self, entry: dict[str, Any]) -> None:
        """Takes an entry: its `step` and scalars, which may be nested in dictionaries."""

    def sync(self) -> None:
        """Returns when all entries are on disk, or wherever they are kept."""

    def close(self) -> None:
        """Closes it."""


class _Appended:
    """A file to whose end a record is written as a whole, or not at all."""

    def __init__(self, path: pathlib.Path):
        self._path, self._file = path, open(path, 'ab', buffering=0)

    def append(self, record: bytes) -> None:
        """Appends a record. Raises OSError."""
        end = self._file.seek(0, os.SEEK_END)
        try:
            written = self._file.write(record)
            if written < len(record):  # no room for the rest: writing it raises
                self._file.write(record[written:])
        except OSError:
            self._file.truncate(end)
            raise

    def sync(self) -> None:
        """Returns when all records are on disk. Raises OSError, also if another file has the name now."""
        os.fsync(self._file.fileno())
        if not self._path.exists() or not os.path.samestat(self._path.stat(), os.fstat(self._file.fileno())):
            self._file.close()
            self._file = open(self._path, 'ab', buffering=0)
            raise FileNotFoundError(errno.ENOENT, 'it was removed; a new one is begun')

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class JsonLines(_Appended, Sink):
    """One JSON object per line of a file."""

    def write(self, entry: dict[str, Any]) -> None:
        """Appends the entry."""
        self.append(records.line(entry))


class TensorBoard(_Appended, Sink):
    """An event file of TensorBoard; nested dictionaries become paths such as loss/web.

    The calling thread writes it: tensorboardX's own thread ends on an error, or when the clock is set back, and its
    full queue then holds the caller for ever.
    """

    def __init__(self, folder: pathlib.Path, *, start_step: int):
        # tensorboardX imports torch where it is installed, for annotations only; that takes more than a second.
        torch = sys.modules.setdefault('torch', None)  # pyrefly: ignore  # None: an import fails as if not installed
        try:
            from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyrefly: ignore  # generated
            from tensorboardX.record_writer import masked_crc32c
        finally:
            if torch is None:
                del sys.modules['torch']
        self._make_event, self._checksum = Event, masked_crc32c
        folder.mkdir(parents=True, exist_ok=True)
        seconds, unique = int(time.time()), f'{os.getpid()}.{time.monotonic_ns()}'
        super().__init__(folder / f'events.out.tfevents.{seconds}.{socket.gethostname()}.{unique}')
        try:
            self._event(file_version='brain.Event:2')
            # TensorBoard forgets what earlier files say of the steps from here on.
            self._event(step=start_step + 1, session_log={'status': SessionLog.START})
        except OSError:
            self.close()
            self._path.unlink(missing_ok=True)
            raise

    def write(self, entry: dict[str, Any]) -> None:
        """Adds the scalars of the entry."""
        scalars = [(name, value) for name, value in _flat(entry) if name != 'step' and isinstance(value, int | float)]
        values = [{'tag': name, 'simple_value': value} for name, value in scalars]
        self._event(step=entry['step'], summary={'value': values})

    def _event(self, **fields) -> None:
        """Appends an event in TensorFlow's record format: its length and its content, each with a checksum."""
        content = self._make_event(wall_time=time.time(), **fields).SerializeToString()
        parts = struct.pack('<Q', len(content)), content
        self.append(b''.join(part + struct.pack('<I', self._checksum(part)) for part in parts))


def sinks(path: pathlib.Path, config: Config, *, start_step: int) -> dict[str, Callable[[], Sink]]:
    """Returns {name: how it is made} of the sinks for the entries of `path` (WORKDIR/metrics.jsonl and the like).

    The first is `path` itself, from which a run resumes. Another sink is a class above and an entry here.
    """
    del config  # no sink depends on it yet
    board = path.parent / 'tensorboard' / path.stem
    return {str(path): lambda: JsonLines(path), str(board): lambda: TensorBoard(board, start_step=start_step)}


class Writer:
    """Writes entries to every sink, and never raises: those that a sink cannot take wait for it."""

    def __init__(self, path: pathlib.Path, config: Config, *, start_step: int):
        self._queues = [_Queue(*named) for named in sinks(path, config, start_step=start_step).items()]

    def write(self, entry: dict[str, Any]) -> None:
        """Writes an entry: its `step` and scalars, which may be nested in dictionaries."""
        for queue in self._queues:
            queue.put(entry)

    def sync(self) -> bool:
        """Returns, when the sinks have tried to keep all entries, whether the first, the run's own file, did."""
        first, *_ = [queue.empty(sync=True) for queue in self._queues]
        return first

    def close(self) -> None:
        """Writes what waits, and closes every sink."""
        for queue in self._queues:
            queue.empty(sync=True)
            queue.close()


class _Queue:
    """The entries that wait for a sink, and the sink while it works."""

    def __init__(self, name: str, make: Callable[[], Sink]):
        self._name, self._make = name, make
        self._waiting: collections.deque[dict[str, Any]] = collections.deque(maxlen=_MOST_WAITING)
        self._lost = 0  # entries dropped, the oldest first, since too many wait
        self._sink: Sink | None = None
        self._said: float | None = None  # when the failure was said, if it fails

    def put(self, entry: dict[str, Any]) -> None:
        """Adds an entry, and writes what waits."""
        self._lost += len(self._waiting) == _MOST_WAITING
        self._waiting.append(entry)
        self.empty()

    def empty(self, *, sync: bool = False) -> bool:
        """Writes what waits, to the disk if `sync`; returns whether the sink took it."""
        try:
            self._sink = self._sink or self._make()
            while self._waiting:
                self._sink.write(self._waiting[0])
                self._waiting.popleft()
            if sync:
                self._sink.sync()
        except Exception as error:  # a library's, too: whatever it is, the run goes on
            if self._said is None or time.monotonic() - self._said >= _SAID_EVERY_S:
                lost = f', {self._lost:,} older ones are lost' if self._lost else ''
                self._say(f'cannot be written ({errors.first_line(error)}); {len(self._waiting):,} entries wait{lost}')
                self._said = time.monotonic()
            return False
        if self._said is not None:
            self._say('is written again')
            self._said = None
        return True

    def close(self) -> None:
        """Closes the sink."""
        with contextlib.suppress(Exception):
            if self._sink:
                self._sink.close()

    def _say(self, line: str) -> None:
        tqdm.tqdm.write(f'{self._name} {line}', file=sys.stderr)


def _flat(entry: Mapping[str, Any], prefix: str = ''):
    for name, value in entry.items():
        if isinstance(value, dict):
            yield from _flat(value, f'{prefix}{name}/')
        else:
            yield prefix + name, value


class Throughput:
    """Tokens per second, and seconds lost to data and checkpoints, between two logged steps.

    Time that was `paused` (validation) is left out.
    """

    def __init__(self, clock=time.perf_counter):
        self._clock = clock
        self._start, self._lost = clock(), dict.fromkeys(('data', 'checkpoint', 'paused'), 0.0)

    @contextlib.contextmanager
    def timed(self, kind: str):
        """A context whose duration is counted as `data`, `checkpoint` or `paused`."""
        start = self._clock()
        try:
            yield
        finally:
            self._lost[kind] += self._clock() - start

    def lap(self, tokens: int) -> dict[str, float]:
        """Returns the figures since the last lap, in which `tokens` were trained on; starts the next lap."""
        seconds = max(self._clock() - self._start - self._lost['paused'], 1e-9)
        lap = {
            'tokens_per_second': tokens / seconds,
            'data_seconds': self._lost['data'],
            'checkpoint_seconds': self._lost['checkpoint'],
        }
        self._start, self._lost = self._clock(), dict.fromkeys(self._lost, 0.0)
        return lap


class Progress:
    """On a terminal a bar with loss, tokens/s and time to go; elsewhere a line per logged step."""

    def __init__(self, start: int, stop: int, *, tokens_per_step: int):
        self._stop, self._tokens_per_step = stop, tokens_per_step
        self._bar = tqdm.tqdm(
            initial=start, total=stop, unit='step', disable=not sys.stderr.isatty(), dynamic_ncols=True
        )

    def update(self, entry: dict[str, Any]) -> None:
        """Shows a logged step's loss and speed, and the time to go."""
        step, rate = entry['step'], entry['tokens_per_second']
        text = f'loss {entry["loss"]:.4f}, {rate:,.0f} tokens/s'
        if not self._bar.disable:
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix_str(text)
            return
        minutes, seconds = divmod(round((self._stop - step) * self._tokens_per_step / rate), 60)
        self.say(f'step {step}/{self._stop}: {text}, {minutes // 60}:{minutes % 60:02}:{seconds:02} to go')

    def say(self, line: str) -> None:
        """Prints a line without tearing the bar."""
        tqdm.tqdm.write(line, file=sys.stderr)

    def close(self) -> None:
        """Closes the bar, which stays on the screen."""
        self._bar.close()
