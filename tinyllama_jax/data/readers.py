"""Raw corpora: finds the files of a source and reads their records; a bad record names its fault.

The usual readers hide faults: a truncated zstd file ends without an error, a line
that is not JSON is skipped without a count. Here every record either has a text or
names its fault, and a file that cannot be read to its end raises `BadFile`. A new
format takes a reader and a row of `FORMATS`, at the end of this file, and its name
in `SourceConfig.format`.
"""

import dataclasses
import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import zstandard

from tinyllama_jax import errors
from tinyllama_jax.config import SourceConfig

SPLITS = ('train', 'validation', 'test')
_GROUP_BYTES = 16 << 20  # plain text files are read in groups of about this size
_READ_BYTES = 1 << 20


class BadFile(Exception):
    """An input file that contributes nothing; the message is the reason."""


@dataclasses.dataclass(frozen=True)
class Input:
    """The files that become one stream: one file, or a group of plain text files."""

    root: str  # the source's folder
    names: tuple[str, ...]  # of the files, relative to root
    format: str  # a key of FORMATS
    text_field: str | None  # the field or column with the text; none: the file itself is the text

    def paths(self) -> list[Path]:
        """Returns the paths of the files."""
        return [Path(self.root, name) for name in self.names]


@dataclasses.dataclass(frozen=True)
class Record:
    """One record of an input: its text, or the fault that leaves it without one."""

    number: int  # line, parquet row or file of a group, from 0
    text: str = ''
    set_name: str | None = None  # meta.redpajama_set_name
    fault: str | None = None


@dataclasses.dataclass(frozen=True)
class Format:
    """How to recognise the files of a format and read them."""

    suffixes: tuple[str, ...]  # of the files' names, in lower case
    text_field: str | None  # the default of SourceConfig.text_field
    read: Callable[[Input], Iterator[Record]]


def find_inputs(name: str, source: SourceConfig) -> dict[str, list[Input]]:
    """Returns the inputs of source `name` by split (train, validation), sorted by file name.

    Folders train/, validation/ and test/ are splits; test/ is never listed. Where
    there is no train/, everything outside the other two is the training split.
    Hidden files are left out. Raises UsageError when there is nothing to train on.
    """
    flag = f'--config.data.sources.{name}'
    if source.path is None:
        raise errors.UsageError(f'source {name} has no path; give {flag}.path=DIR, or {flag}=none to leave it out.')
    root = Path(source.path)
    if root.is_file():
        files = {'train': [root.name]}
        root = root.parent
    elif root.is_dir():
        files = {split: _files(root, root / split) for split in ('train', 'validation') if (root / split).is_dir()}
        if 'train' not in files:
            files['train'] = [file for file in _files(root, root) if file.split('/')[0] not in SPLITS]
    else:
        raise errors.UsageError(f'{flag}.path={source.path} is neither a folder nor a file.')
    candidates = FORMATS if source.format == 'auto' else (source.format,)
    listed = [file for split in files.values() for file in split]
    formats = {file: name for file in listed for name in candidates if file.lower().endswith(FORMATS[name].suffixes)}
    if source.format == 'auto':  # plain text beside other data, such as a README, is skipped
        formats = {file: name for file, name in formats.items() if name != 'text'} or formats
    inputs = {
        split: _inputs(root, files[split], formats, source) for split in ('train', 'validation') if split in files
    }
    if not inputs['train']:
        suffixes = ', '.join(FORMATS[source.format].suffixes) if source.format in FORMATS else ''
        raise errors.UsageError(
            f'{flag}.path={source.path} has no files{f" ({suffixes})" if suffixes else ""} to train on; check the path '
            f'and {flag}.format={source.format}.'
        )
    return {split: inputs[split] for split in inputs if inputs[split]}


def _files(root: Path, folder: Path) -> list[str]:
    """Returns the sorted names, relative to `root`, of the files below `folder`; enters a linked folder once."""
    names, seen = [], {os.path.realpath(folder)}

    def refuse(error: OSError) -> None:
        raise errors.UsageError(
            f'{error.filename} cannot be listed ({error.strerror}); make it readable or leave it out.'
        )

    for parent, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        shown, folders[:] = sorted(name for name in folders if not name.startswith('.')), []
        for name in shown:
            real = os.path.realpath(os.path.join(parent, name))
            if real not in seen:
                seen.add(real)
                folders.append(name)
        names += [Path(parent, name).relative_to(root).as_posix() for name in files if not name.startswith('.')]
    return sorted(names)


