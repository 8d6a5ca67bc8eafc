"""What both kinds of tokenizers share: documents, and texts that are not UTF-8."""

import pytest

from tests.support import corpora, json_tokenizers, tiny_export
from tinyllama_jax import errors
from tinyllama_jax.tokenizer import base, loading


@pytest.fixture(scope='module', params=['sentencepiece', 'llama3'])
def tokenizer(request, tmp_path_factory):
    if request.param == 'sentencepiece':
        return loading.load(corpora.tokenizer_path())
    folder = tmp_path_factory.mktemp('base') / 'llama3'
    return loading.load(json_tokenizers.write(folder, 'llama3', [tiny_export.text()]))


def test_a_document_is_its_ids_between_bos_and_eos(tokenizer):
    ids = tokenizer.encode('the end')
    document = tokenizer.encode_document('the end', bos=True, eos_per_document=2)
    assert document.tolist() == [tokenizer.bos_id, *ids, tokenizer.eos_id, tokenizer.eos_id]
    assert document.dtype == tokenizer.dtype == 'uint16'
    assert tokenizer.decode([*document, tokenizer.vocab_size, 10**6]) == 'the end'
    assert tokenizer.stop_ids == (tokenizer.eos_id,)


def test_surrogates_are_joined_or_replaced(tokenizer):
    assert base.without_surrogates('a\ud83d\ude00b\ud800') == 'a\U0001f600b\ufffd'
    assert tokenizer.encode('\ud83d\ude00') == tokenizer.encode('\U0001f600')
    assert tokenizer.encode('a\ud800b') == tokenizer.encode('a\ufffdb')


def test_without_eos_a_document_that_wants_one_is_refused(tmp_path):
    folder = json_tokenizers.write(tmp_path / 'bare', 'llama3', [tiny_export.text()], pieces=300)
    (folder / 'tokenizer_config.json').unlink()
    bare = loading.load(folder / 'tokenizer.json')
    assert len(bare.encode_document('a', bos=False, eos_per_document=0))
    with pytest.raises(errors.UsageError, match='no EOS piece; set config.data.bos=false and'):
        bare.encode_document('a', bos=False, eos_per_document=1)
