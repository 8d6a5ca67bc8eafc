"""What prepare says about a tokenizer: what it loses of the corpus, whether export takes it, BOS."""

import pytest

from tests.support import corpora, json_tokenizers, tiny_export
from tests.tinyllama_jax.tokenizer import spm_test
from tinyllama_jax.data import prepare, roundtrip
from tinyllama_jax.tokenizer import loading


def _report(path, texts, *, bos=False):
    return list(roundtrip.report(path, texts, bos=bos))


def test_a_tokenizer_that_loses_nothing_and_can_be_exported():
    assert _report(corpora.tokenizer_path(), corpora.texts(5)) == [
        'the tokenizer gives back all 5 sampled documents as they were.',
        'export will give it the same ids.',
    ]


def test_what_is_lost_is_named_and_that_export_will_refuse(tmp_path):
    options = {'remove_extra_whitespaces': True, 'normalization_rule_name': 'nmt_nfkc'}
    path = spm_test.train_variant(tmp_path / 'lossy.model', **options)
    lost, refusal = _report(path, ['a\n\n\tb  \ufb01', 'plain'])
    assert 'changes 1 of 2 sampled documents' in lost
    assert 'newlines (2)' in lost and 'tabs (1)' in lost and "'\ufb01' (1)" in lost
    assert refusal.startswith('export will refuse this tokenizer') and 'normalises text' in refusal


def test_a_merged_vocabulary_is_compared_with_what_export_would_write(tmp_path):
    path = tiny_export.write_merged_tokenizer(tmp_path / 'merged.model')
    assert 'transformers would give other ids' in _report(path, [])[-1]


@pytest.mark.parametrize(('kind', 'adds'), [('llama3', True), ('qwen2', False)])
def test_bos_of_documents_is_compared_with_the_tokenizer_s(tmp_path, kind, adds):
    folder = json_tokenizers.write(tmp_path / kind, kind, [tiny_export.text()], pieces=400)
    assert len(_report(folder, ['a\nb'], bos=adds)) == 2
    if kind == 'llama3':
        assert '--config.data.bos=True' in _report(folder, ['a'], bos=False)[-1]


def test_prepare_says_it_and_keeps_a_tokenizer_json_whole(tmp_path, capsys):
    folder = json_tokenizers.write(tmp_path / 'wordpiece', 'wordpiece', corpora.texts(50))
    config = corpora.config(tmp_path, tokenizer=str(folder / 'tokenizer.json'))
    manifest = prepare.prepare(config, tmp_path / 'store')
    said = capsys.readouterr().out
    assert 'prepare: the tokenizer changes' in said and 'newlines' in said
    kept = loading.load(tmp_path / 'store' / 'tokenizer')
    assert (manifest['tokenizer_sha256'], manifest['vocab_size']) == (kept.sha256, kept.vocab_size)
    assert (kept.folder / 'tokenizer_config.json').read_bytes() == (folder / 'tokenizer_config.json').read_bytes()
    prepare.prepare(config, tmp_path / 'store')
    assert 'is complete' in capsys.readouterr().out
