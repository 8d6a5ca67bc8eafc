"""Readers of raw corpora: bad files, bad records, formats, splits."""

import gzip
import random
import shutil

import numpy as np
import pytest
import sentencepiece
import zstandard

from tests.support import corpora
from tinyllama_jax import errors
from tinyllama_jax.config import Config, DataConfig, SourceConfig, validated
from tinyllama_jax.data import prepare, readers, store


def _truncated_zst(path):
    rng = random.Random(0)
    records = [corpora.record(''.join(rng.choices('abcdefgh ', k=2000))) for _ in range(300)]
    data = corpora.write_zst(path.with_suffix('.jsonl.zst'), records).read_bytes()
    path.with_suffix('.jsonl.zst').write_bytes(data[: len(data) * 2 // 3])


def _second_frame_truncated(path):
    frame = zstandard.ZstdCompressor().compress(corpora.jsonl([corpora.record('words ' * 50)]))
    path.with_suffix('.jsonl.zst').write_bytes(frame + frame[:-3])


def _truncated_gz(path):
    path.with_suffix('.jsonl.gz').write_bytes(gzip.compress(corpora.jsonl([corpora.record('words')]))[:-4])


def _truncated_parquet(path):
    data = corpora.write_parquet(path.with_suffix('.parquet'), ['words'] * 50).read_bytes()
    path.with_suffix('.parquet').write_bytes(data[:-20])


def _damaged_parquet(path):
    data = bytearray(corpora.write_parquet(path.with_suffix('.parquet'), corpora.texts(50)).read_bytes())
    data[500:600] = bytes(100)
    path.with_suffix('.parquet').write_bytes(data)


BAD_FILES = {
    'truncated zst': (_truncated_zst, 'truncated'),
    'second frame truncated': (_second_frame_truncated, 'truncated'),
    'empty zst': (lambda path: path.with_suffix('.jsonl.zst').write_bytes(b''), 'is empty'),
    'not zst': (lambda path: path.with_suffix('.jsonl.zst').write_bytes(b'{"text": "plain"}\n' * 9), 'cannot be read'),
    'truncated gz': (_truncated_gz, 'cannot be read'),
    'truncated parquet': (_truncated_parquet, 'cannot be read'),
    'damaged parquet': (_damaged_parquet, 'cannot be read'),
    'no column': (
        lambda path: corpora.write_parquet(path.with_suffix('.parquet'), ['x'], 'code'),
        "no column 'content'",
    ),
    'every record bad': (lambda path: path.with_suffix('.jsonl').write_bytes(b'oops\n{}\n'), 'every record is bad'),
}


@pytest.mark.parametrize('fault', BAD_FILES)
def test_bad_files_contribute_nothing(tmp_path, fault):
    write, reason = BAD_FILES[fault]
    good, root, path = tmp_path / 'good', tmp_path / 'words', tmp_path / 'store'
    for name in ('a', 'c'):
        corpora.write_zst(root / f'{name}.jsonl.zst', [corpora.record(text) for text in corpora.texts(5)])
    shutil.copytree(root, good)
    write(root / 'b')
    (bad,) = {file.name for file in root.iterdir()} - {'a.jsonl.zst', 'c.jsonl.zst'}

    with pytest.raises(
        errors.UsageError, match=rf'source words: .*/{bad} is a bad file .*{reason}.*max_bad_share'
    ) as e:
        prepare.prepare(corpora.one_source(root), path)
    assert e.value.exit_code == 2
    assert not (path / store.MANIFEST).exists()
    with pytest.raises(errors.UsageError, match='1 of 3 files'):
        prepare.prepare(corpora.one_source(root, max_bad_share=0.3, workers=1 + (fault == 'not zst')), path)

    manifest = prepare.prepare(corpora.one_source(root, max_bad_share=0.34), path)
    source, whole = manifest['sources']['words'], prepare.prepare(corpora.one_source(good), tmp_path / 'good store')
    assert source['bad'] == {'files': 1, 'records': 0}
    assert (source['documents'], source['tokens']) == (10, whole['sources']['words']['tokens'])
    (listed,) = source['faults']
    assert (listed['file'], listed['record']) == (bad, None)
    assert reason in listed['reason']
    entries = source['splits']['train']['files']
    assert [entry['tokens'] > 0 for entry in entries] == [entry['name'] != bad for entry in entries]
    # The arrays hold nothing of the bad file, and prepare accepts the complete store.
    assert len(list((path / 'tokens').rglob('c/*'))) == 2
    assert prepare.prepare(corpora.one_source(root, max_bad_share=0.34), path) == manifest


def test_bad_records_are_counted_and_listed(tmp_path):
    faults = {
        1: (b'{"text": "cut', 'is not JSON'),
        2: (b'[1, 2]', 'is not a JSON object'),
        3: ({'meta': {}}, "has no 'text'"),
        4: (corpora.record(None), 'null'),
        5: (corpora.record(7), 'int'),
        6: (b'{"text": "\xff\xfe"}', 'is not UTF-8'),
        7: (b'[' * 100_000, 'is not JSON'),
        8: (b'{"text": ' + b'9' * 5000 + b'}', 'is not JSON'),
    }
    records = [corpora.record('first'), *(record for record, _ in faults.values()), b'  ', corpora.record('last')]
    records += [{'text': 'meta is a text', 'meta': 'x'}, {'text': ''}]
    corpora.write_zst(tmp_path / 'words' / 'a.jsonl.zst', records)
    source = prepare.prepare(corpora.one_source(tmp_path / 'words'), tmp_path / 'store')['sources']['words']
    assert (source['documents'], source['dropped'], source['bad']) == (3, 1, {'files': 0, 'records': len(faults)})
    assert {fault['record']: fault['file'] for fault in source['faults']} == dict.fromkeys(faults, 'a.jsonl.zst')
    for listed in source['faults']:
        assert faults[listed['record']][1] in listed['reason']
    numbers = store.TokenStore(tmp_path / 'store').documents('words', 'train', 0)[1]
    assert numbers.tolist() == [0, 10, 11]


def test_the_list_of_bad_records_is_capped(tmp_path):
    for i in range(8):
        corpora.write_zst(tmp_path / 'words' / f'{i}.jsonl.zst', [corpora.record('good'), *[b'bad'] * 50])
    source = prepare.prepare(corpora.one_source(tmp_path / 'words'), tmp_path / 'store')['sources']['words']
    assert source['bad'] == {'files': 0, 'records': 400}
    assert len(source['faults']) == 100


def test_bad_parquet_records_are_counted(tmp_path):
    corpora.write_parquet(tmp_path / 'words' / 'a.parquet', ['good', None, ''])
    source = prepare.prepare(corpora.one_source(tmp_path / 'words'), tmp_path / 'store')['sources']['words']
    assert (source['documents'], source['dropped'], source['bad']['records']) == (1, 1, 1)


def test_awkward_documents_go_through(tmp_path):
    long = 'a long line ' * 900_000  # 10.8 MB
    texts = ['a\0b', '\ud800', '😀' * 100, ' ', '\n', long]
    (tmp_path / 'words').mkdir()
    (tmp_path / 'words' / 'a.jsonl').write_bytes(corpora.jsonl([{'text': text} for text in texts]).rstrip(b'\n'))
    manifest = prepare.prepare(corpora.one_source(tmp_path / 'words'), tmp_path / 'store')
    assert manifest['sources']['words']['documents'] == len(texts)
    tokens = store.TokenStore(tmp_path / 'store')
    starts, _ = tokens.documents('words', 'train', 0)
    model = sentencepiece.SentencePieceProcessor(model_file=str(corpora.tokenizer_path()))
    last = tokens.read_stream('words', 'train', 0)[starts[-1] :]
    assert model.decode(last.tolist()) == long


def test_plain_text_and_source_trees(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, '_GROUP_BYTES', 1000)
    root = tmp_path / 'words'
    (root / 'package' / '.git').mkdir(parents=True)
    (root / 'package' / '.git' / 'config').write_text('hidden')
    texts = corpora.texts(6, words=60)
    for i, text in enumerate(texts):
        (root / 'package' / f'{i}.py').write_text(text)
    (root / 'package' / 'latin.c').write_bytes('café'.encode('latin-1'))
    (root / 'package' / 'logo.png').write_bytes(b'\x89PNG\0\xff')
    (root / 'package' / 'nul.txt').write_text('a\0b')
    (root / 'package' / 'z.txt').touch()
    source = prepare.prepare(corpora.one_source(root), tmp_path / 'store')['sources']['words']
    assert (source['documents'], source['dropped'], source['bad']) == (8, 1, {'files': 0, 'records': 1})
    assert 'logo.png' in source['faults'][0]['reason']
    assert len(source['splits']['train']['files']) > 1
    tokens = store.TokenStore(tmp_path / 'store')
    model = sentencepiece.SentencePieceProcessor(model_file=str(corpora.tokenizer_path()))
    documents = [
        model.decode(document.tolist())
        for i in range(len(source['splits']['train']['files']))
        for document in np.split(tokens.read_stream('words', 'train', i), tokens.documents('words', 'train', i)[0][1:])
    ]
    assert sorted(documents) == sorted([*texts, 'caf\ufffd', 'a\0b'])


def names(inputs):
    return {split: [name for entry in listed for name in entry.names] for split, listed in inputs.items()}


@pytest.mark.parametrize(
    ('source', 'expected'),
    [
        ({}, {'a.JSONL': ('jsonl', 'text'), 'b.zst': ('jsonl', 'text'), 'c.parquet': ('parquet', 'content')}),
        ({'format': 'jsonl', 'text_field': 'body'}, {'a.JSONL': ('jsonl', 'body'), 'b.zst': ('jsonl', 'body')}),
        ({'format': 'parquet'}, {'c.parquet': ('parquet', 'content')}),
        (
            {'format': 'text', 'text_field': 'body'},
            dict.fromkeys(('a.JSONL', 'b.zst', 'c.parquet', 'd'), ('text', None)),
        ),
    ],
    ids=lambda value: value.get('format', 'auto'),
)
def test_the_format_decides_which_files_are_read(tmp_path, monkeypatch, source, expected):
    monkeypatch.setattr(readers, '_GROUP_BYTES', 1)
    for name in ('a.JSONL', 'b.zst', 'c.parquet', 'd'):
        (tmp_path / name).write_text('x')
    inputs = readers.find_inputs('words', SourceConfig(path=str(tmp_path), **source))['train']
    assert {name: (entry.format, entry.text_field) for entry in inputs for name in entry.names} == expected


def test_a_source_may_have_every_format_that_can_be_read_and_no_other():
    def validate(name):
        validated(Config(data=DataConfig(sources={'words': SourceConfig(format=name)})))

    for name in ('auto', *readers.FORMATS):
        validate(name)
    with pytest.raises(errors.UsageError, match=r'sources\.words\.format') as error:
        validate('xml')
    choices = str(error.value).rstrip('.').split(' is not one of ')[1].split(', ')
    assert sorted(choices) == sorted(['auto', *readers.FORMATS])


def test_the_splits_of_a_folder(tmp_path):
    for name in ('train/a.jsonl', 'validation/b/c.jsonl', 'test/d.jsonl', 'e.jsonl'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"text": "x"}\n')

    def find():
        return names(readers.find_inputs('words', SourceConfig(path=str(tmp_path))))

    assert find() == {'train': ['train/a.jsonl'], 'validation': ['validation/b/c.jsonl']}
    (tmp_path / 'train' / 'linked').symlink_to(tmp_path / 'test')
    (tmp_path / 'train' / 'loop').symlink_to(tmp_path / 'train')
    assert find()['train'] == ['train/a.jsonl', 'train/linked/d.jsonl']
    shutil.rmtree(tmp_path / 'train')
    assert find() == {'train': ['e.jsonl'], 'validation': ['validation/b/c.jsonl']}
    shutil.rmtree(tmp_path / 'validation')
    (tmp_path / 'README.md').write_text('not data, beside data')
    (tmp_path / 'f.parquet').touch()
    assert find() == {'train': ['e.jsonl', 'f.parquet']}
