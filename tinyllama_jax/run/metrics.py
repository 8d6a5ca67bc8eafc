"""What a run writes about itself: JSON lines, TensorBoard, the terminal; and how fast it goes.

`WORKDIR/metrics.jsonl` holds one object per logged step, no step twice: on resume it
is cut to the checkpoint's step, and `Recomputed` holds the losses that were cut off
against those computed again.
"""

import json
import os
import pathlib
import sys
import time

import tqdm

from tinyllama_jax import errors, files


def read_records(path: pathlib.Path) -> list[dict]:
    """The JSON objects of a metrics file; a last line cut short by a kill is left out."""
    if not path.exists():
        return []
    lines = path.read_text().split('\n')
    return [json.loads(line) for line in lines[:-1] if line]


def cut_records(path: pathlib.Path, step: int) -> list[dict]:
    """Atomically drops the records after `step` from a metrics file and returns them."""
    records = read_records(path)
    if path.exists():
        files.write_atomically(path, ''.join(json.dumps(r) + '\n' for r in records if r['step'] <= step))
    return [record for record in records if record['step'] > step]


class Recomputed:
    """Losses that were logged before an interruption; computed again they must be the same digits.

    Cuts `path` to `step`. What was cut off is kept in a file beside it until it has been
    computed again, so that it outlives further interruptions.
    """

    def __init__(self, path: pathlib.Path, step: int):
        self._kept = path.with_name('recompute.jsonl')
        later = [record for record in read_records(path) if record['step'] > step]
        records = {record['step']: record for record in [*read_records(self._kept), *later] if record['step'] > step}
        if later:
            files.write_atomically(self._kept, ''.join(json.dumps(record) + '\n' for record in records.values()))
        cut_records(path, step)
        self._losses = {step: record['loss'] for step, record in records.items()}

    def forget(self) -> None:
        """To be called where the losses may differ: other settings, versions or devices."""
        self._losses = {}
        self._kept.unlink(missing_ok=True)

    def check(self, step: int, loss: float) -> None:
        """Raises RunError if `loss` is not the one that was logged for `step` before."""
        before = self._losses.pop(step, loss)
        if before != loss:
            raise errors.RunError(
                f'step {step}: the loss computed again after resuming is {loss!r}, but {before!r} was logged before '
                'the interruption with the same settings, versions and devices; the run is not reproducible here '
                f'(failing hardware, or changed data or code). To go on all the same, remove {self._kept}.'
            )
        if not self._losses:
            self._kept.unlink(missing_ok=True)


class Writer:
    """Writes scalars of a step to a JSON-lines file and to TensorBoard."""

    def __init__(self, path: pathlib.Path, *, start_step: int):
        from tensorboardX import SummaryWriter  # here, because it imports torch where there is one: two seconds

        self._file = open(path, 'a')
        self._board = SummaryWriter(str(path.parent / 'tensorboard' / path.stem), purge_step=start_step + 1)

    def write(self, record: dict) -> None:
        """Appends `record` (with its `step`); nested dictionaries become TensorBoard paths."""
        try:
            self._file.write(json.dumps(record) + '\n')
            self._file.flush()
            for name, value in _flat(record):
                if name != 'step' and isinstance(value, int | float):
                    self._board.add_scalar(name, value, record['step'])
        except OSError as error:
            raise errors.RunError(f'{self._file.name} cannot be written ({error.strerror}); make room.') from None

    def sync(self) -> None:
        """Returns when all records are on disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flushes and closes both."""
        self._file.close()
        self._board.close()


def _flat(record: dict, prefix: str = ''):
    for name, value in record.items():
        if isinstance(value, dict):
            yield from _flat(value, f'{prefix}{name}/')
        else:
            yield prefix + name, value


class Throughput:
    """Tokens per second and seconds lost to data and checkpoints, between two logged steps.

    Time spent in `paused` (validation) does not count.
    """

    def __init__(self, clock=time.perf_counter):
        self._clock = clock
        self._lost = {}
        self._begin()

    def _begin(self) -> None:
        self._start = self._clock()
        self._lost = {'data': 0.0, 'checkpoint': 0.0, 'paused': 0.0}

    def timed(self, kind: str):
        """A context whose duration is counted as `data`, `checkpoint` or `paused`."""
        return _Timed(self._lost, kind, self._clock)

    def lap(self, tokens: int) -> dict[str, float]:
        """Figures since the last lap in which `tokens` were trained on; starts the next one."""
        seconds = max(self._clock() - self._start - self._lost['paused'], 1e-9)
        lap = {
            'tokens_per_second': tokens / seconds,
            'data_seconds': self._lost['data'],
            'checkpoint_seconds': self._lost['checkpoint'],
        }
        self._begin()
        return lap


class _Timed:
    def __init__(self, totals: dict[str, float], kind: str, clock):
        self._totals, self._kind, self._clock = totals, kind, clock

    def __enter__(self):
        self._start = self._clock()

    def __exit__(self, *_):
        self._totals[self._kind] += self._clock() - self._start


class Progress:
    """A bar with loss, tokens/s and time to go on a terminal; a line per logged step elsewhere."""

    def __init__(self, start: int, stop: int, *, tokens_per_step: int):
        self._stop, self._tokens_per_step = stop, tokens_per_step
        self._bar = tqdm.tqdm(
            initial=start, total=stop, unit='step', disable=not sys.stderr.isatty(), dynamic_ncols=True
        )

    def update(self, record: dict) -> None:
        """Shows a logged step's loss and speed and the time to go."""
        step, rate = record['step'], record['tokens_per_second']
        text = f'loss {record["loss"]:.4f}, {rate:,.0f} tokens/s'
        if not self._bar.disable:
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix_str(text)
            return
        left = (self._stop - step) * self._tokens_per_step / rate
        self.say(f'step {step}/{self._stop}: {text}, {_duration(left)} to go')

    def say(self, line: str) -> None:
        """Prints a line without tearing the bar."""
        tqdm.tqdm.write(line, file=sys.stderr)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        self._bar.close()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}:{minutes:02}:{seconds:02}'
