"""Readers of raw corpora: bad files, bad records, formats, compression, encodings."""

import bz2
import gzip
import io
import json
import lzma
import random
import shutil
import tarfile

import numpy as np
import pyarrow
import pytest
import sentencepiece
import zstandard

from tests.support import corpora
from tinyllama_jax import errors
from tinyllama_jax.config import Config, DataConfig, SourceConfig, validated
from tinyllama_jax.data import inputs, prepare, readers, store


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


def _truncated_arrow(path):
    table = pyarrow.table({'text': corpora.texts(50)})
    data = _arrow_stream(table)
    path.with_suffix('.arrow').write_bytes(data[:-8])


def _arrow_stream(table: pyarrow.Table) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def _tar(path, name, compress):
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode='w') as archive:
        archive.addfile(tarfile.TarInfo('a.jsonl'), io.BytesIO())
    path.with_name(name).write_bytes(compress(sink.getvalue()))


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
        "no column 'content' or 'text'; its columns are code",
    ),
    'both columns': (
        lambda path: pyarrow.parquet.write_table(
            pyarrow.table({'text': ['x'], 'content': ['y']}), path.with_suffix('.parquet')
        ),
        "has the columns 'content' and 'text'; set text_field",
    ),
    'every record bad': (lambda path: path.with_suffix('.jsonl').write_bytes(b'oops\n{}\n'), 'every record is bad'),
    'another field': (
        lambda path: path.with_suffix('.jsonl').write_bytes(b'{"content": "x"}\n' * 2),
        "has no 'text'; its fields are content: set text_field to one",
    ),
    'lines in UTF-16': (
        lambda path: path.with_suffix('.jsonl').write_bytes(GOOD_LINES.decode().encode('utf-16')),
        'holds lines in UTF-16',
    ),
    'truncated xz': (
        lambda path: path.with_suffix('.jsonl.xz').write_bytes(lzma.compress(GOOD_LINES)[:-20]),
        'truncated',
    ),
    'second bz2 stream damaged': (
        lambda path: path.with_suffix('.jsonl.bz2').write_bytes(bz2.compress(GOOD_LINES) + b'BZh9 and no more'),
        'cannot be read',
    ),
    'truncated arrow': (_truncated_arrow, 'truncated'),
    'tar': (lambda path: _tar(path, 'b.tar', bytes), 'is an archive'),
    'tar.gz': (lambda path: _tar(path, 'b.tar.gz', gzip.compress), 'is an archive'),
    'tar by another name': (lambda path: _tar(path, 'b.gz', gzip.compress), 'is a tar archive'),
}
GOOD_LINES = corpora.jsonl([corpora.record(text) for text in corpora.texts(20)])


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
    with pytest.raises(errors.UsageError, match=r'8 of 12 records are bad .*a\.jsonl\.zst, record 1, is not JSON'):
        prepare.prepare(corpora.one_source(tmp_path / 'words', max_bad_share=0.6), tmp_path / 'store')
    config = corpora.one_source(tmp_path / 'words', max_bad_share=0.7)
    source = prepare.prepare(config, tmp_path / 'store')['sources']['words']
    assert (source['documents'], source['dropped'], source['bad']) == (3, 1, {'files': 0, 'records': len(faults)})
    assert {fault['record']: fault['file'] for fault in source['faults']} == dict.fromkeys(faults, 'a.jsonl.zst')
    for listed in source['faults']:
        assert faults[listed['record']][1] in listed['reason']
    numbers = store.TokenStore(tmp_path / 'store').documents('words', 'train', 0)[1]
    assert numbers.tolist() == [0, 10, 11]


def test_the_list_of_bad_records_is_capped(tmp_path):
    for i in range(8):
        corpora.write_zst(tmp_path / 'words' / f'{i}.jsonl.zst', [corpora.record('good'), *[b'bad'] * 50])
    config = corpora.one_source(tmp_path / 'words', max_bad_share=0.99)
    source = prepare.prepare(config, tmp_path / 'store')['sources']['words']
    assert source['bad'] == {'files': 0, 'records': 400}
    assert len(source['faults']) == 100


def test_bad_parquet_records_are_counted(tmp_path):
    corpora.write_parquet(tmp_path / 'words' / 'a.parquet', ['good', None, ''])
    config = corpora.one_source(tmp_path / 'words', max_bad_share=0.5)
    source = prepare.prepare(config, tmp_path / 'store')['sources']['words']
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
    monkeypatch.setattr(inputs, '_GROUP_BYTES', 1000)
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
    assert (source['documents'], source['dropped'], source['bad']) == (8, 1, {'files': 0, 'records': 0})
    assert source['ignored'] == [
        {'file': 'package/.git/', 'reason': 'hidden'},
        {'file': 'package/logo.png', 'reason': 'is binary, not text'},
    ]
    assert len(source['splits']['train']['files']) > 1
    tokens = store.TokenStore(tmp_path / 'store')
    model = sentencepiece.SentencePieceProcessor(model_file=str(corpora.tokenizer_path()))
    documents = [
        model.decode(document.tolist())
        for i in range(len(source['splits']['train']['files']))
        for document in np.split(tokens.read_stream('words', 'train', i), tokens.documents('words', 'train', i)[0][1:])
    ]
    assert sorted(documents) == sorted([*texts, 'caf\ufffd', 'a\0b'])


def test_a_source_may_have_every_format_that_can_be_read_and_no_other():
    def validate(name):
        validated(Config(data=DataConfig(sources={'words': SourceConfig(format=name)})))

    for name in ('auto', *readers.FORMATS):
        validate(name)
    with pytest.raises(errors.UsageError, match=r'sources\.words\.format') as error:
        validate('xml')
    choices = str(error.value).rstrip('.').split(' is not one of ')[1].split(', ')
    assert sorted(choices) == sorted(['auto', *readers.FORMATS])


