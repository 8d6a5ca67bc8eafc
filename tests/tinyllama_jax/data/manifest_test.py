"""The manifest: which records are dropped and said to be, the table that prepare prints."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from tests.support import corpora
from tinyllama_jax import errors
from tinyllama_jax.config import DataConfig, SourceConfig
from tinyllama_jax.data import manifest, prepare

SETS = ['RedPajamaC4', 'RedPajamaGithub', 'RedPajamaBook', 'RedPajamaGithub']
FORMS = {
    'nested': lambda name: {'meta': {'redpajama_set_name': name}},
    'flat': lambda name: {'redpajama_set_name': name},
    'JSON in a string': lambda name: {'meta': json.dumps({'redpajama_set_name': name})},
    "Python's dict in a string": lambda name: {'meta': str({'redpajama_set_name': name})},
    'JSON in JSON in a string': lambda name: {'meta': ' ' + json.dumps(json.dumps({'redpajama_set_name': name}))},
    'bytes': lambda name: {'meta': {'redpajama_set_name': name.encode()}},
    'a list that begins with null': lambda name: {'meta': [None, name]},
    'another field': lambda name: {'id': 7, 'source': name},
    'a list': lambda name: {'meta': {'sets': [name]}},
}


def config(root, **source) -> DataConfig:
    sources = {'words': SourceConfig(path=str(root), **source)}
    return DataConfig(sources=sources, tokenizer=str(corpora.tokenizer_path()), workers=1)


@pytest.mark.parametrize('suffix', ['jsonl', 'parquet'])
@pytest.mark.parametrize('form', FORMS)
def test_a_set_is_dropped_however_its_name_is_written(tmp_path, form, suffix):
    if (form, suffix) == ('bytes', 'jsonl'):
        pytest.skip('JSON has no bytes')
    records = [{'text': f'document {i}', **FORMS[form](name)} for i, name in enumerate(SETS)]
    (tmp_path / 'words').mkdir()
    if suffix == 'parquet':
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / 'words' / 'a.parquet')
    else:
        (tmp_path / 'words' / 'a.jsonl').write_bytes(corpora.jsonl(records))
    source = prepare.prepare(config(tmp_path / 'words'), tmp_path / 'store')['sources']['words']
    assert (source['documents'], source['dropped']) == (2, 2)


def test_a_set_is_dropped_in_a_map_of_arrow(tmp_path):
    (tmp_path / 'words').mkdir()
    maps = pyarrow.array([[('set', name)] for name in SETS], pyarrow.map_(pyarrow.string(), pyarrow.string()))
    table = pyarrow.table({'text': ['some words'] * len(SETS), 'meta': maps})
    pyarrow.parquet.write_table(table, tmp_path / 'words' / 'a.parquet')
    source = prepare.prepare(config(tmp_path / 'words'), tmp_path / 'store')['sources']['words']
    assert (source['documents'], source['dropped']) == (2, 2)


@pytest.mark.parametrize('name', ['{}.jsonl.zst', '{}-00000-of-00002.jsonl.zst', '{}_train_7.jsonl.zst'])
def test_a_set_is_dropped_by_its_file(tmp_path, name):
    for each in ('RedPajamaC4', 'RedPajamaGithub', 'RedPajamaGithubIssues'):
        corpora.write_zst(tmp_path / 'words' / name.format(each), [{'text': 'some words'}])
    source = prepare.prepare(config(tmp_path / 'words'), tmp_path / 'store')['sources']['words']
    assert (source['documents'], source['dropped']) == (2, 1)


def test_drop_sets_that_miss_are_said(tmp_path, capsys):
    (tmp_path / 'words').mkdir()
    (tmp_path / 'words' / 'a.jsonl').write_bytes(corpora.jsonl([corpora.record('some words', 'code')]))
    (tmp_path / 'words' / 'b.jsonl').write_bytes(corpora.jsonl([{'text': 'more words'}, corpora.record('last words')]))
    prepare.prepare(config(tmp_path / 'words', drop_sets=('Code',)), tmp_path / 'store')
    assert 'words: no record is in a set of drop_sets; check' in capsys.readouterr().out
    prepare.prepare(config(tmp_path / 'words', drop_sets=('code',)), tmp_path / 'other')
    said = capsys.readouterr().out
    assert 'no record is in a set' not in said
    assert 'words: 1 records have no field that could name a set; of them only files and folders' in said


def test_a_set_is_dropped_by_its_folder_but_not_by_its_text(tmp_path):
    for folder in ('RedPajamaC4', 'RedPajamaGithub'):
        corpora.write_zst(tmp_path / 'words' / folder / '0.jsonl.zst', [{'text': 'RedPajamaGithub'}])
    source = prepare.prepare(config(tmp_path / 'words'), tmp_path / 'store')['sources']['words']
    assert (source['documents'], source['dropped']) == (1, 1)


@pytest.mark.parametrize('suffix', ['jsonl', 'parquet'])
@pytest.mark.parametrize('value', [3, 3.0])
def test_a_set_that_is_a_number_is_refused(tmp_path, suffix, value):
    (tmp_path / 'words').mkdir()
    records = [{'text': 'some words', 'meta': {'redpajama_set_name': value}}]
    if suffix == 'parquet':
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / 'words' / 'a.parquet')
    else:
        (tmp_path / 'words' / 'a.jsonl').write_bytes(corpora.jsonl(records))
    with pytest.raises(errors.UsageError, match='sets of its records by numbers'):
        prepare.prepare(config(tmp_path / 'words'), tmp_path / 'store')
    prepare.prepare(config(tmp_path / 'words', drop_sets=()), tmp_path / 'store')


def test_drop_sets_without_anything_to_compare_with_are_refused(tmp_path):
    corpora.write_zst(tmp_path / 'words' / 'a.jsonl.zst', [{'text': 'some words', 'id': 7}])
    with pytest.raises(errors.UsageError, match=r'words\.drop_sets=github has nothing to compare with'):
        prepare.prepare(config(tmp_path / 'words', drop_sets=('github',)), tmp_path / 'store')
    prepare.prepare(config(tmp_path / 'words'), tmp_path / 'store')  # the default's set is SlimPajama's alone


def test_the_table_says_what_is_read_and_what_is_not(tmp_path, capsys):
    root = corpora.slimpajama(tmp_path / 'words')
    (root / 'README.md').write_text('about it')
    made = prepare.prepare(config(root), tmp_path / 'store', seq_len=255)
    said = capsys.readouterr().out
    assert 'words: train reads train/chunk1/example_train_0.jsonl.zst, train/chunk1/example_train_2' in said
    assert 'words: validation reads validation/chunk1/example_holdout_0.jsonl.zst' in said
    assert 'words: not read (test split): test/chunk1/example_holdout_0.jsonl.zst' in said
    assert 'words: not read (plain text beside data): README.md' in said
    train = made['sources']['words']['splits']['train']
    share = sum(file['tokens'] % 256 for file in train['files']) / train['tokens']
    assert train['in_no_row']['tokens'] == manifest.unused_tokens(train['files'], 255)
    (line,) = [line for line in manifest.table(made, 255) if line.startswith('words   train')]
    assert line.endswith(f'{share:.2%}')


def test_many_names_are_shortened():
    names = [f'{i}.txt' for i in range(100)]
    assert manifest.shown(names[:3]) == '0.txt, 1.txt, 2.txt'
    assert manifest.shown(names) == '0.txt, 1.txt, 2.txt, 3.txt, 4.txt, 5.txt, ..., 99.txt (100 files)'


@pytest.mark.parametrize('columns', [('content', 'text'), ('code',)])
def test_a_tokenizer_that_finds_no_text_names_the_column(tmp_path, columns):
    (tmp_path / 'words').mkdir()
    pyarrow.parquet.write_table(pyarrow.table({name: ['x'] for name in columns}), tmp_path / 'words' / 'a.parquet')
    settings = DataConfig(sources={'words': SourceConfig(path=str(tmp_path / 'words'))}, tokenizer_pieces=300)
    with pytest.raises(errors.UsageError, match=r'a\.parquet has .*columns?.*words\.text_field'):
        prepare.prepare(settings, tmp_path / 'store')
