"""Tokenizers of Hugging Face folders: SentencePiece's ids from a tokenizer.json, whether BOS comes first, refusals."""

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
from tests.support import tiny_export
from tinyllama_jax import errors
from tinyllama_jax import tokenizer as tokenizer_lib

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
    ours = hf_tokenizer.load(folder)
    (folder / 'tokenizer.model').unlink()
    return ours, hf_tokenizer.load(folder)


def test_tokenizer_json_gives_sentencepiece_s_ids(copied):
    ours, theirs = _tokenizers(copied)
    assert isinstance(ours, tokenizer_lib.Tokenizer)
    assert not isinstance(theirs, tokenizer_lib.Tokenizer)
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
    ours, theirs = hf_tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)
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
    (copied / 'tokenizer.model').unlink()
    _edit(copied, bos_token={'content': '<s>', 'special': True}, eos_token=None)
    tokenizer = hf_tokenizer.load(copied)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, -1)
    _edit(copied, bos_token='<begin>')  # not in the vocabulary
    assert hf_tokenizer.load(copied).bos_id == -1


@pytest.mark.parametrize(
    ('values', 'adds'),
    [
        (None, False),
        ({}, False),
        ({'add_bos_token': True}, True),
        ({'tokenizer_class': 'LlamaTokenizer'}, True),
        ({'tokenizer_class': 'LlamaTokenizerFast', 'add_bos_token': False}, False),
        ({'tokenizer_class': 'GPT2Tokenizer'}, False),
    ],
)
def test_whether_bos_comes_first(tmp_path, values, adds):
    if values is not None:
        (tmp_path / 'tokenizer_config.json').write_text(json.dumps(values))
    assert hf_tokenizer.adds_bos(tmp_path) is adds


def test_a_folder_without_a_tokenizer_that_can_be_read_is_refused(copied):
    (copied / 'tokenizer.model').unlink()
    (copied / 'tokenizer.json').write_text('{}')
    with pytest.raises(errors.UsageError, match='is not a valid tokenizer.json'):
        hf_tokenizer.load(copied)
    (copied / 'tokenizer.json').unlink()
    with pytest.raises(errors.UsageError, match='neither tokenizer.model nor tokenizer.json'):
        hf_tokenizer.load(copied)
