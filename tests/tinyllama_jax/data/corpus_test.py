"""The corpus made from Python itself: its formats, the same files each time, no text in two splits."""

import itertools
import json

import pyarrow.parquet
import pytest
import zstandard

from configs import demo
from tinyllama_jax import errors
from tinyllama_jax.data import corpus, inputs
from tinyllama_jax.tokenizer import spm


@pytest.fixture
def few_modules(monkeypatch):
    """The first 30 modules, for speed."""
    modules = list(itertools.islice(corpus._modules(), 30))
    monkeypatch.setattr(corpus, '_modules', lambda: iter(modules))
    return modules


def written(folder):
    return corpus.with_paths(demo.get_config().data.sources, folder)


def language(paths):
    lines = [line for path in paths for line in zstandard.decompress(path.read_bytes()).splitlines()]
    return [json.loads(line) for line in lines]


def test_the_corpus_has_the_published_formats(tmp_path, few_modules):
    sources = written(tmp_path)
    assert {name: source.path for name, source in sources.items()} == {
        'slimpajama': str(tmp_path / 'slimpajama'),
        'starcoder': str(tmp_path / 'starcoder'),
    }
    train = language(sorted((tmp_path / 'slimpajama').glob('train/chunk1/example_train_*.jsonl.zst')))
    validation = language([tmp_path / 'slimpajama' / 'validation' / 'chunk1' / 'example_holdout_0.jsonl.zst'])
    assert {record['meta']['redpajama_set_name'] for record in train} == {'PythonTopics', 'PythonDocstrings'}
    texts = [record['text'] for record in train + validation]
    assert len(set(texts)) == len(texts) > 90
    assert 0.01 < len(validation) / len(texts) < 0.2
    assert any('lambda' in text for text in texts)
    files = sorted((tmp_path / 'starcoder').glob('python/train-*-of-*.parquet'))
    contents = [text for path in files for text in pyarrow.parquet.read_table(path)['content'].to_pylist()]
    assert set(contents) <= set(few_modules)
    # No validation text occurs in the code.
    held_out = {record['text'] for record in validation}
    assert not any(corpus._module_docstrings(text) in held_out for text in contents)
    assert len(contents) < len(few_modules) or not any(
        corpus._module_docstrings(text) in held_out for text in few_modules
    )
    found = {name: inputs.find_inputs(name, source).splits for name, source in sources.items()}
    assert {name: list(splits) for name, splits in found.items()} == {
        'slimpajama': ['train', 'validation'],
        'starcoder': ['train'],
    }


def test_the_corpus_is_the_same_each_time(tmp_path, few_modules):
    written(tmp_path / 'one')
    written(tmp_path / 'two')
    files = [file.relative_to(tmp_path / 'one') for file in (tmp_path / 'one').rglob('*') if file.is_file()]
    assert len(files) == 7
    for file in files:
        assert (tmp_path / 'one' / file).read_bytes() == (tmp_path / 'two' / file).read_bytes()


def test_a_half_written_corpus_is_not_used(tmp_path, few_modules, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(corpus, '_write_code', lambda folder: (_ for _ in ()).throw(OSError(28, 'No space left')))
        with pytest.raises(errors.RunError, match='No space left'):
            written(tmp_path)
    assert not (tmp_path / 'starcoder').exists()
    written(tmp_path)
    assert not list(tmp_path.glob('*.part'))
    with monkeypatch.context() as patch:
        patch.setattr(corpus, '_write_corpus', lambda *_: pytest.fail('a complete corpus is used again'))
        written(tmp_path)


def test_a_source_with_a_path_keeps_it(tmp_path):
    sources = {name: corpus.SourceConfig(path='there') for name in ('a', 'b')}
    assert corpus.with_paths(sources, tmp_path / 'corpus') == sources
    assert not (tmp_path / 'corpus').exists()


def test_docstrings_of_a_module():
    source = (
        '"""Module."""\nclass A:\n  """\n  Of A.\n    Indented.\n  """\n  def f(self):\n    "Of f."\ndef g(): pass\n'
    )
    assert corpus._module_docstrings(source) == 'Module.\n\nOf A.\n  Indented.\n\nOf f.'
    assert corpus._module_docstrings('not python (') == ''


def test_the_demos_tokenizer_can_be_trained_on_the_topics(tmp_path):
    texts = [text for _, text in sorted(corpus._topics())]
    pieces = demo.get_config().data.tokenizer_pieces
    spm.train(texts, tmp_path / 'demo.model', pieces)
    tokenizer = spm.SentencePieceTokenizer(tmp_path / 'demo.model')
    assert tokenizer.vocab_size == pieces == demo.get_config().model.vocab_size
    assert tokenizer.decode(tokenizer.encode(texts[0])) == texts[0]
