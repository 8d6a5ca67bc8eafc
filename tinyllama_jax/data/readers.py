"""Reads the records of a source's files; a bad record names its fault, a bad file its reason.

The usual readers hide faults: a truncated zstd file ends without an error, a line
that is not JSON is skipped without a count. Here every record either has a text or
names its fault, and a file that cannot be read to its end raises `BadFile`. A new
format takes a reader and a row of `FORMATS`, at the end of this file, and its name
in `SourceConfig.format`.
"""

import bz2
import codecs
import contextlib
import dataclasses
import gzip
import json
import lzma
import mimetypes
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import zstandard

from tinyllama_jax import errors

UNKNOWN_SET = 'a number for a set'  # the label of a record whose set is not named by a string
_SET_FIELD = 'redpajama_set_name'
_READ_BYTES = 1 << 20
_MOST_JSON_BYTES = 1 << 30  # of one JSON array or object: it is held in memory
# What is to be unpacked first, by the end of the name or by bytes at a place of the file.
ARCHIVES = ('.tar', '.tgz', '.tbz2', '.txz', '.zip', '.7z', '.rar', '.lz4', '.br', '.z', '.sz', '.snappy', '.lzo')
ARCHIVES += ('.tar.gz', '.tar.bz2', '.tar.xz', '.tar.zst')
_MOST_REPLACED = 0.3  # share of the characters of a text that may be U+FFFD, for bytes that are not UTF-8
CORPUS_TEXTS = ('.txt', '.text', '.tokens', '.raw')  # what corpora of plain text are called
_CONTAINERS = {
    (0, b'PAR1'): 'parquet', (0, b'ARROW1'): 'arrow', (0, b'\xff' * 4): 'arrow', (0, b'\x1f\x8b'): 'gzip',
    (0, b'(\xb5/\xfd'): 'zstd', (0, b'\xfd7zXZ\0'): 'xz', (4, b'1AY&SY'): 'bzip2', (257, b'ustar'): 'tar',
    (0, b'WARC/'): 'WARC',
}  # fmt: skip
_UTF_32_AND_16 = {b'\xff\xfe\0\0': 'utf-32', b'\0\0\xfe\xff': 'utf-32', b'\xff\xfe': 'utf-16', b'\xfe\xff': 'utf-16'}


class BadFile(Exception):
    """An input file that contributes nothing; the message is the reason."""


_UNREADABLE = (BadFile, OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError)


class NotData(Exception):
    """A file beside the data, such as a picture in a source tree; the message is the reason."""


@dataclasses.dataclass(frozen=True)
class Input:
    """The files that become one stream: one file, or a group of small ones."""

    root: str  # the source's folder
    names: tuple[str, ...]  # of the files, relative to root
    format: str  # a key of FORMATS
    text_fields: tuple[str, ...]  # fields or columns, one of which has the text; none: the file itself is the text

    def paths(self) -> list[Path]:
        """Returns the paths of the files."""
        return [Path(self.root, name) for name in self.names]


