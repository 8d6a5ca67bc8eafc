"""Which files of a source are read, in which split and format, and why the others are not."""

import gzip
import itertools
import json
import lzma
import os
import shutil

import pytest

from tests.support import corpora
from tinyllama_jax import errors
from tinyllama_jax.config import SourceConfig
from tinyllama_jax.data import inputs, prepare, store
from tinyllama_jax.data.inputs import find_inputs


def write(root, *names, content='{"text": "some words"}\n'):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)


def listed(root, **source):
    """Returns the names of each split, and the reason of each ignored file."""
    found = find_inputs('words', SourceConfig(path=str(root), **source))
    return {split: [name for each in of for name in each.names] for split, of in found.splits.items()}, found.ignored


@pytest.mark.parametrize(
    ('source', 'expected'),
    [
        (
            {},
            {
                'a.JSONL': ('jsonl', ('text',)),
                'b.zst': ('jsonl', ('text',)),
                'c.parquet': ('parquet', ('content', 'text')),
            },
        ),
        ({'format': 'jsonl', 'text_field': 'body'}, {'a.JSONL': ('jsonl', ('body',)), 'b.zst': ('jsonl', ('body',))}),
        ({'format': 'parquet'}, {'c.parquet': ('parquet', ('content', 'text'))}),
        (
            {'format': 'text', 'text_field': 'body'},
            dict.fromkeys(('a.JSONL', 'b.zst', 'c.parquet', 'd'), ('text', ())),
        ),
    ],
    ids=lambda value: value.get('format', 'auto'),
)
def test_the_format_decides_which_files_are_read(tmp_path, monkeypatch, source, expected):
    monkeypatch.setattr(inputs, '_GROUP_BYTES', 1)
    for name in ('a.JSONL', 'b.zst', 'c.parquet', 'd'):
        (tmp_path / name).write_text('x')
    found = find_inputs('words', SourceConfig(path=str(tmp_path), **source))
    assert {name: (i.format, i.text_fields) for i in found.splits['train'] for name in i.names} == expected
    assert {*expected, *found.ignored} == {'a.JSONL', 'b.zst', 'c.parquet', 'd'}


def test_the_splits_of_a_folder(tmp_path):
    write(tmp_path, 'train/a.jsonl', 'validation/b/c.jsonl', 'test/d.jsonl', 'e.jsonl')

    def find():
        return listed(tmp_path)[0]

    assert find() == {'train': ['train/a.jsonl'], 'validation': ['validation/b/c.jsonl']}
    assert listed(tmp_path)[1] == {'e.jsonl': 'outside train/', 'test/d.jsonl': 'test split'}
    (tmp_path / 'train' / 'linked').symlink_to(tmp_path / 'test')
    (tmp_path / 'train' / 'loop').symlink_to(tmp_path / 'train')
    assert find()['train'] == ['train/a.jsonl', 'train/linked/d.jsonl']
    shutil.rmtree(tmp_path / 'train')
    assert find() == {'train': ['e.jsonl'], 'validation': ['validation/b/c.jsonl']}
    shutil.rmtree(tmp_path / 'validation')
    (tmp_path / 'README.md').write_text('not data, beside data')
    (tmp_path / 'f.parquet').touch()
    assert find() == {'train': ['e.jsonl', 'f.parquet']}


