"""Prepared stores against a plain reading of the corpora: counts, documents, workers, refusals."""

import dataclasses
import io
import json
import pathlib
import shutil

import numpy as np
import pyarrow.parquet
import pytest
import sentencepiece
import zstandard

from tests.support import corpora
from tinyllama_jax import errors
from tinyllama_jax.config import DataConfig, SourceConfig
from tinyllama_jax.data import prepare, store


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
    """(config, store, manifest) of both small corpora, by one worker."""
    root = tmp_path_factory.mktemp('prepared')
    config = corpora.config(root)
    return config, root / 'store', prepare.prepare(config, root / 'store')


def plain_records(path: pathlib.Path):
    """Returns (text, set name) of each record, read without the code under test."""
    if path.suffix == '.parquet':
        return [(text, None) for text in pyarrow.parquet.read_table(path)['content'].to_pylist()]
    with open(path, 'rb') as file:
        lines = io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(file), encoding='utf-8')
        records = [json.loads(line) for line in lines]
    return [(record['text'], record['meta']['redpajama_set_name']) for record in records]


def assert_counts(manifest, name, root, pattern, split='train') -> int:
    """Compares a split of the manifest with a plain count; returns its tokens."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(corpora.tokenizer_path()))
    return _assert_counts(manifest, name, sorted(root.glob(pattern)), split, model)


def _assert_counts(manifest, name, paths, split, model) -> int:
    entry = manifest['sources'][name]['splits'][split]
    assert [file['name'] for file in entry['files']] == [path.as_posix().split(f'{name}/')[-1] for path in paths] != []
    records = [record for path in paths for record in plain_records(path)]
    kept = [text for text, set_name in records if text and set_name != 'RedPajamaGithub']
    assert entry['documents'] == len(kept)
    assert entry['dropped'] == len(records) - len(kept)
    assert entry['tokens'] == sum(len(ids) + 1 for ids in model.encode(kept))
    return entry['tokens']


def test_counts_and_documents_equal_a_plain_reading(tmp_path):
    root = tmp_path / 'corpora'
    corpora.slimpajama(root / 'slimpajama')
    corpora.starcoder(root / 'starcoder')
    sources = {name: SourceConfig(path=str(root / name)) for name in ('slimpajama', 'starcoder')}
    config = dataclasses.replace(corpora.one_source(''), sources=sources)
    manifest = prepare.prepare(config, tmp_path / 'store')
    assert json.loads((tmp_path / 'store' / store.MANIFEST).read_text()) == manifest
    assert_counts(manifest, 'slimpajama', root / 'slimpajama', 'train/**/*.zst')
    assert_counts(manifest, 'slimpajama', root / 'slimpajama', 'validation/**/*.zst', 'validation')
    assert_counts(manifest, 'starcoder', root / 'starcoder', '*/*.parquet')
    for name, source in manifest['sources'].items():
        train = source['splits']['train']
        assert {key: source[key] for key in ('documents', 'dropped', 'tokens', 'bad')} == {
            key: train[key] for key in ('documents', 'dropped', 'tokens', 'bad')
        }, name
    assert manifest['sources']['slimpajama']['dropped'] == 6
    assert set(manifest['sources']['slimpajama']['splits']) == {'train', 'validation'}  # test/ is never read


def test_every_document_has_its_record_and_one_eos(prepared):
    config, path, manifest = prepared
    tokens = store.TokenStore(path)
    model = sentencepiece.SentencePieceProcessor(model_file=str(tokens.tokenizer_path))
    for name, source in config.sources.items():
        for split, entry in manifest['sources'][name]['splits'].items():
            for i, file in enumerate(entry['files']):
                records = plain_records(pathlib.Path(source.path, file['name']))
                stream, (starts, numbers) = tokens.read_stream(name, split, i), tokens.documents(name, split, i)
                assert np.sum(stream == model.eos_id()) == len(starts) == file['documents'] > 0
                for number, document in zip(numbers, np.split(stream, starts[1:]), strict=True):
                    assert model.decode(document.tolist()) == records[number][0]


@pytest.mark.parametrize(('bos', 'eos'), [(True, 0), (True, 3)])
def test_documents_get_the_configured_special_tokens(tmp_path, prepared, bos, eos):
    config, _, base = prepared
    manifest = prepare.prepare(dataclasses.replace(config, bos=bos, eos_per_document=eos), tmp_path / 'store')
    source, plain = manifest['sources']['starcoder'], base['sources']['starcoder']
    assert source['tokens'] == plain['tokens'] + plain['documents'] * (bos + eos - 1)
    stream = store.TokenStore(tmp_path / 'store').read_stream('starcoder', 'train', 0)
    documents = source['splits']['train']['files'][0]['documents']
    assert [np.sum(stream == 1), np.sum(stream == 2)] == [bos * documents, eos * documents]


def test_two_workers_write_the_same_bytes(tmp_path, prepared):
    config, path, _ = prepared
    prepare.prepare(dataclasses.replace(config, workers=2), tmp_path / 'store')
    corpora.assert_same_files(path, tmp_path / 'store')


def test_a_complete_store_is_left_as_it_is(prepared, capsys):
    config, path, manifest = prepared
    before = (path / store.MANIFEST).stat().st_mtime_ns
    assert prepare.prepare(dataclasses.replace(config, workers=2, shuffle='rows'), path) == manifest
    assert 'is complete' in capsys.readouterr().out
    assert (path / store.MANIFEST).stat().st_mtime_ns == before


@pytest.mark.parametrize('change', ['bos', 'tokenizer', 'sources', 'drop_sets', 'size'])
def test_other_settings_are_refused(tmp_path, prepared, change):
    config, path, _ = prepared
    shutil.copytree(path, tmp_path / 'store')
    sources = dict(config.sources)
    if change == 'sources':
        del sources['starcoder']
    elif change == 'drop_sets':
        sources['slimpajama'] = dataclasses.replace(sources['slimpajama'], drop_sets=())
    elif change == 'size':
        shutil.copytree(config.sources['slimpajama'].path, tmp_path / 'slim')
        corpora.write_zst(tmp_path / 'slim/train/chunk1/example_train_0.jsonl.zst', [corpora.record('other')])
        sources['slimpajama'] = SourceConfig(path=str(tmp_path / 'slim'))
    changes = {'sources': sources, 'bos': change == 'bos'}
    if change == 'tokenizer':
        changes |= {'tokenizer': None, 'tokenizer_pieces': 300}
    with pytest.raises(errors.UsageError, match=rf'differing: .*{change}.*--config\.data\.store'):
        prepare.prepare(dataclasses.replace(config, **changes), tmp_path / 'store')
    corpora.assert_same_files(path, tmp_path / 'store')


def test_a_tokenizer_is_trained_and_kept(tmp_path):
    config = corpora.config(tmp_path, tokenizer=None, tokenizer_pieces=300, workers=2)
    manifest = prepare.prepare(config, tmp_path / 'store')
    assert manifest['vocab_size'] == 300
    prepare.prepare(dataclasses.replace(config, workers=1), tmp_path / 'again')
    corpora.assert_same_files(tmp_path / 'store', tmp_path / 'again')
    with pytest.raises(errors.UsageError, match=r'--config\.data\.tokenizer=FILE'):
        prepare.prepare(dataclasses.replace(config, tokenizer_pieces=None), tmp_path / 'none')
    assert not (tmp_path / 'none').exists()


def test_a_repaired_file_is_read_again(tmp_path):
    root, path = tmp_path / 'words', tmp_path / 'store'
    for i in range(3):
        corpora.write_zst(root / f'{i}.jsonl.zst', [corpora.record(text) for text in corpora.texts(5, seed=i)])
    good = (root / '1.jsonl.zst').read_bytes()
    (root / '1.jsonl.zst').write_bytes(good[:-9])
    with pytest.raises(errors.UsageError, match=r'1\.jsonl\.zst is a bad file'):
        prepare.prepare(corpora.one_source(root), path)
    (root / '1.jsonl.zst').write_bytes(good)
    assert prepare.prepare(corpora.one_source(root), path)['sources']['words']['bad'] == {'files': 0, 'records': 0}
    prepare.prepare(corpora.one_source(root), tmp_path / 'fresh')
    corpora.assert_same_files(path, tmp_path / 'fresh')


def test_missing_and_empty_sources_are_refused(tmp_path):
    flag = r'--config\.data\.sources\.words'
    with pytest.raises(errors.UsageError, match='sources is empty'):
        prepare.prepare(DataConfig(tokenizer=str(corpora.tokenizer_path())), tmp_path / 'store')
    with pytest.raises(errors.UsageError, match=rf'no path; give {flag}\.path=DIR'):
        prepare.prepare(
            dataclasses.replace(corpora.one_source('x'), sources={'words': SourceConfig()}), tmp_path / 'store'
        )
    with pytest.raises(errors.UsageError, match=rf'{flag}\.path=.*neither a folder nor a file'):
        prepare.prepare(corpora.one_source(tmp_path / 'absent'), tmp_path / 'store')
    (tmp_path / 'empty' / 'train').mkdir(parents=True)
    with pytest.raises(errors.UsageError, match=rf'{flag}\.path=.* has no files'):
        prepare.prepare(corpora.one_source(tmp_path / 'empty'), tmp_path / 'store')
    (tmp_path / 'empty' / 'train' / 'a.txt').write_text('text')
    with pytest.raises(errors.UsageError, match=rf'{flag}\.path=.* has no files \(\.parquet\)'):
        prepare.prepare(corpora.one_source(tmp_path / 'empty', format='parquet'), tmp_path / 'store')
    corpora.write_zst(tmp_path / 'dropped' / 'a.jsonl.zst', [corpora.record('code', 'RedPajamaGithub')])
    with pytest.raises(errors.UsageError, match='no document to train on'):
        prepare.prepare(corpora.one_source(tmp_path / 'dropped'), tmp_path / 'store')
    assert not (tmp_path / 'store' / store.MANIFEST).exists()


def test_a_folder_with_other_files_is_not_touched(tmp_path):
    root = corpora.starcoder(tmp_path / 'star')
    (tmp_path / 'home').mkdir()
    (tmp_path / 'home' / 'thesis.tex').write_text('years of work')
    with pytest.raises(errors.UsageError, match='holds other files'):
        prepare.prepare(corpora.one_source(root), tmp_path / 'home')
    assert [file.name for file in (tmp_path / 'home').iterdir()] == ['thesis.tex']


def test_other_settings_replace_an_unfinished_store(tmp_path):
    root = corpora.starcoder(tmp_path / 'star')
    corpora.write_parquet(root / 'zz' / 'bad.parquet', ['x'], 'other')
    with pytest.raises(errors.UsageError, match='bad file'):
        prepare.prepare(corpora.one_source(root), tmp_path / 'store')
    shutil.rmtree(root / 'zz')
    (tmp_path / 'store' / 'tokenizer.model.tmp').write_bytes(b'half a model')  # left by a killed run
    prepare.prepare(corpora.one_source(root, bos=True), tmp_path / 'store')
    prepare.prepare(corpora.one_source(root, bos=True), tmp_path / 'fresh')
    corpora.assert_same_files(tmp_path / 'store', tmp_path / 'fresh')


# --- the larger real corpora ---


def test_real_corpora_equal_a_plain_count_for_one_and_two_workers(tmp_path, test_data_dir):
    tokenizer = test_data_dir / 'tokenizer' / 'tokenizer.model'
    names = ('slimpajama', 'starcoderdata')
    sources = {name: SourceConfig(path=str(test_data_dir / name)) for name in names}
    config = DataConfig(sources=sources, tokenizer=str(tokenizer), workers=2)
    manifest = prepare.prepare(config, tmp_path / 'two')
    prepare.prepare(dataclasses.replace(config, workers=1), tmp_path / 'one')
    corpora.assert_same_files(tmp_path / 'one', tmp_path / 'two')
    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    for name, split, pattern in [
        ('slimpajama', 'train', 'train/**/*.zst'),
        ('slimpajama', 'validation', 'validation/**/*.zst'),
        ('starcoderdata', 'train', '*/*.parquet'),
    ]:
        _assert_counts(manifest, name, sorted((test_data_dir / name).glob(pattern)), split, model)
    assert manifest['sources']['slimpajama']['dropped'] > 0