@dataclasses.dataclass(frozen=True)
class Record:
    """One record of an input: its text, or the fault that leaves it without one."""

    number: int  # line or row of its file, from 0
    text: str = ''
    labels: tuple[str, ...] = ()  # the strings in its other fields, which may name the set it belongs to
    fault: str | None = None
    file: int = 0  # of the input's names
    place: int = 0  # in the input: `number` in a single file, counted on from file to file in a group


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A file of a group that has no records: a bad one, or one that is not data."""

    file: int  # of the input's names
    reason: str
    bad: bool


@dataclasses.dataclass(frozen=True)
class Format:
    """How to recognise the files of a format and read them."""

    suffixes: tuple[str, ...]  # of the files' names, in lower case
    text_fields: tuple[str, ...]  # the default of SourceConfig.text_field: the one of these that is there
    read: Callable[[Path, tuple[str, ...]], Iterator[Record]]


def read_records(source: Input) -> Iterator[Record | Skipped]:
    """Yields every record of an input in order; of a group, also its files that are skipped.

    Raises BadFile where an input of one file cannot be read to its end. A bad file of a
    group contributes nothing either, but the others do.
    """
    first, single = 0, len(source.names) == 1
    for file, path in enumerate(source.paths()):
        place = file if source.format == 'text' else first
        try:
            records = _read_file(path, source)
            for record in records if single else _whole(records):
                first = place + record.number + 1
                yield dataclasses.replace(record, file=file, place=place + record.number)
        except NotData as reason:
            yield Skipped(file, str(reason), bad=False)
        except BadFile as reason:
            if single:
                raise
            yield Skipped(file, str(reason), bad=True)


def _read_file(path: Path, source: Input) -> Iterator[Record]:
    if path.name.lower().endswith(ARCHIVES):
        raise BadFile(f'is an archive or compressed in a way that is not read ({path.suffix}); unpack it')
    try:
        yield from FORMATS[source.format].read(path, source.text_fields)
    except (OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError, pyarrow.ArrowException) as error:
        reason = getattr(error, 'strerror', None) or errors.first_line(error)
        raise BadFile(f'cannot be read: {reason}') from error


def _whole(records: Iterator[Record]) -> list[Record]:
    """Returns all records of a file, so that a bad one contributes none."""
    listed = list(records)
    if listed and all(record.fault for record in listed):
        raise BadFile(every_record_is_bad(listed[0].number, listed[0].fault))
    return listed


def every_record_is_bad(number: int, fault: str | None) -> str:
    """Returns the reason of a bad file without one good record, the first of which is `number`."""
    return f'every record is bad: record {number} {fault}'


# --- JSON ---


def _read_jsonl(path: Path, fields: tuple[str, ...]) -> Iterator[Record]:
    lines = _lines(_content(path))
    if '.json' in [suffix.lower() for suffix in path.suffixes[-2:]]:
        first = next((line for line in lines if line.strip()), b'')
        if not _is_object(first):  # perhaps one array or object, over many lines
            whole = _whole_json(path)
            if whole is not None:
                values = whole if isinstance(whole, list) else [whole]
                yield from (_object_record(number, value, fields) for number, value in enumerate(values))
                return
        lines = _lines(_content(path))
    for number, line in enumerate(lines):
        if not number and line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise BadFile('holds lines in UTF-16; convert it to UTF-8')
        if line.strip():
            yield _json_record(number, line, fields)


def has_json_records(path: Path, fields: tuple[str, ...]) -> bool | None:
    """Returns whether the records of a .json file have one of `fields`; None: it holds no records, but other JSON.

    Records are objects: one on each line, in one array, or a single one that has the field.
    """
    try:
        lines = (line for line in _lines(_content(path)) if line.strip())
        first, more = next(lines, b''), next(lines, None) is not None
        if _is_object(first):
            values, single = [json.loads(first)], not more
        else:
            whole = _whole_json(path)
            if whole is None:  # not JSON as a whole: lines, some of them bad, unless they do not begin like objects
                return False if first.lstrip()[:1] == b'{' and first.strip() != b'{' else None
            values, single = (whole[:1], False) if isinstance(whole, list) else ([whole], True)
    except _UNREADABLE:
        return False  # reading it will say why
    if not values or not isinstance(values[0], dict):
        return None
    there = any(field in values[0] for field in fields)
    return None if single and not there else there


def begins_with_record(path: Path, fields: tuple[str, ...]) -> bool:
    """Returns whether a file that is not called JSON begins with a record that has one of `fields`.

    A single line counts only in a file that is called a text, or has no suffix: in a source tree it may be code.
    """
    called = not path.suffix or bool({*CORPUS_TEXTS} & {suffix.lower() for suffix in path.suffixes[-2:]})
    try:
        head = next(_content(path), b'').removeprefix(codecs.BOM_UTF8).strip() if path.is_file() else b''
    except _UNREADABLE:
        return False  # reading it will say why
    return head[:1] in (b'{', b'[') and (called or b'\n' in head) and has_json_records(path, fields) is True


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _whole_json(path: Path) -> Any:
    """Returns the value of a file that is one JSON value; None if it is not, or too large to be held in memory."""
    chunks, size = [], 0
    for chunk in _content(path):
        chunks.append(chunk)
        size += len(chunk)
        if size > _MOST_JSON_BYTES:
            return None
    try:
        return json.loads(b''.join(chunks))
    except (ValueError, RecursionError):
        return None


def _json_record(number: int, line: bytes, fields: tuple[str, ...]) -> Record:
    try:
        record = json.loads(line)
    except UnicodeDecodeError:
        return Record(number, fault='is not UTF-8')
    except (ValueError, RecursionError):
        return Record(number, fault='is not JSON')
    return _object_record(number, record, fields)


def _object_record(number: int, record: object, fields: tuple[str, ...]) -> Record:
    if not isinstance(record, dict):
        return Record(number, fault='is not a JSON object')
    field = next((field for field in fields if field in record), None)
    if field is None:
        there = ', '.join(record) or 'none'
        return Record(number, fault=f'has no {fields[0]!r}; its fields are {there[:100]}: set text_field to one')
    text = record.pop(field)
    return _text_record(number, text, field, tuple(_strings(record)))


def _text_record(number: int, text: object, field: str, labels: tuple[str, ...]) -> Record:
    if not isinstance(text, str):
        return Record(number, fault=f'has {"null" if text is None else type(text).__name__} for {field!r}, not a text')
    return Record(number, text, labels)


def _strings(value: object) -> Iterator[str]:
    """Yields the strings among the values of nested dictionaries and lists, and of JSON in a string."""
    if isinstance(value, str):
        yield value
        if value.lstrip()[:1] in ('{', '[', '"'):
            with contextlib.suppress(ValueError, RecursionError):
                yield from _strings(json.loads(value))
    elif isinstance(value, bytes):
        yield from _strings(value.decode(errors='replace'))
    elif isinstance(value, dict):
        for pair in value.items():
            yield from _strings(pair)
    elif isinstance(value, tuple):  # a pair of a dictionary, or of Arrow's map
        key, entry = value
        # A number that stands for a set's name cannot be compared with it.
        yield from [UNKNOWN_SET] if key == _SET_FIELD and isinstance(entry, int | float) else _strings(entry)
    elif isinstance(value, list) and not {*map(type, value)} <= {int, float}:
        for entry in value:
            yield from _strings(entry)


# --- bytes ---


def _content(path: Path) -> Iterator[bytes]:
    """Yields the bytes of a file in chunks, decompressed if the end of its name says how."""
    suffix = path.suffix.lower()
    with gzip.open(path) if suffix in _GZIP else open(path, 'rb') as file:
        chunks = iter(lambda: file.read(_READ_BYTES), b'')
        if suffix in _DECOMPRESSORS:
            chunks = _decompress(chunks, _DECOMPRESSORS[suffix], padding=b'\0' if suffix == '.xz' else b'')
        for number, chunk in enumerate(chunks):
            if not number and chunk[257:262] == b'ustar':
                raise BadFile('is a tar archive; unpack it')
            yield chunk


_GZIP = ('.gz', '.gzip')
_DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    **dict.fromkeys(('.zst', '.zstd'), lambda: zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()),
    **dict.fromkeys(('.xz', '.lzma'), lzma.LZMADecompressor),
    **dict.fromkeys(('.bz2', '.bz'), bz2.BZ2Decompressor),
}


def _decompress(chunks: Iterable[bytes], make: Callable[[], Any], *, padding: bytes) -> Iterator[bytes]:
    """Decompresses any number of frames; the libraries themselves take a truncated frame for the end of the file."""
    frame, frames = None, 0
    for chunk in chunks:
        while chunk:
            if frame is None:
                if not (chunk := chunk.lstrip(padding)):
                    break
                frame, frames = make(), frames + 1
            yield frame.decompress(chunk)
            chunk = frame.unused_data if frame.eof else b''
            frame = None if frame.eof else frame
    if frame is not None or not frames:
        raise BadFile('is truncated: its compressed data has no end' if frames else 'is empty')


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    parts: list[bytes] = []
    for chunk in chunks:
        head, *tail = chunk.split(b'\n')
        parts.append(head)
        for part in tail:
            yield b''.join(parts)
            parts = [part]
    yield b''.join(parts)


# --- tables ---


def _read_parquet(path: Path, fields: tuple[str, ...]) -> Iterator[Record]:
    with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
        field, columns = _columns(file.schema_arrow, fields)
        yield from _rows(file.iter_batches(batch_size=256, columns=columns), field)


def _read_arrow(path: Path, fields: tuple[str, ...]) -> Iterator[Record]:
    """Reads Arrow's file format, or its stream as `datasets` saves it."""
    with open(path, 'rb') as file:
        if file.read(6) == b'ARROW1':
            reader = pyarrow.ipc.open_file(file)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            file.seek(-8, 2)
            if file.read() != b'\xff\xff\xff\xff\0\0\0\0':  # pyarrow takes a truncated stream for a shorter one
                raise BadFile('is truncated: the arrow stream has no end')
            file.seek(0)
            batches = reader = pyarrow.ipc.open_stream(file)
        field, columns = _columns(reader.schema, fields)
        yield from _rows((batch.select(columns) for batch in batches), field)