@pytest.mark.parametrize(
    ('files', 'train', 'validation'),
    [
        (['train-00000-of-00001.parquet', 'validation-00000-of-00001.parquet', 'test-00000-of-00001.parquet'], 1, 1),
        (['data/train-0.parquet', 'data/test-0.parquet', 'data/dev.parquet'], 1, 1),
        (['train/00.jsonl.zst', 'val.jsonl.zst', 'test.jsonl.zst'], 1, 1),  # the Pile
        (['en/c4-train.00000-of-01024.json.gz', 'en/c4-validation.00000-of-00008.json.gz'], 1, 1),
        (['wiki.train.tokens', 'wiki.valid.tokens', 'wiki.test.tokens'], 1, 1),
        (['TinyStories-train.txt', 'TinyStories-valid.txt'], 1, 1),
        *((['train/a.jsonl', f'{folder}/a.jsonl'], 1, 1) for folder in ('val', 'valid', 'dev', 'Validation')),
        (['a.jsonl', 'en/test/b.jsonl', 'en/dev/c.jsonl'], 1, 1),
        (['a.jsonl', 'eval.jsonl', 'testing.jsonl'], 1, 0),
        (['flores.train.jsonl', 'flores.dev.jsonl', 'flores.devtest.jsonl'], 1, 1),
        (['trainset.jsonl', 'valset.jsonl', 'testset.jsonl', 'TestData.jsonl', 'tests/a.jsonl'], 1, 1),
        (['aclImdb/train/pos/1.txt', 'aclImdb/test/pos/1.txt', 'aclImdb/dev/2.txt', 'b/x.txt', 'b/test/y.txt'], 3, 1),
        (['latest.jsonl', 'contest-1.jsonl', 'devices.jsonl', 'evaluate.jsonl', 'valley/a.jsonl'], 5, 0),
        # Of a source tree, tests and tools are code like the rest.
        (['src/test/a.py', 'dev/b.py', 'test_c.py', 'test.py', 'train.py', 'val.py'], 6, 0),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else '',
)
def test_names_tell_the_split(tmp_path, files, train, validation):
    write(tmp_path, *files, content='some words')
    splits, ignored = listed(tmp_path)
    assert [len(splits.get(split, [])) for split in ('train', 'validation')] == [train, validation]
    assert set(ignored.values()) <= {'test split'}
    assert sorted([*itertools.chain(*splits.values()), *ignored]) == sorted(files)


def test_only_test_files_are_nothing_to_train_on(tmp_path):
    write(tmp_path, 'test-00000-of-00001.jsonl')
    with pytest.raises(errors.UsageError, match=r'no files to train on \(test-00000-of-00001\.jsonl: test split\)'):
        listed(tmp_path)
    assert listed(tmp_path / 'test-00000-of-00001.jsonl')[0] == {'train': ['test-00000-of-00001.jsonl']}


def test_every_file_is_read_or_named(tmp_path):
    read = ['a.jsonl', 'b.jsonl.xz', 'c.jsonl.bz2', 'd.ndjson', 'e.jsonlines', 'f.json', 'g.parquet', 'h.arrow']
    write(tmp_path, *read, 'README.md', '.git/HEAD', '.hidden.jsonl', 'notes.csv', 'cache-1f.arrow', 'test.jsonl')
    write(tmp_path, 'dataset_info.json', content='{\n "features": {"text": 1}\n}')
    splits, ignored = listed(tmp_path)
    assert splits == {'train': read}
    assert ignored == {
        '.git/': 'hidden',
        '.hidden.jsonl': 'hidden',
        'README.md': 'plain text beside data',
        'cache-1f.arrow': 'a cache of `datasets`',
        'dataset_info.json': 'JSON that is not records',
        'notes.csv': 'plain text beside data',
        'test.jsonl': 'test split',
    }
    assert listed(tmp_path, format='parquet')[1]['a.jsonl'] == 'not parquet'


def test_what_would_be_taken_for_text_is_refused_or_asked_about(tmp_path):
    write(tmp_path, 'config.json', 'README.md', content='{\n "a": 1\n}')
    with pytest.raises(errors.UsageError, match=r'config\.json is JSON .*format=text'):
        listed(tmp_path)
    write(tmp_path, 'config.csv')
    (tmp_path / 'config.json').unlink()
    with pytest.raises(errors.UsageError, match=r'config\.csv is a table .*format=text'):
        listed(tmp_path)
    write(tmp_path, 'a.py')  # a source tree
    write(tmp_path, 'b.json', content='[{"id": 1}]')
    assert listed(tmp_path)[0] == {'train': ['README.md', 'a.py', 'b.json', 'config.csv']}
    write(tmp_path, 'b.json')
    with pytest.raises(errors.UsageError, match=r'JSON records \(b\.json\) and plain text \(a\.py\).*format=jsonl or'):
        listed(tmp_path)
    assert listed(tmp_path, format='jsonl')[0] == {'train': ['b.json']}


@pytest.mark.parametrize('content', [b'{"text": "some words"}\n' * 2, b'[{"content": "some words"},\n{"content": ""}]'])
@pytest.mark.parametrize('name', ['a.txt', 'a', 'a.txt.gz', 'a.log', 'a.jsonl.1'])
def test_json_lines_by_another_name_are_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith('gz') else content)
    with pytest.raises(errors.UsageError, match=rf'/{name} holds JSON lines'):
        listed(tmp_path)
    assert listed(tmp_path, format='text')[0] == {'train': [name]}