def _inputs(root: Path, files: list[str], formats: dict[str, str], source: SourceConfig) -> list[Input]:
    inputs, group, group_bytes = [], [], 0
    for file in files:
        if file not in formats:
            continue
        if formats[file] == 'text':
            group.append(file)
            group_bytes += (root / file).stat().st_size if (root / file).exists() else 0
            if group_bytes >= _GROUP_BYTES:
                inputs.append(Input(str(root), tuple(group), 'text', None))
                group, group_bytes = [], 0
        else:
            field = source.text_field or FORMATS[formats[file]].text_field
            inputs.append(Input(str(root), (file,), formats[file], field))
    return inputs + [Input(str(root), tuple(group), 'text', None)] * bool(group)


def read_records(source: Input) -> Iterator[Record]:
    """Yields every record of an input in order. Raises BadFile where it cannot be read to its end."""
    try:
        yield from FORMATS[source.format].read(source)
    except (OSError, EOFError, zlib.error, zstandard.ZstdError, pyarrow.ArrowException) as error:
        reason = getattr(error, 'strerror', None) or errors.first_line(error)
        raise BadFile(f'cannot be read: {reason}') from error


def _read_jsonl(source: Input) -> Iterator[Record]:
    (path,) = source.paths()
    suffix = path.suffix.lower()
    with gzip.open(path) if suffix == '.gz' else open(path, 'rb') as file:
        chunks = iter(lambda: file.read(_READ_BYTES), b'')
        for number, line in enumerate(_lines(_unzstd(chunks) if suffix == '.zst' else chunks)):
            if line.strip():
                yield _json_record(number, line, source.text_field)


def _json_record(number: int, line: bytes, field: str | None) -> Record:
    try:
        record = json.loads(line)
    except UnicodeDecodeError:
        return Record(number, fault='is not UTF-8')
    except (ValueError, RecursionError):
        return Record(number, fault='is not JSON')
    if not isinstance(record, dict):
        return Record(number, fault='is not a JSON object')
    if field not in record:
        return Record(number, fault=f'has no {field!r}')
    meta = record.get('meta')
    set_name = meta.get('redpajama_set_name') if isinstance(meta, dict) else None
    return _text_record(number, record[field], field, set_name)


def _text_record(number: int, text: object, field: str | None, set_name: str | None = None) -> Record:
    if not isinstance(text, str):
        return Record(number, fault=f'has {"null" if text is None else type(text).__name__} for {field!r}, not a text')
    return Record(number, text, set_name)


def _unzstd(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Decompresses any number of frames; the library itself takes a truncated frame for the end of the file."""
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
        for part in tail:
            yield b''.join(parts)
            parts = [part]
    yield b''.join(parts)


def _read_parquet(source: Input) -> Iterator[Record]:
    field, number = source.text_field, 0
    with pyarrow.parquet.ParquetFile(source.paths()[0], page_checksum_verification=True) as file:
        columns = file.schema_arrow.names
        if field not in columns:
            raise BadFile(f'has no column {field!r}; its columns are {", ".join(columns)}')
        for batch in file.iter_batches(batch_size=256, columns=[field]):
            for value in batch.column(0):
                try:
                    yield _text_record(number, value.as_py(), field)
                except UnicodeDecodeError:
                    yield Record(number, fault='is not UTF-8')
                number += 1


def _read_texts(source: Input) -> Iterator[Record]:
    """Yields one record per file. Bytes that are not UTF-8 become U+FFFD; a binary file is a fault."""
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


# With format=auto the last row with a file's suffix wins; every name has the suffix of `text`.
FORMATS = {
    'text': Format(('',), None, _read_texts),
    'jsonl': Format(('.jsonl', '.zst', '.gz'), 'text', _read_jsonl),
    'parquet': Format(('.parquet',), 'content', _read_parquet),
}