def _columns(schema: pyarrow.Schema, fields: tuple[str, ...]) -> tuple[str, list[str]]:
    """Returns the column with the text, and the names of all columns to read: it and those that may hold strings."""
    there = [field for field in fields if field in schema.names]
    if not there:
        wanted = ' or '.join(map(repr, fields))
        raise BadFile(f'has no column {wanted}; its columns are {", ".join(schema.names)}: set text_field to one')
    if len(there) > 1:
        raise BadFile(f'has the columns {" and ".join(map(repr, there))}; set text_field to the one with the text')
    others = [column for column in schema if column.name != there[0]]
    named = [column.name for column in others if any(part in str(column) for part in ('string', 'binary', _SET_FIELD))]
    return there[0], [there[0], *named]


def _rows(batches: Iterable[pyarrow.RecordBatch], field: str) -> Iterator[Record]:
    number = 0
    for batch in batches:
        others = {name: batch.column(name) for name in batch.schema.names if name != field}
        for row, value in enumerate(batch.column(field)):
            try:
                labels = tuple(_strings({name: column[row].as_py() for name, column in others.items()}))
                yield _text_record(number, value.as_py(), field, labels)
            except UnicodeDecodeError:
                yield Record(number, fault='is not UTF-8')
            number += 1


# --- plain text ---


