"""Raw corpora: which files a source has, and the records in them with what is wrong with each.

The usual readers hide faults: a truncated zstd file ends without an error, a line
that isn't JSON is skipped without a count. Here every record is either a text or
names its fault, and a file that can't be read to its end raises `BadFile`.
"""

import dataclasses
import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import zstandard

from tinyllama_jax import errors
from tinyllama_jax.config import SourceConfig

SPLITS = ('train', 'validation', 'test')
_JSONL = ('.jsonl', '.zst', '.gz')
_PARQUET = ('.parquet',)
_TEXT_FIELD = {'jsonl': 'text', 'parquet': 'content', 'text': None}
_GROUP_BYTES = 16 << 20  # plain text files are read in groups of about this size
_READ_BYTES = 1 << 20


class BadFile(Exception):
    """An input file that contributes nothing; the message is the reason."""


@dataclasses.dataclass(frozen=True)
class Input:
    """What becomes one stream: one jsonl or parquet file, or a group of plain text files."""

    root: str  # the source's folder
    names: tuple[str, ...]  # of the files, relative to root
    format: str  # jsonl, parquet or text
    text_field: str | None

    def paths(self) -> list[Path]:
        """The files' paths."""
        return [Path(self.root, name) for name in self.names]


@dataclasses.dataclass(frozen=True)
class Record:
    """One record of an input: a text, or the fault for which it has none."""

    number: int  # line, parquet row or file of a group, from 0
    text: str = ''
    set_name: str | None = None  # meta.redpajama_set_name
    fault: str | None = None


def find_inputs(name: str, source: SourceConfig) -> dict[str, list[Input]]:
    """The inputs of source `name` per split (train, validation), in the order of their names.

    Folders train/, validation/ and test/ are splits; test/ is never listed. Where
    there is no train/, everything outside the other two is the training split.
    Hidden files are left out. Raises UsageError when nothing is there to train on.
    """
    flag = f'--config.data.sources.{name}.path'
    if source.path is None:
        raise errors.UsageError(f'source {name} has no path; give {flag}=DIR, or {flag[:-5]}=none to leave it out.')
    root = Path(source.path)
    if root.is_file():
        found = {'train': [root.name]}
        root = root.parent
    elif root.is_dir():
        found = _files_per_split(root)
    else:
        raise errors.UsageError(f'{flag}={source.path} is neither a folder nor a file.')
    formats = _formats(source.format, [file for files in found.values() for file in files])
    inputs = {split: _inputs(root, files, formats, source.text_field) for split, files in found.items()}
    if not inputs['train']:
        raise errors.UsageError(f'{flag}={source.path} has no {_wanted(source.format)} to train on; check the path '
                                f'and {flag[:-5]}.format={source.format}.')  # fmt: skip
    return {split: inputs[split] for split in ('train', 'validation') if inputs.get(split)}


def _files_per_split(root: Path) -> dict[str, list[str]]:
    found = {split: _files(root, root / split) for split in ('train', 'validation') if (root / split).is_dir()}
    if 'train' not in found:
        found['train'] = [file for file in _files(root, root) if file.split('/')[0] not in SPLITS]
    return found


def _files(root: Path, folder: Path) -> list[str]:
    """Names of the files below `folder`, relative to `root`, sorted. Links are followed, each folder once."""
    names, seen = [], {os.path.realpath(folder)}

    def is_new(path: str) -> bool:
        real = os.path.realpath(path)
        return real not in seen and not seen.add(real)

    for parent, folders, files in os.walk(folder, followlinks=True, onerror=_refuse):
        shown = sorted(name for name in folders if not name.startswith('.'))
        folders[:] = [name for name in shown if is_new(os.path.join(parent, name))]
        names += [Path(parent, name).relative_to(root).as_posix() for name in files if not name.startswith('.')]
    return sorted(names)


def _refuse(error: OSError) -> None:
    raise errors.UsageError(f'{error.filename} cannot be listed ({error.strerror}); make it readable or leave it out.')


def _format(file: str) -> str:
    lower = file.lower()
    return 'jsonl' if lower.endswith(_JSONL) else 'parquet' if lower.endswith(_PARQUET) else 'text'


def _formats(wanted: str, files: Iterable[str]) -> dict[str, str]:
    """The format of each file that is read. auto: text only where there is nothing else (a README beside data)."""
    formats = {file: _format(file) for file in files}
    if wanted == 'text':
        return dict.fromkeys(formats, 'text')
    if wanted == 'auto':
        present = set(formats.values())
        kinds = present - {'text'} or present
    else:
        kinds = {wanted}
    return {file: kind for file, kind in formats.items() if kind in kinds}


def _wanted(source_format: str) -> str:
    suffixes = {'jsonl': ', '.join(_JSONL), 'parquet': ', '.join(_PARQUET)}
    return f'files ({suffixes[source_format]})' if source_format in suffixes else 'files'


