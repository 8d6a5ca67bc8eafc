import dataclasses
import filecmp
import gzip
import io
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pyarrow.parquet
import pytest
import sentencepiece
import zstandard

from tests import corpora
from tinyllama_jax import errors
from tinyllama_jax.config import DataConfig, SourceConfig
from tinyllama_jax.data import prepare, readers, store

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
    """(config, store, manifest) of both small corpora, by one worker."""
    root = tmp_path_factory.mktemp('prepared')
    config = corpora.config(root)
    return config, root / 'store', prepare.prepare(config, root / 'store')


def one_source(path, **changes) -> DataConfig:
    fields = {field: changes.pop(field) for field in ('format', 'text_field') if field in changes}
    sources = {'words': SourceConfig(path=str(path), **fields)}
    return DataConfig(**{'sources': sources, 'tokenizer': str(corpora.tokenizer_path()), 'workers': 1, **changes})


def assert_same_files(left: pathlib.Path, right: pathlib.Path) -> None:
    names = [sorted(str(f.relative_to(root)) for f in root.rglob('*') if f.is_file()) for root in (left, right)]
    assert names[0] == names[1]
    assert len(names[0]) > 5
    assert filecmp.cmpfiles(left, right, names[0], shallow=False)[0] == names[0]


def plain_records(path: pathlib.Path):
    """(text, set name) of each record, read without the code under test."""
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
    config = dataclasses.replace(one_source(''), sources=sources)
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


def test_every_document_is_there_with_its_record_and_one_eos(prepared):
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
def test_the_policy_of_special_tokens(tmp_path, prepared, bos, eos):
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
    assert_same_files(path, tmp_path / 'store')


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
    assert_same_files(path, tmp_path / 'store')


def test_a_tokenizer_is_trained_and_kept(tmp_path):
    config = corpora.config(tmp_path, tokenizer=None, tokenizer_pieces=300, workers=2)
    manifest = prepare.prepare(config, tmp_path / 'store')
    assert manifest['vocab_size'] == 300
    prepare.prepare(dataclasses.replace(config, workers=1), tmp_path / 'again')
    assert_same_files(tmp_path / 'store', tmp_path / 'again')
    with pytest.raises(errors.UsageError, match=r'--config\.data\.tokenizer=FILE'):
        prepare.prepare(dataclasses.replace(config, tokenizer_pieces=None), tmp_path / 'none')
    assert not (tmp_path / 'none').exists()


# --- faults ---


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
def test_bad_files(tmp_path, fault):
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
        prepare.prepare(one_source(root), path)
    assert e.value.exit_code == 2
    assert not (path / store.MANIFEST).exists()
    with pytest.raises(errors.UsageError, match='1 of 3 files'):
        prepare.prepare(one_source(root, max_bad_share=0.3, workers=1 + (fault == 'not zst')), path)

    manifest = prepare.prepare(one_source(root, max_bad_share=0.34), path)
    source, whole = manifest['sources']['words'], prepare.prepare(one_source(good), tmp_path / 'good store')
    assert source['bad'] == {'files': 1, 'records': 0}
    assert (source['documents'], source['tokens']) == (10, whole['sources']['words']['tokens'])
    (listed,) = source['faults']
    assert (listed['file'], listed['record']) == (bad, None)
    assert reason in listed['reason']
    entries = source['splits']['train']['files']
    assert [entry['tokens'] > 0 for entry in entries] == [entry['name'] != bad for entry in entries]
    # Nothing of the bad file is in the arrays, and prepare is content with what is there.
    assert len(list((path / 'tokens').rglob('c/*'))) == 2
    assert prepare.prepare(one_source(root, max_bad_share=0.34), path) == manifest


def test_a_mended_file_is_read_again(tmp_path):
    root, path = tmp_path / 'words', tmp_path / 'store'
    for i in range(3):
        corpora.write_zst(root / f'{i}.jsonl.zst', [corpora.record(text) for text in corpora.texts(5, seed=i)])
    good = (root / '1.jsonl.zst').read_bytes()
    (root / '1.jsonl.zst').write_bytes(good[:-9])
    with pytest.raises(errors.UsageError, match=r'1\.jsonl\.zst is a bad file'):
        prepare.prepare(one_source(root), path)
    (root / '1.jsonl.zst').write_bytes(good)
    assert prepare.prepare(one_source(root), path)['sources']['words']['bad'] == {'files': 0, 'records': 0}
    prepare.prepare(one_source(root), tmp_path / 'fresh')
    assert_same_files(path, tmp_path / 'fresh')