def read(path, file_format='jsonl', fields=('text',)):
    """Returns the texts of a file."""
    source = readers.Input(str(path.parent), (path.name,), file_format, fields)
    return [record.text for record in readers.read_records(source)]


COMPRESS = {'xz': lzma.compress, 'bz2': bz2.compress, 'gz': gzip.compress}
COMPRESS['zst'] = COMPRESS['zstd'] = zstandard.ZstdCompressor().compress
COMPRESS['lzma'] = lambda data: lzma.compress(data, format=lzma.FORMAT_ALONE)
COMPRESS |= {'gzip': gzip.compress, 'bz': bz2.compress}


@pytest.mark.parametrize('suffix', COMPRESS)
def test_streams_one_after_another_are_read(tmp_path, suffix):
    texts = corpora.texts(6)
    halves = [corpora.jsonl([{'text': text} for text in half]) for half in (texts[:3], texts[3:])]
    path = tmp_path / f'a.jsonl.{suffix}'
    path.write_bytes(b''.join(map(COMPRESS[suffix], halves)) + bytes(4) * (suffix == 'xz'))  # xz may be padded
    assert read(path) == texts


JSON = {
    'lines': lambda records: corpora.jsonl(records),
    'an array': lambda records: json.dumps(records).encode(),
    'an array over many lines': lambda records: json.dumps(records, indent=1).encode(),
}


@pytest.mark.parametrize('written', JSON)
@pytest.mark.parametrize('name', ['a.json', 'a.json.xz'])
def test_json_is_read_however_its_records_are_written(tmp_path, written, name):
    texts = corpora.texts(3)
    content = JSON[written]([{'id': 7, 'text': text} for text in texts])
    (tmp_path / name).write_bytes(lzma.compress(content) if name.endswith('xz') else content)
    assert read(tmp_path / name) == texts
    if name == 'a.json':
        assert readers.has_json_records(tmp_path / name, ('text',))
        assert readers.has_json_records(tmp_path / name, ('body',)) is False


def test_json_that_is_not_records_is_known(tmp_path):
    path = tmp_path / 'a.json'
    for content, expected in [
        ('{"features": {"text": 1}}', None), ('{\n "a": 1\n}', None), ('["a", "b"]', None), ('', None), ('7', None),
        ('{\n "text": "one"\n}', True), ('{"text": "one"}', True), ('{"text": "cut\n{"text": "b"}', False),
    ]:  # fmt: skip
        path.write_text(content)
        assert readers.has_json_records(path, ('text',)) is expected, content
    path.write_text('{\n "text": "one"\n}')
    assert read(path) == ['one']


@pytest.mark.parametrize('kind', ['stream', 'file'])
def test_arrow_is_read(tmp_path, kind):
    table = pyarrow.table({'content': corpora.texts(5), 'id': range(5)})
    if kind == 'file':
        with pyarrow.ipc.new_file(str(tmp_path / 'a.arrow'), table.schema) as writer:
            writer.write_table(table)
    else:
        (tmp_path / 'a.arrow').write_bytes(_arrow_stream(table))
    assert read(tmp_path / 'a.arrow', 'arrow', ('text', 'content')) == corpora.texts(5)


def test_encodings_of_plain_text(tmp_path):
    path, text = tmp_path / 'a.txt', 'naïve 東京\n'
    for encoding in ('utf-8', 'utf-16', 'utf-32'):  # the latter two begin with a mark
        path.write_text(text, encoding=encoding)
        assert read(path, 'text', ()) == [text]
    path.with_suffix('.txt.xz').write_bytes(lzma.compress(text.encode()))
    assert read(path.with_suffix('.txt.xz'), 'text', ()) == [text]
    parquet = corpora.write_parquet(tmp_path / 'a.parquet', ['x']).read_bytes()
    for content, reason in [
        ('plain words of text'.encode('utf-16-le'), 'UTF-16 without its mark'), (b'\x89\0\xff', 'is binary'),
        (parquet, 'not text but parquet'), (bz2.compress(b'x'), 'not text but bzip2'),
        (b'\xff\xfea', 'begins like UTF-16'), ('東京の言葉'.encode('shift-jis'), 'is not UTF-8'),
        (b'%PDF-1.7\n', 'is binary'), (b'SQLite format 3\0', 'is binary'), (b'WARC/1.0\r\n', 'not text but WARC'),
    ]:  # fmt: skip
        path.write_bytes(content)
        with pytest.raises(readers.BadFile, match=reason):
            read(path, 'text', ())


def test_most_of_a_folder_that_cannot_be_read_is_refused(tmp_path):
    root = tmp_path / 'words'
    root.mkdir()
    for i, text in enumerate(corpora.texts(20)):
        (root / f'{i:02}.txt').write_bytes(text.encode('utf-16-le' if i else 'utf-8'))
    with pytest.raises(errors.UsageError, match=r'/01\.txt is a bad file .*UTF-16.* 1 of 20 files'):
        prepare.prepare(corpora.one_source(root), tmp_path / 'store')
    shutil.rmtree(root)
    root.mkdir()
    lines = b',\n'.join(json.dumps({'text': text}).encode() for text in corpora.texts(40))
    (root / 'a.jsonl').write_bytes(lines)
    with pytest.raises(errors.UsageError, match=r'39 of 40 records are bad .*a\.jsonl, record 0, is not JSON'):
        prepare.prepare(corpora.one_source(root), tmp_path / 'store')