def test_a_single_record_is_refused_in_a_text_only(tmp_path):
    write(tmp_path, 'a.txt', content='{"text": "some words"}')
    with pytest.raises(errors.UsageError, match=r'/a\.txt holds JSON lines or an array'):
        listed(tmp_path)
    (tmp_path / 'a.txt').rename(tmp_path / 'a.py')
    assert listed(tmp_path)[0] == {'train': ['a.py']}


def test_compressed_plain_text_is_plain_text(tmp_path):
    (tmp_path / 'en.txt.xz').write_bytes(lzma.compress(b'some words\nof text\n'))
    assert [i.format for i in find_inputs('words', SourceConfig(path=str(tmp_path))).splits['train']] == ['text']
    write(tmp_path, 'a.jsonl')
    assert listed(tmp_path) == ({'train': ['a.jsonl']}, {'en.txt.xz': 'plain text beside data'})


def test_a_file_of_two_names_is_read_once(tmp_path):
    hub = tmp_path / 'datasets--a--b'
    write(hub, 'blobs/0a1b', 'refs/main')
    for revision in ('111', '222'):
        (hub / 'snapshots' / revision).mkdir(parents=True)
        (hub / 'snapshots' / revision / 'train.jsonl').symlink_to(hub / 'blobs' / '0a1b')
    splits, ignored = listed(hub)
    assert splits == {'train': ['snapshots/111/train.jsonl']}
    same = 'the same file as snapshots/111/train.jsonl'
    assert ignored == {
        'blobs/0a1b': same, 'refs/main': 'plain text beside data', 'snapshots/222/train.jsonl': same,
    }  # fmt: skip


def test_a_test_file_is_not_trained_on_by_another_name(tmp_path):
    hub = tmp_path / 'hub'
    write(hub, 'blobs/0a', 'blobs/0b', 'blobs/0c', 'refs/main', content='some words')
    (hub / 'snapshots' / '111').mkdir(parents=True)
    for name, blob in (('train', '0a'), ('valid', '0b'), ('test', '0c')):
        (hub / 'snapshots' / '111' / f'wiki.{name}.tokens').symlink_to(hub / 'blobs' / blob)
    splits, ignored = listed(hub)
    assert splits == {
        'train': ['snapshots/111/wiki.train.tokens'],
        'validation': ['snapshots/111/wiki.valid.tokens'],
    }
    assert ignored['refs/main'] == ignored['blobs/0c'] == "a hub cache's own"
    write(tmp_path / 'pool', 'all/a.jsonl', 'all/b.jsonl')
    (tmp_path / 'pool' / 'test').mkdir()
    (tmp_path / 'pool' / 'test' / 'b.jsonl').symlink_to(tmp_path / 'pool' / 'all' / 'b.jsonl')
    assert listed(tmp_path / 'pool') == (
        {'train': ['all/a.jsonl']},
        {'all/b.jsonl': 'the same file as test/b.jsonl', 'test/b.jsonl': 'test split'},
    )


def test_copies_are_named(tmp_path, capsys):
    for revision in ('a', 'b'):
        path = tmp_path / 'words' / 'snapshots' / revision / 'x.jsonl.zst'
        corpora.write_zst(path, [corpora.record('the same words')])
    prepare.prepare(corpora.one_source(tmp_path / 'words'), tmp_path / 'store')
    said = capsys.readouterr().out
    assert 'words: these are 2 snapshots of one repository' in said
    assert 'words: the same documents in snapshots/a/x.jsonl.zst, snapshots/b/x.jsonl.zst' in said


@pytest.mark.parametrize('suffix', ['jsonl', 'txt'])
def test_copies_within_a_stream_are_named(tmp_path, capsys, suffix):
    for folder, i in itertools.product('ab', range(10)):
        text = f'some words {i}' if i else ''
        content = text if suffix == 'txt' else json.dumps({'text': text})
        write(tmp_path / 'words' / folder, f'{i}.{suffix}', content=content)
    prepare.prepare(corpora.one_source(tmp_path / 'words'), tmp_path / 'store')
    said = capsys.readouterr().out
    assert f'words: the same documents in a/1.{suffix}, b/1.{suffix}\n' in said
    assert f'a/0.{suffix}, b/0' not in said
    assert 'words: and 1 more sets of files with the same documents' in said


