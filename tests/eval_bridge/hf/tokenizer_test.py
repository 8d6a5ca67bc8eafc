"""Tokenizers of Hugging Face folders: SentencePiece's ids from a tokenizer.json, what export and import keep."""

import dataclasses
import json
import shutil

import hypothesis
import numpy as np
import pytest
import sentencepiece
from hypothesis import strategies

from eval_bridge.hf import convert
from eval_bridge.hf import tokenizer as hf_tokenizer
from tests.support import json_tokenizers, tiny_export
from tinyllama_jax import errors
from tinyllama_jax.tokenizer import loading, spm

MODEL = tiny_export.MODEL
SPECIAL = ('<s>', '</s>', '<unk>')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tiny_export.write_export(tmp_path_factory.mktemp('hf_tokenizer'))


@pytest.fixture
def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / 'copy')


HARD_TEXTS = [
    '', ' ', '   ', 'a', ' a', 'a ', 'Hello  world\n\n\tx', '\u2581', 'a\u2581b', '你好 🙂 e\u0301', '\x00\x7f\r\n',
    '1234567890', '<0x0A>', 'def f(x):\n        return x', *(f'{" " * count}x{" " * count}' for count in range(1, 70)),
]  # fmt: skip


def _tokenizers(folder):
    return spm.SentencePieceTokenizer(folder / 'tokenizer.model'), loading.load(folder)


def test_tokenizer_json_gives_sentencepiece_s_ids(copied):
    ours, theirs = _tokenizers(copied)
    assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (theirs.bos_id, theirs.eos_id, theirs.vocab_size)
    for text in [*HARD_TEXTS, tiny_export.text()]:
        assert ours.encode(text) == theirs.encode(text), text
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))

    @hypothesis.settings(max_examples=200, deadline=None, database=None, derandomize=True)
    @hypothesis.given(strategies.text(strategies.characters(exclude_categories=['Cs'])))
    def check(text):
        hypothesis.assume(not any(token in text for token in SPECIAL))
        assert ours.encode(text) == theirs.encode(text)

    check()


def test_llama_s_tokenizer_json_gives_sentencepiece_s_ids(tmp_path, test_data_dir):
    config = dataclasses.replace(MODEL, vocab_size=32_000)
    params, output = dict(tiny_export.params()), tmp_path / 'export'
    params |= {
        'embed': np.zeros((32_000, MODEL.embed_dim), np.float32),
        'lm_head': np.zeros((MODEL.embed_dim, 32_000), np.float32),
    }
    convert.export(params, config, test_data_dir / 'tokenizer' / 'tokenizer.model', output)
    ours, theirs = _tokenizers(output)
    for text in [*HARD_TEXTS, tiny_export.text()]:
        assert ours.encode(text) == theirs.encode(text), text


@pytest.mark.parametrize('add_bos', [False, True])
def test_auto_tokenizer_gives_our_ids(tmp_path, add_bos):
    transformers = pytest.importorskip('transformers')
    folder = tiny_export.write_export(tmp_path, add_bos=add_bos)
    ours, theirs = _tokenizers(folder)[0], transformers.AutoTokenizer.from_pretrained(folder)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
    assert len(theirs) == ours.vocab_size
    for text in HARD_TEXTS:
        ids = ours.encode(text)
        assert theirs.encode(text, add_special_tokens=False) == ids
        assert theirs(text)['input_ids'] == [ours.bos_id] * add_bos + ids
        assert theirs.decode(ids) == ours.decode(ids)


@pytest.mark.parametrize(
    ('options', 'reason'),
    [({'model_type': 'unigram'}, 'is not BPE'), ({'byte_fallback': False}, 'byte fallback'),
     ({'normalization_rule_name': 'nmt_nfkc'}, 'normalises'), ({'user_defined_symbols': ['@']}, 'user-defined')],
)  # fmt: skip
def test_other_kinds_of_tokenizers_are_refused(tmp_path, options, reason):
    settings = {'model_type': 'bpe', 'byte_fallback': True, 'normalization_rule_name': 'identity', **options}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(tiny_export.text().splitlines()),
        model_prefix=str(tmp_path / 'other'),
        vocab_size=380,
        remove_extra_whitespaces=False,
        minloglevel=2,
        **settings,
    )
    with pytest.raises(errors.UsageError, match=reason):
        convert.export(tiny_export.params(), MODEL, tmp_path / 'other.model', tmp_path / 'export')
    assert not (tmp_path / 'export').exists()


def _edit(folder, **fields):
    path = folder / 'tokenizer_config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_special_tokens_are_read_as_transformers_writes_them(copied):
    _edit(copied, bos_token={'content': '<s>', 'special': True}, eos_token=None)
    tokenizer = loading.load(copied)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2), 'EOS by config.json'
    _edit(copied, bos_token='<begin>')  # added, as by transformers
    assert loading.load(copied).bos_id == 400


