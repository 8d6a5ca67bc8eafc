"""Lists the files of a source: in which split and format each is read, or why it is not.

Every file below a source's folder is either in an input or in `Found.ignored`, with the reason.
"""

import dataclasses
import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path

from tinyllama_jax import errors
from tinyllama_jax.config import SourceConfig
from tinyllama_jax.data import readers
from tinyllama_jax.data.readers import FORMATS, Input

_GROUP_BYTES = 16 << 20  # a group of files has about this size
_SMALL_BYTES = 1 << 20  # of a file that shares a stream with others, if there are more than _FEW_FILES of them
_FEW_FILES = 16
# The words in a name that tell the split, as whole words: those of Hugging Face's `datasets`, holdout, devtest, tests,
# and each with set, data or split.
_SPLIT = re.compile(
    '(?<![a-z])(?:(?P<train>train(?:ing)?)|(?P<validation>val(?:id(?:ation)?)?|dev|h(?:o|e)ld[-_ ]?out)'
    '|(?P<test>(?:dev)?test(?:s|ing)?|eval(?:uation)?))(?:set|data|split)?(?![a-z])'
)
_PAPERS = re.compile('(_success|readme|licen[cs]e|copying|notice|changelog|citation|dataset_?card)', re.IGNORECASE)
_TABLES = ('.csv', '.tsv')
_OF_A_RUN = (
    'store', 'checkpoints', 'checkpoints-damaged', 'config.json', 'tokenizer', 'tokenizer.model', 'tokenizer.json',
    'metrics.jsonl', 'validation.jsonl', 'evaluation.jsonl', 'recompute.jsonl', 'compiled', 'tensorboard', 'eval',
    'profile', 'report',
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Found:
    """The files of a source."""

    splits: dict[str, list[Input]]  # train and, if there is one, validation; sorted by file name
    ignored: dict[str, str]  # file or folder/ -> why it is not read

    @property
    def shares_streams(self) -> bool:
        """Whether a stream holds several files that are not plain text, which version 1 of the store lacks."""
        return any(len(i.names) > 1 and i.format != 'text' for listed in self.splits.values() for i in listed)


def find_inputs(name: str, source: SourceConfig, *, own: Collection[Path] = (), share: bool = True) -> Found:
    """Returns the inputs of source `name` by split, and the files that are not read.

    A folder's name tells the split of what is below it, otherwise a file's name does; the rest
    trains, or is ignored beside a folder train/. Test files are ignored, and so are the folders
    `own` and those of other runs. If `share`, many small files become few inputs. Raises UsageError
    when there is nothing to train on, and when the folder does not tell what is data.
    """
    flag = f'--config.data.sources.{name}'
    if source.path is None:
        raise errors.UsageError(f'source {name} has no path; give {flag}.path=DIR, or {flag}=none to leave it out.')
    root, ignored = Path(source.path), {}
    if root.is_file():
        files, single, root = [root.name], True, root.parent
    elif root.is_dir():
        (files, ignored), single = _walk(root, own), False
    else:
        raise errors.UsageError(f'{flag}.path={source.path} is neither a folder nor a file.')
    formats = _formats(root, files, source, flag)
    hold_train, hub_caches = _holders('train', files), _holders('snapshots', files) & _holders('blobs', files)
    told = {file: 'train' if single else _split(file, formats[file], hold_train) for file in files}
    splits: dict[str, list[str]] = {'train': [], 'validation': []}
    tests: dict[object, str] = {}  # which file -> its name
    known: dict[object, str] = {}
    # Of the names of one file, one that tells a split comes first, then one without links.
    for file in sorted(files, key=lambda file: (told[file] is None, _has_link(root, file), file)):
        split, identity = told[file], _identity(root / file)
        if formats[file] not in FORMATS:
            ignored[file] = formats[file]
        elif formats[file] == 'text' and any(file.startswith((f'{at}blobs/', f'{at}refs/')) for at in hub_caches):
            ignored[file] = "a hub cache's own"
        elif split == 'test':
            tests.setdefault(identity, file)
            ignored[file] = 'test split'
        elif split is None and '' in hold_train:
            ignored[file] = 'outside train/'
        elif split is None and identity in tests:
            ignored[file] = f'the same file as {tests[identity]}'
        elif known.setdefault(identity, file) == file:
            splits[split or 'train'].append(file)
        else:
            ignored[file] = 'a second name'
    for file in ignored:
        if (other := known.get(_identity(root / file))) is not None:
            ignored[file] = f'the same file as {other}'
    if not splits['train']:
        suffixes = ', '.join(FORMATS[source.format].suffixes) if source.format in FORMATS else ''
        others = {**dict.fromkeys(splits['validation'], 'validation split'), **ignored}
        seen = '; '.join(f'{file}: {reason}' for file, reason in sorted(others.items())[:3])
        raise errors.UsageError(
            f'{flag}.path={source.path} has no files{f" ({suffixes})" if suffixes else ""} to train on'
            f'{f" ({seen})" if seen else ""}; check the path and {flag}.format={source.format}.'
        )
    inputs = {split: _inputs(root, sorted(listed), formats, source, share) for split, listed in splits.items()}
    return Found({split: listed for split, listed in inputs.items() if listed}, dict(sorted(ignored.items())))


def _walk(root: Path, own: Collection[Path]) -> tuple[list[str], dict[str, str]]:
    """Returns the files below `root`, and what is left out whatever its format; enters a linked folder once."""
    names, ignored = [], {}
    own_folders = {os.path.realpath(folder) for folder in own}
    seen: dict[str, set[str]] = {}  # folders entered below each folder of the root

    def refuse(error: OSError) -> None:
        raise errors.UsageError(
            f'{error.filename} cannot be listed ({error.strerror}); make it readable or leave it out.'
        )

    for parent, folders, files in os.walk(root, followlinks=True, onerror=refuse):
        in_own = Path(parent) == root and os.path.realpath(root) in own_folders
        inside, folders[:] = sorted(folders), []
        for entry in inside:
            path = Path(parent, entry)
            name, real = path.relative_to(root).as_posix(), os.path.realpath(path)
            entered = seen.setdefault(name.split('/')[0], {os.path.realpath(root)})
            if entry.startswith('.'):
                ignored[f'{name}/'] = 'hidden'
            elif (in_own and entry in _OF_A_RUN) or real in own_folders or _is_store(path) or _is_store(path / 'store'):
                ignored[f'{name}/'] = "a run's own"
            elif real in entered:
                ignored[f'{name}/'] = 'a link to a folder that is read'
            else:
                entered.add(real)
                folders.append(entry)
        for entry in files:
            name = Path(parent, entry).relative_to(root).as_posix()
            if entry.startswith('.'):
                ignored[name] = 'hidden'
            elif in_own and entry in _OF_A_RUN:
                ignored[name] = "a run's own"
            else:
                names.append(name)
    return sorted(names), ignored


def _is_store(folder: Path) -> bool:
    return (folder / 'tokens').is_dir() and any((folder / name).exists() for name in ('manifest.json', '.progress'))


def _has_link(root: Path, file: str) -> bool:
    return os.path.realpath(root / file) != os.path.join(os.path.realpath(root), file)


def _identity(path: Path) -> object:
    """Returns what is the same for all names of one file."""
    try:
        stat = path.stat()
    except OSError:  # it cannot be read; its own name is the only one
        return path
    return stat.st_dev, stat.st_ino


def _holders(name: str, files: Collection[str]) -> set[str]:
    """Returns the folders, as '' or 'a/b/', in which a folder called `name` holds files."""
    paths = [folder for file in set(map(os.path.dirname, files)) for folder in (Path(file), *Path(file).parents)]
    return {f'{path.parent}/'.removeprefix('./') for path in paths if path.name == name}


def _split(file: str, file_format: str, hold_train: Collection[str]) -> str | None:
    """Returns the split that a file's name tells, or None; `hold_train` are the folders that hold train/.

    Of plain text only the first folder, folders beside train/ and the names of corpora tell: a source tree's tests
    train.
    """
    *folders, name = file.split('/')
    parts = [*folders, name]
    if file_format == 'text':
        parts = [
            part
            for i, part in enumerate(folders)
            if ''.join(f'{folder}/' for folder in folders[:i]) in hold_train
            or (not i and part in ('train', 'validation', 'test'))
        ]
        parts += [name] * name.lower().endswith(readers.CORPUS_TEXTS)
    for part in parts:
        words = {match.lastgroup for match in _SPLIT.finditer(part.lower())}
        for split in ('train', 'test', 'validation'):
            if split in words:
                return split
    return None


def _formats(root: Path, files: Sequence[str], source: SourceConfig, flag: str) -> dict[str, str]:
    """Returns the format of each file, or the reason why it is not read."""
    fields = (source.text_field,) if source.text_field else FORMATS['jsonl'].text_fields
    if source.format == 'text':
        return dict.fromkeys(files, 'text')
    formats = {file: _by_name(file, source.format) for file in files}
    has_field = {
        file: readers.has_json_records(root / file, fields)
        for file, name in formats.items()
        if name == 'jsonl' and file.lower().endswith('.json') and source.format in ('auto', 'jsonl')
    }
    for file, value in has_field.items():
        formats[file] = 'jsonl' if value is not None else 'JSON that is not records'
    if source.format == 'auto':
        auto = _what_is_data(files, formats, has_field, f'{flag}.path={source.path}', flag)
        if auto == 'text':
            _check_texts(root, [file for file in files if file not in has_field], (*fields, 'content'), flag)
            return dict.fromkeys(files, 'text')
        wanted, other = set(FORMATS) - {'text'}, 'plain text beside data'
    else:
        auto, wanted, other = source.format, {source.format}, f'not {source.format}'
    formats |= {file: auto for file, name in formats.items() if name == 'archive'}
    return {file: name if name in wanted or name not in FORMATS else other for file, name in formats.items()}


def _check_texts(root: Path, files: Sequence[str], fields: tuple[str, ...], flag: str) -> None:
    """Raises UsageError if a file begins with a record: as plain text it would become a document as it is."""
    for file in files:
        if readers.begins_with_record(root / file, fields):
            raise errors.UsageError(
                f'{root / file} holds JSON lines or an array of records, not plain text; rename it to .json, or set '
                f'{flag}.format=text to read it so.'
            )


def _by_name(file: str, wanted: str) -> str:
    lower = file.lower()
    if lower.endswith(readers.ARCHIVES):
        return 'archive'
    if wanted == 'auto' and lower.removesuffix(Path(lower).suffix).endswith(readers.CORPUS_TEXTS):
        return 'text'  # compressed
    name = [name for name, row in FORMATS.items() if lower.endswith(row.suffixes)][-1]
    if name == 'arrow' and lower.split('/')[-1].startswith('cache-'):
        return 'a cache of `datasets`'
    return name


def _what_is_data(
    files: Sequence[str], formats: dict[str, str], has_field: dict[str, bool | None], where: str, flag: str
) -> str:
    """Returns what format=auto reads: 'text', or 'jsonl' for every format but text. Raises UsageError if unclear."""
    if any(name in FORMATS and name != 'text' and file not in has_field for file, name in formats.items()):
        return 'jsonl'
    texts = [file for file in files if formats[file] == 'text' and not _PAPERS.match(file.split('/')[-1])]
    records = [file for file, value in has_field.items() if value]
    if texts and records:
        raise errors.UsageError(
            f'{where} holds JSON records ({records[0]}) and plain text ({texts[0]}); say which is the data with '
            f'{flag}.format=jsonl or {flag}.format=text.'
        )
    if records or (not texts and any(value is False for value in has_field.values())):
        return 'jsonl'
    unread = [file for file in files if file.lower().endswith(_TABLES) or file in has_field]
    if unread and not set(texts) - set(unread):
        raise errors.UsageError(
            f'{where} holds no records: {unread[0]} is {"JSON" if unread[0] in has_field else "a table"} and would be '
            f'read as plain text; convert it to parquet or JSON lines, or set {flag}.format=text to read it so.'
        )
    return 'text'


def _inputs(
    root: Path, files: Sequence[str], formats: dict[str, str], source: SourceConfig, share: bool
) -> list[Input]:
    """Returns the inputs of the files of a split, in their order; a group stands where it is full, or at the end."""
    sizes = {file: (root / file).stat().st_size if (root / file).exists() else 0 for file in files}
    small = {file for file in files if formats[file] != 'text' and sizes[file] < _SMALL_BYTES}
    if not share or len(small) <= _FEW_FILES:
        small = set()
    inputs: list[Input] = []
    groups: dict[str, list[str]] = {}  # by format
    grouped: dict[str, int] = {}  # their bytes

    def add(name: str, members: Sequence[str]) -> None:
        fields = FORMATS[name].text_fields
        if fields and source.text_field:
            fields = (source.text_field,)
        inputs.append(Input(str(root), tuple(members), name, fields))

    for file in files:
        name = formats[file]
        if name != 'text' and file not in small:
            add(name, [file])
            continue
        groups.setdefault(name, []).append(file)
        grouped[name] = grouped.get(name, 0) + sizes[file]
        if grouped[name] >= _GROUP_BYTES:
            add(name, groups.pop(name))
            del grouped[name]
    for name, group in groups.items():
        add(name, group)
    return inputs
