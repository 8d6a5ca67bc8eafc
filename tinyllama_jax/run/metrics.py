"""What a run writes about itself: entries of scalars to every sink, lines on the terminal; and its throughput.

`WORKDIR/metrics.jsonl` holds one entry (a JSON object) per logged step, no step twice. On resume it is cut to the
checkpoint's step, and `Recomputed` compares the losses that were cut off with those computed again.
"""

import contextlib
import json
import os
import pathlib
import sys
import time
from typing import Any, Protocol

import tqdm

from tinyllama_jax import errors, files
from tinyllama_jax.config import Config


def read_entries(path: pathlib.Path) -> list[dict]:
    """Returns the entries of a metrics file, without a last line that a kill cut short.

    Raises UsageError naming the line that is not an entry.
    """
    entries = []
    lines = path.read_text(errors='replace').split('\n')[:-1] if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line) if line else None
            if entry is not None and entry['step'] is not None:
                entries.append(entry)
        except (ValueError, KeyError, TypeError):
            where = f'line {number} is not an entry with a step: {line[:60]!r}'
            raise errors.usage(str(path), f'{where}; remove it') from None
    return entries


def cut_entries(path: pathlib.Path, step: int) -> list[dict]:
    """Atomically drops the entries after `step` from a metrics file; returns them."""
    entries = read_entries(path)
    if path.exists():
        files.write_atomically(path, ''.join(json.dumps(entry) + '\n' for entry in entries if entry['step'] <= step))
    return [entry for entry in entries if entry['step'] > step]


class Recomputed:
    """Losses that were logged before an interruption; computed again, they must have the same digits.

    Cuts `path` to `step`. The entries cut off are kept in a file beside it until their
    losses have been computed again, so that they survive further interruptions.
    """

    def __init__(self, path: pathlib.Path, step: int):
        self._kept = path.with_name('recompute.jsonl')
        later = [entry for entry in read_entries(path) if entry['step'] > step]
        entries = {entry['step']: entry for entry in [*read_entries(self._kept), *later] if entry['step'] > step}
        if later:
            files.write_atomically(self._kept, ''.join(json.dumps(entry) + '\n' for entry in entries.values()))
        cut_entries(path, step)
        self._losses = {step: entry['loss'] for step, entry in entries.items()}

    def forget(self) -> None:
        """Drops the losses, for a start whose losses may differ: other settings, versions or devices."""
        self._losses = {}
        self._kept.unlink(missing_ok=True)

    def compare(self, step: int, loss: float) -> None:
        """Raises RunError if another loss was logged for `step` before the interruption."""
        before = self._losses.pop(step, loss)
        if before != loss:
            raise errors.RunError(
                f'step {step}: the loss computed again after resuming is {loss!r}, but {before!r} was logged before '
                'the interruption with the same settings, versions and devices; the run is not reproducible here '
                f'(failing hardware, or changed data or code). To resume all the same, remove {self._kept}.'
            )
        if not self._losses:
            self._kept.unlink(missing_ok=True)


class Sink(Protocol):
    """A destination of entries. It may raise OSError."""

    def write(self, entry: dict[str, Any]) -> None:
        """Takes an entry: its `step` and scalars, which may be nested in dictionaries."""

    def sync(self) -> None:
        """Returns when all entries are on disk, or wherever they are kept."""

    def close(self) -> None:
        """Closes it."""


class JsonLines(Sink):
    """One JSON object per line of a file."""

    def __init__(self, path: pathlib.Path):
        self._file = open(path, 'a')

    def write(self, entry: dict[str, Any]) -> None:
        """Appends the entry and flushes it to the operating system."""
        self._file.write(json.dumps(entry) + '\n')
        self._file.flush()

    def sync(self) -> None:
        """Returns when all entries are on disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class TensorBoard(Sink):
    """Event files of TensorBoard; nested dictionaries become paths such as loss/web."""

    def __init__(self, folder: pathlib.Path, *, start_step: int):
        # tensorboardX imports torch where it is installed, for annotations only; that takes more than a second.
        torch = sys.modules.setdefault('torch', None)  # pyrefly: ignore  # None: an import fails as if not installed
        try:
            from tensorboardX import SummaryWriter
        finally:
            if torch is None:
                del sys.modules['torch']
        self._board = SummaryWriter(str(folder), purge_step=start_step + 1)

    def write(self, entry: dict[str, Any]) -> None:
        """Adds the scalars of the entry."""
        for name, value in _flat(entry):
            if name != 'step' and isinstance(value, int | float):
                self._board.add_scalar(name, value, entry['step'])

    def sync(self) -> None:
        """Flushes the event file."""
        self._board.flush()

    def close(self) -> None:
        """Flushes and closes the event file."""
        self._board.close()


def sinks(path: pathlib.Path, config: Config, *, start_step: int) -> list[Sink]:
    """Returns the sinks of the entries of `path` (WORKDIR/metrics.jsonl and the like), as `config` asks for them.

    Another sink is a class above and an entry here.
    """
    del config  # no sink depends on it yet
    return [JsonLines(path), TensorBoard(path.parent / 'tensorboard' / path.stem, start_step=start_step)]


class Writer:
    """Writes entries to every sink. Raises RunError if one cannot be written."""

    def __init__(self, path: pathlib.Path, config: Config, *, start_step: int):
        self._path, self._sinks = path, sinks(path, config, start_step=start_step)

    def write(self, entry: dict[str, Any]) -> None:
        """Writes an entry: its `step` and scalars, which may be nested in dictionaries."""
        with self._naming_the_file():
            for sink in self._sinks:
                sink.write(entry)

    def sync(self) -> None:
        """Returns when every sink keeps all entries."""
        with self._naming_the_file():
            for sink in self._sinks:
                sink.sync()

    @contextlib.contextmanager
    def _naming_the_file(self):
        try:
            yield
        except OSError as error:
            raise errors.RunError(f'{self._path} cannot be written ({error.strerror}); make room.') from None

    def close(self) -> None:
        """Closes every sink."""
        for sink in self._sinks:
            sink.close()


def _flat(entry: dict[str, Any], prefix: str = ''):
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