def test_bad_records_are_counted_and_listed(tmp_path):
    faults = {
        1: (b'{"text": "cut', 'is not JSON'),
        2: (b'[1, 2]', 'is no JSON object'),
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
    source = prepare.prepare(one_source(tmp_path / 'words'), tmp_path / 'store')['sources']['words']
    assert (source['documents'], source['dropped'], source['bad']) == (3, 1, {'files': 0, 'records': len(faults)})
    assert {fault['record']: fault['file'] for fault in source['faults']} == dict.fromkeys(faults, 'a.jsonl.zst')
    for listed in source['faults']:
        assert faults[listed['record']][1] in listed['reason']
    numbers = store.TokenStore(tmp_path / 'store').documents('words', 'train', 0)[1]
    assert numbers.tolist() == [0, 10, 11]


def test_the_list_of_bad_records_is_capped(tmp_path):
    for i in range(8):
        corpora.write_zst(tmp_path / 'words' / f'{i}.jsonl.zst', [corpora.record('good'), *[b'bad'] * 50])
    source = prepare.prepare(one_source(tmp_path / 'words'), tmp_path / 'store')['sources']['words']
    assert source['bad'] == {'files': 0, 'records': 400}
    assert len(source['faults']) == 100


def test_bad_parquet_records(tmp_path):
    corpora.write_parquet(tmp_path / 'words' / 'a.parquet', ['good', None, ''])
    source = prepare.prepare(one_source(tmp_path / 'words'), tmp_path / 'store')['sources']['words']
    assert (source['documents'], source['dropped'], source['bad']['records']) == (1, 1, 1)


def test_awkward_documents_go_through(tmp_path):
    long = 'a long line ' * 900_000  # 10.8 MB
    texts = ['a\0b', '\ud800', '😀' * 100, ' ', '\n', long]
    (tmp_path / 'words').mkdir()
    (tmp_path / 'words' / 'a.jsonl').write_bytes(corpora.jsonl([{'text': text} for text in texts]).rstrip(b'\n'))
    manifest = prepare.prepare(one_source(tmp_path / 'words'), tmp_path / 'store')
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
    source = prepare.prepare(one_source(root), tmp_path / 'store')['sources']['words']
    assert (source['documents'], source['dropped'], source['bad']) == (8, 1, {'files': 0, 'records': 1})
    assert 'logo.png' in source['faults'][0]['reason']
    assert len(source['splits']['train']['files']) > 1
    tokens = store.TokenStore(tmp_path / 'store')
    model = sentencepiece.SentencePieceProcessor(model_file=str(corpora.tokenizer_path()))
    found = [
        model.decode(document.tolist())
        for i in range(len(source['splits']['train']['files']))
        for document in np.split(tokens.read_stream('words', 'train', i), tokens.documents('words', 'train', i)[0][1:])
    ]
    assert sorted(found) == sorted([*texts, 'caf\ufffd', 'a\0b'])


def test_the_splits_of_a_folder(tmp_path):
    def names(found):
        return {split: [name for entry in inputs for name in entry.names] for split, inputs in found.items()}

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


def test_missing_and_empty_sources(tmp_path):
    flag = r'--config\.data\.sources\.words'
    with pytest.raises(errors.UsageError, match='sources is empty'):
        prepare.prepare(DataConfig(tokenizer=str(corpora.tokenizer_path())), tmp_path / 'store')
    with pytest.raises(errors.UsageError, match=rf'no path; give {flag}\.path=DIR'):
        prepare.prepare(dataclasses.replace(one_source('x'), sources={'words': SourceConfig()}), tmp_path / 'store')
    with pytest.raises(errors.UsageError, match=rf'{flag}\.path=.*neither a folder nor a file'):
        prepare.prepare(one_source(tmp_path / 'absent'), tmp_path / 'store')
    (tmp_path / 'empty' / 'train').mkdir(parents=True)
    with pytest.raises(errors.UsageError, match=rf'{flag}\.path=.* has no files'):
        prepare.prepare(one_source(tmp_path / 'empty'), tmp_path / 'store')
    (tmp_path / 'empty' / 'train' / 'a.txt').write_text('text')
    with pytest.raises(errors.UsageError, match=rf'{flag}\.path=.* has no files \(\.parquet\)'):
        prepare.prepare(one_source(tmp_path / 'empty', format='parquet'), tmp_path / 'store')
    corpora.write_zst(tmp_path / 'dropped' / 'a.jsonl.zst', [corpora.record('code', 'RedPajamaGithub')])
    with pytest.raises(errors.UsageError, match='no document to train on'):
        prepare.prepare(one_source(tmp_path / 'dropped'), tmp_path / 'store')
    assert not (tmp_path / 'store' / store.MANIFEST).exists()


def test_a_folder_with_other_files_is_not_touched(tmp_path):
    root = corpora.starcoder(tmp_path / 'star')
    (tmp_path / 'home').mkdir()
    (tmp_path / 'home' / 'thesis.tex').write_text('years of work')
    with pytest.raises(errors.UsageError, match='holds other files'):
        prepare.prepare(one_source(root), tmp_path / 'home')
    assert [file.name for file in (tmp_path / 'home').iterdir()] == ['thesis.tex']


def test_other_settings_start_an_unfinished_store_over(tmp_path):
    root = corpora.starcoder(tmp_path / 'star')
    corpora.write_parquet(root / 'zz' / 'bad.parquet', ['x'], 'other')
    with pytest.raises(errors.UsageError, match='bad file'):
        prepare.prepare(one_source(root), tmp_path / 'store')
    shutil.rmtree(root / 'zz')
    prepare.prepare(one_source(root, bos=True), tmp_path / 'store')
    prepare.prepare(one_source(root, bos=True), tmp_path / 'fresh')
    assert_same_files(tmp_path / 'store', tmp_path / 'fresh')


# --- processes ---


def command(config: DataConfig, path, workers: int) -> list[str]:
    sources = ['--config.data.sources.slimpajama=none', '--config.data.sources.starcoder=none']
    sources += [f'--config.data.sources.{name}.path={source.path}' for name, source in config.sources.items()]
    flags = [*sources, f'--config.data.tokenizer={config.tokenizer}', f'--config.data.workers={workers}']
    flags += [f'--config.data.store={path}', f'--workdir={path.parent}', '--config.data.python_corpus=false']
    return [sys.executable, 'main.py', 'prepare', '--config=configs/demo.py', *flags]


def start(arguments, **options):
    return subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_sigkill_and_go_on_gives_the_same_bytes(tmp_path):
    corpora.slimpajama(tmp_path / 'slim', files=10, documents=60)
    corpora.starcoder(tmp_path / 'star', files=4, documents=60)
    config = corpora.config(tmp_path)
    prepare.prepare(config, tmp_path / 'whole')
    for wanted in (1, 4, 8):
        process = start(command(config, tmp_path / 'store', 2))
        while len(list((tmp_path / 'store').glob('.progress/results/*.json'))) < wanted:
            assert process.poll() is None, process.communicate()
            time.sleep(0.005)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL  # it was still at work
        assert not (tmp_path / 'store' / store.MANIFEST).exists()
    prepare.prepare(config, tmp_path / 'store')
    assert_same_files(tmp_path / 'whole', tmp_path / 'store')


def _stuck_prepare(tmp_path):
    """A prepare of two workers of which one waits for ever for its input, a named pipe; with all its processes."""
    root = corpora.starcoder(tmp_path / 'words', files=3)
    os.mkfifo(root / 'stuck.jsonl')
    process = start(command(one_source(root), tmp_path / 'store', 2))
    deadline = time.monotonic() + 60
    while len(list((tmp_path / 'store').glob('.progress/datatrove/completions/*'))) < 3:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process, psutil.Process(process.pid).children(recursive=True)


def test_a_killed_worker_ends_prepare_with_one_line(tmp_path):
    process, children = _stuck_prepare(tmp_path)
    workers = [child for child in children if len(child.open_files()) or child.num_threads() > 1]
    assert workers
    for worker in workers:
        worker.kill()
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 1
    assert 'was killed' in stderr
    assert len(stderr.strip().splitlines()) == 1
    assert not (tmp_path / 'store' / store.MANIFEST).exists()


@pytest.mark.parametrize('end', [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_prepare(tmp_path, end):
    process, children = _stuck_prepare(tmp_path)
    assert len(children) >= 2
    process.send_signal(end)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == (130 if end == signal.SIGINT else -end), stderr
    assert 'Traceback' not in stderr
    assert not psutil.wait_procs(children, timeout=10)[1]


def test_a_full_disk_ends_prepare_and_the_rest_is_done_later(tmp_path):
    root = corpora.write_zst(tmp_path / 'words' / 'a.jsonl.zst', [corpora.record(t) for t in corpora.texts(400)]).parent
    corpora.write_zst(root / 'b.jsonl.zst', [corpora.record('small')])
    size = 64 << 10  # bytes; the stand-in for a full disk is a limit on the size of a file

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    process = start(command(one_source(root), tmp_path / 'store', 2), preexec_fn=limit)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1, stderr
    assert f'The store {tmp_path / "store"} cannot be written' in stderr
    assert len(stderr.strip().splitlines()) == 1
    assert not (tmp_path / 'store' / store.MANIFEST).exists()
    prepare.prepare(one_source(root), tmp_path / 'store')
    prepare.prepare(one_source(root), tmp_path / 'fresh')
    assert_same_files(tmp_path / 'store', tmp_path / 'fresh')


# --- the larger real corpora ---


def test_real_corpora_equal_a_plain_count_for_one_and_two_workers(tmp_path, test_data_dir):
    tokenizer = test_data_dir / 'tokenizer' / 'tokenizer.model'
    names = ('slimpajama', 'starcoderdata')
    sources = {name: SourceConfig(path=str(test_data_dir / name)) for name in names}
    config = DataConfig(sources=sources, tokenizer=str(tokenizer), workers=2)
    manifest = prepare.prepare(config, tmp_path / 'two')
    prepare.prepare(dataclasses.replace(config, workers=1), tmp_path / 'one')
    assert_same_files(tmp_path / 'one', tmp_path / 'two')
    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    for name, split, pattern in [
        ('slimpajama', 'train', 'train/**/*.zst'),
        ('slimpajama', 'validation', 'validation/**/*.zst'),
        ('starcoderdata', 'train', '*/*.parquet'),
    ]:
        _assert_counts(manifest, name, sorted((test_data_dir / name).glob(pattern)), split, model)
    assert manifest['sources']['slimpajama']['dropped'] > 0