def test_tokenizer_json_decides_about_bos(copied):
    for says in (True, False, None):
        _edit(copied, add_bos_token=says, tokenizer_class='LlamaTokenizer')
        assert loading.load(copied).encode('', special=True) == []


def test_a_folder_without_a_tokenizer_that_can_be_read_is_refused(copied):
    (copied / 'tokenizer.model').unlink()
    (copied / 'tokenizer.json').write_text('{}')
    with pytest.raises(errors.UsageError, match='is not a valid tokenizer.json'):
        loading.load(copied)
    (copied / 'tokenizer.json').unlink()
    assert hf_tokenizer.find(copied) is None
    with pytest.raises(errors.UsageError, match='neither tokenizer.model nor tokenizer.json'):
        loading.load(copied)


TIKTOKEN = b'IQ== 0\nIg== 1\nIw== 2\n'


def test_a_tiktoken_model_beside_tokenizer_json_is_passed_over(copied, tmp_path):
    (copied / 'tokenizer.model').write_bytes(TIKTOKEN)
    tokenizer = hf_tokenizer.find(copied)
    assert tokenizer.vocab_size == 400
    loading.keep(copied, tmp_path / 'run')
    hf_tokenizer.keep_model(copied, tmp_path / 'run', tokenizer)
    assert [path.name for path in (tmp_path / 'run').iterdir()] == ['tokenizer']
    (copied / 'tokenizer.json').unlink()
    with pytest.raises(errors.UsageError, match="tokenizer.model is in tiktoken's form .* give .* a tokenizer.json"):
        hf_tokenizer.find(copied)


def test_two_tokenizers_that_should_be_one_are_compared(copied, tmp_path, capsys):
    (tmp_path / 'run').mkdir()
    hf_tokenizer.keep_model(copied, tmp_path / 'run', loading.load(copied))
    assert (tmp_path / 'run' / 'tokenizer.model').read_bytes() == (copied / 'tokenizer.model').read_bytes()
    assert not capsys.readouterr().err
    content = json.loads((copied / 'tokenizer.json').read_text())
    content['model']['merges'].reverse()
    (copied / 'tokenizer.json').write_text(json.dumps(content))
    (tmp_path / 'run' / 'tokenizer.model').unlink()
    hf_tokenizer.keep_model(copied, tmp_path / 'run', loading.load(copied))
    assert 'gives other ids for the folder than SentencePiece for' in capsys.readouterr().err
    assert not list((tmp_path / 'run').iterdir())


def test_an_export_of_a_merged_vocabulary_is_refused(tmp_path):
    path = tiny_export.write_merged_tokenizer(tmp_path / 'merged.model')
    with pytest.raises(errors.UsageError, match='transformers would give other ids than SentencePiece'):
        convert.export(tiny_export.params(), dataclasses.replace(MODEL, vocab_size=500), path, tmp_path / 'export')
    assert not (tmp_path / 'export').exists()


@pytest.mark.parametrize('kind', json_tokenizers.KINDS)
def test_a_tokenizer_json_is_exported_whole(tmp_path, kind):
    source = json_tokenizers.write(tmp_path / kind, kind, [tiny_export.text()], pieces=400)
    (source / 'chat_template.jinja').write_text('{{ messages }}')
    (tmp_path / 'export').mkdir()
    hf_tokenizer.write(tmp_path / 'export', source, add_bos=False, max_length=48)
    assert {path.name: path.read_bytes() for path in (tmp_path / 'export').iterdir()} == {
        path.name: path.read_bytes() for path in source.iterdir()
    }


def test_a_sentencepiece_folder_with_added_tokens_is_exported_with_them(tmp_path):
    transformers = pytest.importorskip('transformers')
    source, output = tmp_path / 'source', tmp_path / 'export'
    source.mkdir()
    output.mkdir()
    tiny_export.write_tokenizer(source / 'tokenizer.model')
    json_tokenizers.edit(source / 'added_tokens.json', **{'[PAD]': 400, '<|im_end|>': 401})
    json_tokenizers.edit(source / 'tokenizer_config.json', pad_token='[PAD]', chat_template='{{ messages }}')
    hf_tokenizer.write(output, source, add_bos=False, max_length=48)
    (output / 'config.json').write_text('{"model_type": "llama"}')
    ours, theirs = loading.load(source), transformers.AutoTokenizer.from_pretrained(output)
    assert (theirs.pad_token, theirs.chat_template) == ('[PAD]', '{{ messages }}')
    for text in [*HARD_TEXTS, 'a<|im_end|>b [PAD]', tiny_export.text()]:
        for special in (False, True):
            assert theirs.encode(text, add_special_tokens=special) == ours.encode(text, special=special), text
