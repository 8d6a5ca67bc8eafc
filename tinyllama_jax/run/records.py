"""Files of entries: JSON lines with a step each, such as `WORKDIR/metrics.jsonl`, in which no step stands twice.

On resume a file is cut to the checkpoint's step. `Recomputed` compares the losses that were cut off with those computed
again. A line that is no entry, as damage or a power cut leaves it, is named and passed over.
"""

import functools
import json
import pathlib
import sys
import zlib
from collections.abc import Mapping
from typing import Any

from tinyllama_jax import errors, files

_CHECKSUM = ', "crc32": '


def read_entries(path: pathlib.Path, **fields: type) -> list[dict[str, Any]]:
    """Returns the entries of a file: objects with a whole number as `step`, and with `fields` of these types.

    A float is any number, a dict is one of numbers or of such dictionaries. How many lines are no entries is said on
    stderr, once.
    """
    lines = _lines(path)
    entries = [_entry(line, fields) for line in lines]
    if bad := [number for number, entry in enumerate(entries, start=1) if entry is None]:
        first = f'line {bad[0]}, {lines[bad[0] - 1][:60].decode(errors="replace")!r}'
        _say_once(f'{path}: {len(bad)} of {len(lines)} lines are no entries and are passed over (the first: {first})')
    return [entry for entry in entries if entry is not None]


def line(entry: Mapping[str, Any]) -> bytes:
    """Returns the line of a file for an entry, with a CRC-32 of its text as the last field."""
    text = json.dumps(entry)
    return f'{text[:-1]}{_CHECKSUM}{zlib.crc32(text.encode())}}}\n'.encode()


def cut_entries(path: pathlib.Path, step: int) -> list[dict[str, Any]]:
    """Atomically drops the entries after `step` from a file, and what follows the last one before; returns these."""
    if not path.exists():
        return []
    lines = _lines(path)
    steps = [(_entry(line, {}) or {'step': None})['step'] for line in lines]
    end = max((i for i, of in enumerate(steps, start=1) if of is not None and of <= step), default=0)
    later = [entry for entry in read_entries(path) if entry['step'] > step]
    kept = [line + b'\n' for line, of in zip(lines[:end], steps, strict=False) if of is None or of <= step]
    files.write_atomically(path, b''.join(kept))
    return later


def _lines(path: pathlib.Path) -> list[bytes]:
    """Returns the lines of a file, without a last one that a kill cut short."""
    return path.read_bytes().split(b'\n')[:-1] if path.exists() else []


def _entry(line: bytes, fields: Mapping[str, type]) -> dict[str, Any] | None:
    text, checked, checksum = line.rpartition(_CHECKSUM.encode())
    if checked:  # earlier versions wrote none
        line = text + b'}'
        if checksum != b'%d}' % zlib.crc32(line):
            return None
    try:
        entry = json.loads(line)
        right = type(entry['step']) is int and all(_fits(entry[field], kind) for field, kind in fields.items())
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return entry if right else None


def _fits(value: Any, kind: type) -> bool:
    if isinstance(value, dict):
        return kind is dict and all(_fits(part, type(part)) for part in value.values())
    return type(value) in (int, float) and kind is not dict


@functools.cache
def _say_once(line: str) -> None:
    print(line, file=sys.stderr)


class Recomputed:
    """Losses that were logged before an interruption; computed again, they must have the same digits.

    Cuts `path` to `step`. The entries cut off are kept in a file beside it until their
    losses have been computed again, so that they survive further interruptions.
    """

    def __init__(self, path: pathlib.Path, step: int):
        self._kept = path.with_name('recompute.jsonl')
        later = [entry for entry in read_entries(path, loss=float) if entry['step'] > step]
        kept = read_entries(self._kept, loss=float)
        entries = {entry['step']: entry for entry in [*kept, *later] if entry['step'] > step}
        if later:
            files.write_atomically(self._kept, b''.join(map(line, entries.values())))
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
