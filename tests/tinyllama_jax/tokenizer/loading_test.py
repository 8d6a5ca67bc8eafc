"""Which tokenizer a path stands for, and which one a run or a store keeps."""

import json

import pytest

from tests.support import json_tokenizers, tiny_export
from tests.tinyllama_jax.tokenizer import spm_test
from tinyllama_jax import errors
from tinyllama_jax.tokenizer import json_file, loading, spm


def test_a_tokenizer_json_counts_before_a_model_beside_it(tmp_path):
    folder = json_tokenizers.write(tmp_path / 'both', 'qwen2', [tiny_export.text()], pieces=400)
    model = tiny_export.write_tokenizer(folder / 'tokenizer.model')
    for path in (folder, folder / 'tokenizer.json'):
        assert isinstance(loading.load(path), json_file.JsonTokenizer)
    assert isinstance(loading.load(model), spm.SentencePieceTokenizer)
    (folder / 'tokenizer.json').unlink()
    (folder / 'tokenizer_config.json').unlink()
    assert loading.load(folder).encode('the end') == loading.load(model).encode('the end')


def test_a_model_that_is_not_bpe_gives_sentencepiece_s_ids(tmp_path):
    spm_test.train_variant(tmp_path / 'tokenizer.model', model_type='unigram')
    (tmp_path / 'generation_config.json').write_text('{"eos_token_id": [2, 7]}')
    tokenizer = loading.load(tmp_path)
    assert isinstance(tokenizer, spm.SentencePieceTokenizer)
    assert tokenizer.stop_ids == (2, 7)
    plain = tokenizer.encode('a', special=True)
    json_tokenizers.edit(tmp_path / 'tokenizer_config.json', add_bos_token=True)
    assert loading.load(tmp_path).encode('a', special=True) == [1, *plain]
    json_tokenizers.edit(tmp_path / 'added_tokens.json', **{'<s>': 1, '[PAD]': tokenizer.vocab_size})
    with pytest.raises(errors.UsageError, match=r"tokenizer.model is not BPE, so '\[PAD\]' cannot be added"):
        loading.load(tmp_path)


@pytest.mark.parametrize(
    ('values', 'adds'),
    [
        (None, False),
        ({}, False),
        ({'add_bos_token': True}, True),
        ({'tokenizer_class': 'LlamaTokenizer'}, False),  # transformers 4 adds it, 5 does not
        ({'tokenizer_class': 'LlamaTokenizerFast', 'add_bos_token': False}, False),
        ({'tokenizer_class': 'GPT2Tokenizer'}, False),
    ],
)
def test_whether_bos_comes_first_without_a_tokenizer_json(tmp_path, values, adds):
    tiny_export.write_tokenizer(tmp_path / 'tokenizer.model')
    if values is not None:
        (tmp_path / 'tokenizer_config.json').write_text(json.dumps(values))
    assert loading.load(tmp_path).encode('', special=True) == [1] * adds


def test_a_tokenizer_is_kept_as_its_kind_needs(tmp_path):
    model = tiny_export.write_tokenizer(tmp_path / 'my.model')
    (tmp_path / 'a').mkdir()
    loading.keep(model, tmp_path / 'a')
    assert loading.kept(tmp_path / 'a') == tmp_path / 'a' / 'tokenizer.model'
    assert loading.kept(tmp_path / 'a').read_bytes() == model.read_bytes()
    folder = json_tokenizers.write(tmp_path / 'qwen2', 'qwen2', [tiny_export.text()], pieces=400)
    loading.keep(folder, tmp_path / 'a')
    assert loading.kept(tmp_path / 'a') == tmp_path / 'a' / 'tokenizer'
    assert loading.load(loading.kept(tmp_path / 'a')).sha256 == loading.load(folder).sha256


def test_nothing_that_can_be_opened_is_refused_by_its_path(tmp_path):
    assert not loading.kept(tmp_path).exists()
    with pytest.raises(errors.UsageError, match='holds neither tokenizer.model nor tokenizer.json'):
        loading.load(tmp_path)
    with pytest.raises(errors.UsageError, match='absent.model cannot be read'):
        loading.load(tmp_path / 'absent.model')
