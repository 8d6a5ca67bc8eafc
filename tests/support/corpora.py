"""Small corpora in the published formats, and a tokenizer trained on them, for tests."""

import filecmp
import functools
import json
import pathlib
import random
import tempfile

import pyarrow
import pyarrow.parquet
import zstandard

from tinyllama_jax.config import DataConfig, SourceConfig
from tinyllama_jax.tokenizer import spm

PIECES = 400
_LETTERS = 'etaoinshrdlu'


def texts(count: int, *, seed: int = 0, words: int = 120) -> list[str]:
    """Returns `count` texts of invented words, digits, indented lines and tabs, with some words that are not ASCII."""
    rng = random.Random(seed)
    lexicon = [''.join(rng.choices(_LETTERS, k=rng.randint(1, 9))) for _ in range(300)]
    lexicon += ['naïve', '東京', '1984', 'x = [0]', '\n    if', '\n\treturn', '  ', '\n\n']
    return [' '.join(rng.choices(lexicon, k=rng.randint(words // 2, words * 2))) for _ in range(count)]


@functools.cache
def tokenizer_path() -> pathlib.Path:
    """Returns the path of a SentencePiece model of PIECES pieces trained on `texts`."""
    path = pathlib.Path(tempfile.mkdtemp(prefix='tinyllama-test-tokenizer-')) / 'tokenizer.model'
    spm.train(texts(200, seed=99), path, PIECES)
    return path


def jsonl(records: list) -> bytes:
    """Returns the records as lines of JSON; bytes among the records become lines unchanged."""
    lines = [record if isinstance(record, bytes) else json.dumps(record).encode() for record in records]
    return b''.join(line + b'\n' for line in lines)


def record(text: object, set_name: str = 'RedPajamaC4') -> dict:
    """Returns a SlimPajama record."""
    return {'text': text, 'meta': {'redpajama_set_name': set_name}}


def write_zst(path: pathlib.Path, records: list) -> pathlib.Path:
    """Writes a .jsonl.zst file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(zstandard.ZstdCompressor().compress(jsonl(records)))
    return path


def write_parquet(path: pathlib.Path, contents: list, column: str = 'content') -> pathlib.Path:
    """Writes a parquet file of one text column."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table({column: pyarrow.array(contents, pyarrow.string())}), path)
    return path


def slimpajama(root: pathlib.Path, *, files: int = 3, documents: int = 12) -> pathlib.Path:
    """Writes a SlimPajama tree: train files with a dropped and an empty document each, validation, unreadable test."""
    for i in range(files):
        records = [record(text) for text in texts(documents, seed=i)]
        records[2:2] = [record('some code', 'RedPajamaGithub'), record('')]
        write_zst(root / 'train' / f'chunk{i % 2 + 1}' / f'example_train_{i}.jsonl.zst', records)
    write_zst(root / 'validation' / 'chunk1' / 'example_holdout_0.jsonl.zst', [record(t) for t in texts(8, seed=50)])
    (root / 'test' / 'chunk1').mkdir(parents=True)
    (root / 'test' / 'chunk1' / 'example_holdout_0.jsonl.zst').write_bytes(b'never to be read')
    return root


def starcoder(root: pathlib.Path, *, files: int = 2, documents: int = 12) -> pathlib.Path:
    """Writes a StarCoderData tree of `files` languages."""
    for i in range(files):
        write_parquet(root / f'lang{i}' / 'train-00000-of-00001.parquet', texts(documents, seed=20 + i))
    return root


def config(root: pathlib.Path, **changes) -> DataConfig:
    """Returns a DataConfig of both trees below `root`; writes them if they do not exist."""
    if not (root / 'slim').exists():
        slimpajama(root / 'slim')
        starcoder(root / 'star')
    sources = {
        'slimpajama': SourceConfig(path=str(root / 'slim'), weight=0.7),
        'starcoder': SourceConfig(path=str(root / 'star'), weight=0.3),
    }
    return DataConfig(**{'sources': sources, 'tokenizer': str(tokenizer_path()), 'workers': 1, **changes})


def one_source(path, **changes) -> DataConfig:
    """Returns a DataConfig of one source, `words`, at `path`, for one worker."""
    fields = {field: changes.pop(field) for field in ('format', 'text_field') if field in changes}
    sources = {'words': SourceConfig(path=str(path), **fields)}
    return DataConfig(**{'sources': sources, 'tokenizer': str(tokenizer_path()), 'workers': 1, **changes})


def assert_same_files(left: pathlib.Path, right: pathlib.Path) -> None:
    """Fails unless two folders hold the same files with the same bytes."""
    names = [sorted(str(f.relative_to(root)) for f in root.rglob('*') if f.is_file()) for root in (left, right)]
    assert names[0] == names[1]
    assert len(names[0]) > 5
    assert filecmp.cmpfiles(left, right, names[0], shallow=False)[0] == names[0]