def _read_text(path: Path, _: tuple[str, ...]) -> Iterator[Record]:
    """Yields the file's content. Bytes that are not UTF-8 become U+FFFD, but what is not a text is refused."""
    data = b''.join(_content(path))
    for (start, magic), kind in _CONTAINERS.items():
        if data.startswith(magic, start):
            raise BadFile(f'is not text but {kind}; give it the name of its format, or leave it out')
    for mark, encoding in _UTF_32_AND_16.items():
        if data.startswith(mark):
            try:
                yield Record(0, data.decode(encoding))
            except UnicodeDecodeError:
                raise BadFile(f'begins like {encoding.upper()} but is not; convert it to UTF-8') from None
            return
    if len(data) > 16 and data.count(0) > 0.4 * len(data):
        _refuse_binary(path, 'looks like UTF-16 without its mark, or is binary; convert it to UTF-8')
    if data.startswith((b'%PDF-', b'SQLite format 3\0')):
        _refuse_binary(path, 'is binary, not text')
    try:
        yield Record(0, data.decode())
    except UnicodeDecodeError:
        if b'\0' in data:
            _refuse_binary(path, 'is binary, not text')
        text = data.decode(errors='replace')
        if text.count('\ufffd') > _MOST_REPLACED * len(text):
            _refuse_binary(path, 'is not UTF-8; convert it')
        yield Record(0, text)


def _refuse_binary(path: Path, reason: str) -> NoReturn:
    """Raises BadFile if the name promises a text, NotData otherwise: a picture, a program."""
    # An own table: the module's also reads the machine's files.
    kind = mimetypes.MimeTypes().guess_type(path.name)[0] or ''
    if kind.startswith('text/') or path.suffix.lower() in CORPUS_TEXTS:
        raise BadFile(reason)
    raise NotData('is binary, not text')


# With format=auto the last row with a file's suffix wins; every name has the suffix of `text`.
FORMATS = {
    'text': Format(('',), (), _read_text),
    'jsonl': Format(('.jsonl', '.ndjson', '.jsonlines', '.json', *_GZIP, *_DECOMPRESSORS), ('text',), _read_jsonl),
    'parquet': Format(('.parquet',), ('content', 'text'), _read_parquet),
    'arrow': Format(('.arrow', '.feather'), ('text', 'content'), _read_arrow),
}