def _inputs(root: Path, files: list[str], formats: dict[str, str], text_field: str | None) -> list[Input]:
    inputs, group, group_bytes = [], [], 0
    for file in files:
        kind = formats.get(file)
        if kind in ('jsonl', 'parquet'):
            inputs.append(Input(str(root), (file,), kind, text_field or _TEXT_FIELD[kind]))
        elif kind == 'text':
            group.append(file)
            group_bytes += (root / file).stat().st_size if (root / file).exists() else 0
            if group_bytes >= _GROUP_BYTES:
                inputs.append(Input(str(root), tuple(group), 'text', None))
                group, group_bytes = [], 0
    return inputs + [Input(str(root), tuple(group), 'text', None)] * bool(group)


def read_records(source: Input) -> Iterator[Record]:
    """Every record of an input in order. Raises BadFile where it can't be read to its end."""
    readers = {'jsonl': _read_jsonl, 'parquet': _read_parquet, 'text': _read_texts}
    try:
        yield from readers[source.format](source)
    except (OSError, EOFError, zlib.error, zstandard.ZstdError, pyarrow.ArrowException) as error:
        reason = str(getattr(error, 'strerror', None) or error).splitlines() or [type(error).__name__]
        raise BadFile(f'cannot be read: {reason[0]}') from error


def _read_jsonl(source: Input) -> Iterator[Record]:
    path = source.paths()[0]
    for number, line in enumerate(_lines(_decompressed(path))):
        if line.strip():
            yield _json_record(number, line, source.text_field)


def _json_record(number: int, line: bytes, field: str) -> Record:
    try:
        record = json.loads(line)
    except UnicodeDecodeError:
        return Record(number, fault='is not UTF-8')
    except (ValueError, RecursionError):
        return Record(number, fault='is not JSON')
    if not isinstance(record, dict):
        return Record(number, fault='is no JSON object')
    if field not in record:
        return Record(number, fault=f'has no {field!r}')
    meta = record.get('meta')
    set_name = meta.get('redpajama_set_name') if isinstance(meta, dict) else None
    return _text_record(number, record[field], field, set_name)


def _text_record(number: int, text: object, field: str, set_name: str | None = None) -> Record:
    if not isinstance(text, str):
        return Record(number, fault=f'has {"null" if text is None else type(text).__name__} for {field!r}, not a text')
    return Record(number, text, set_name)


def _decompressed(path: Path) -> Iterator[bytes]:
    if path.suffix.lower() == '.gz':
        with gzip.open(path) as file:
            yield from iter(lambda: file.read(_READ_BYTES), b'')
    else:
        with open(path, 'rb') as file:
            chunks = iter(lambda: file.read(_READ_BYTES), b'')
            yield from _unzstd(chunks) if path.suffix.lower() == '.zst' else chunks


def _unzstd(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Decompresses any number of frames; the library itself takes a cut-off frame for the end."""
    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    frame, frames = None, 0
    for chunk in chunks:
        while chunk:
            if frame is None:
                frame, frames = decompressor.decompressobj(), frames + 1
            yield frame.decompress(chunk)
            chunk = frame.unused_data if frame.eof else b''
            frame = None if frame.eof else frame
    if frame is not None or not frames:
        raise BadFile('is truncated: the zstd frame has no end' if frames else 'is empty')


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    parts: list[bytes] = []
    for chunk in chunks:
        head, *tail = chunk.split(b'\n')
        parts.append(head)
        for piece in tail:
            yield b''.join(parts)
            parts = [piece]
    yield b''.join(parts)


def _read_parquet(source: Input) -> Iterator[Record]:
    field, number = source.text_field, 0
    with pyarrow.parquet.ParquetFile(source.paths()[0], page_checksum_verification=True) as file:
        columns = file.schema_arrow.names
        if field not in columns:
            raise BadFile(f'has no column {field!r}; its columns are {", ".join(columns)}')
        for batch in file.iter_batches(batch_size=256, columns=[field]):
            for value in batch.column(0):
                yield _parquet_record(number, value, field)
                number += 1


def _parquet_record(number: int, value: pyarrow.Scalar, field: str) -> Record:
    try:
        return _text_record(number, value.as_py(), field)
    except UnicodeDecodeError:
        return Record(number, fault='is not UTF-8')


def _read_texts(source: Input) -> Iterator[Record]:
    """One record a file. Stray bytes that aren't UTF-8 become U+FFFD; a binary file is a fault."""
    for number, path in enumerate(source.paths()):
        try:
            data = path.read_bytes()
        except OSError as error:
            yield Record(number, fault=f'({source.names[number]}) cannot be read: {error.strerror}')
            continue
        try:
            yield Record(number, data.decode())
        except UnicodeDecodeError:
            if b'\0' in data:
                yield Record(number, fault=f'({source.names[number]}) is binary, not text')
            else:
                yield Record(number, data.decode(errors='replace'))