@pytest.mark.parametrize('workdir', ['.', 'runs/a'])
def test_a_workdir_inside_a_source_is_left_out(tmp_path, workdir):
    write(tmp_path, 'a.txt', 'b.txt', content='some words of text')
    folder = tmp_path / workdir
    config = corpora.one_source(tmp_path)
    manifest = prepare.prepare(config, folder / 'store', workdir=folder)
    write(folder, 'config.json', 'metrics.jsonl')
    assert prepare.prepare(config, folder / 'store', workdir=folder) == manifest
    if workdir != '.':  # nor is it read for another run
        other = prepare.prepare(config, tmp_path / 'runs' / 'b' / 'store', workdir=tmp_path / 'runs' / 'b')
        assert other['sources']['words']['splits'] == manifest['sources']['words']['splits']
        assert {'file': 'runs/a/', 'reason': "a run's own"} in other['sources']['words']['ignored']


@pytest.mark.parametrize('kind', ['jsonl', 'parquet'])
def test_small_files_share_streams(tmp_path, kind):
    texts = corpora.texts(300, words=40)
    for i, text in enumerate(texts):
        if kind == 'parquet':
            corpora.write_parquet(tmp_path / 'words' / f'{i:03}.parquet', [text], 'text')
        else:
            write(tmp_path / 'words', f'{i:03}.jsonl', content='\n' + json.dumps({'text': text}) + '\n')
    config = corpora.one_source(tmp_path / 'words')
    manifest = prepare.prepare(config, tmp_path / 'store', seq_len=255)
    assert manifest['version'] == store.SHARED_VERSION
    train = manifest['sources']['words']['splits']['train']
    (stream,) = train['files']
    assert stream['names'] == sorted(os.listdir(tmp_path / 'words'))
    assert train['in_no_row'] == {'seq_len': 255, 'tokens': train['tokens'] % 256}
    tokens = store.TokenStore(tmp_path / 'store')
    _, numbers = tokens.documents('words', 'train', 0)
    assert [stream['names'][stream['first_records'].index(n - (kind == 'jsonl'))] for n in numbers] == stream['names']
    prepare.prepare(config, tmp_path / 'store')  # complete
    prepare.prepare(corpora.one_source(tmp_path / 'words', workers=2), tmp_path / 'two', seq_len=255)
    corpora.assert_same_files(tmp_path / 'store', tmp_path / 'two')


def test_a_bad_file_leaves_the_others_of_its_stream(tmp_path):
    root = tmp_path / 'words'
    for i in range(20):
        write(root, f'{i:02}.jsonl', content=json.dumps({'text': f'document {i}'}) + '\n')
    corpora.write_zst(root / '07.jsonl.zst', [corpora.record('cut') for _ in range(9)])
    (root / '07.jsonl.zst').write_bytes((root / '07.jsonl.zst').read_bytes()[:-4])
    write(root, '08.jsonl', content='oops\n')
    with pytest.raises(errors.UsageError, match=r'07\.jsonl\.zst is a bad file .*truncated.* 1 of 21 files'):
        prepare.prepare(corpora.one_source(root), tmp_path / 'store')
    source = prepare.prepare(corpora.one_source(root, max_bad_share=0.1), tmp_path / 'store')['sources']['words']
    assert (source['documents'], source['bad']) == (19, {'files': 2, 'records': 0})
    assert [fault['file'] for fault in source['faults']] == ['07.jsonl.zst', '08.jsonl']


def test_a_complete_store_of_version_1_stays_complete(tmp_path, monkeypatch):
    """Before small files shared streams, each had its own."""
    for i in range(20):
        write(tmp_path / 'words', f'{i:02}.jsonl')
    config = corpora.one_source(tmp_path / 'words')
    with monkeypatch.context() as patch:
        patch.setattr(inputs, '_FEW_FILES', 20)
        manifest = prepare.prepare(config, tmp_path / 'store')
    assert (manifest['version'], len(manifest['sources']['words']['splits']['train']['files'])) == (store.VERSION, 20)
    assert prepare.prepare(config, tmp_path / 'store') == manifest
    shutil.rmtree(tmp_path / 'store')
    assert prepare.prepare(config, tmp_path / 'store')['version'] == store.SHARED_VERSION
