"""The tokenizer: sentencepiece's ids, special tokens, training, invalid files."""

import io
import json

import hypothesis
import numpy as np
import pytest
import sentencepiece
from hypothesis import strategies as st

from tests.support import corpora
from tinyllama_jax import errors
from tinyllama_jax.tokenizer import spm

# What cuts, what looks like a space, special pieces, digits, byte fallback, NUL.
AWKWARD = st.lists(
    st.sampled_from([' ', '  ', '\n', '\t', '\u2581', '\0', '<s>', '</s>', '42', 'the', 'e', '東', '\r', '\u3000'])
)
TEXTS = st.one_of(AWKWARD.map(''.join), st.text(st.characters(exclude_categories=('Cs',)), max_size=40))


@pytest.fixture(scope='module')
def tokenizer():
    return spm.SentencePieceTokenizer(corpora.tokenizer_path())


def plain(path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def train_variant(path, **options):
    model = io.BytesIO()
    settings = {'model_type': 'bpe', 'byte_fallback': True, 'normalization_rule_name': 'identity', 'vocab_size': 350}
    settings |= {'remove_extra_whitespaces': False, 'minloglevel': 2, 'max_sentence_length': 1 << 16, **options}
    lines = [line for text in corpora.texts(60) for line in text.split('\n') if line]
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **settings)
    path.write_bytes(model.getvalue())
    return path


@hypothesis.given(text=TEXTS)
def test_ids_are_sentencepieces(tokenizer, text):
    assert tokenizer._memo is not None
    assert tokenizer.encode(text) == plain(tokenizer.path).encode(text)


def test_ids_of_texts_and_back(tokenizer):
    for text in corpora.texts(20, seed=1):
        ids = tokenizer.encode(text)
        assert ids == plain(tokenizer.path).encode(text)
        assert tokenizer.decode(ids) == text


def test_a_full_memo_changes_nothing(monkeypatch):
    monkeypatch.setattr(spm, '_MEMO_ENTRIES', 3)
    tokenizer = spm.SentencePieceTokenizer(corpora.tokenizer_path())
    for text in corpora.texts(3, seed=2):
        assert tokenizer.encode(text) == plain(tokenizer.path).encode(text)
    assert len(tokenizer._memo) <= 3


@pytest.mark.parametrize(
    'options',
    [
        {'remove_extra_whitespaces': True},
        {'normalization_rule_name': 'nmt_nfkc'},
        {'byte_fallback': False},
        {'split_by_whitespace': False, 'vocab_size': 600},
        {'user_defined_symbols': ['the cat', 'e t']},
        {'model_type': 'unigram', 'vocab_size': 340},
        {'treat_whitespace_as_suffix': True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_other_models_are_not_cut(tmp_path, options):
    path = train_variant(tmp_path / 'variant.model', **options)
    tokenizer = spm.SentencePieceTokenizer(path)
    assert tokenizer._memo is None
    for text in corpora.texts(5, seed=3):
        assert tokenizer.encode(text) == plain(path).encode(text)


def test_a_model_without_dummy_prefix_is_cut_right(tmp_path):
    path = train_variant(tmp_path / 'variant.model', add_dummy_prefix=False)
    tokenizer = spm.SentencePieceTokenizer(path)
    assert tokenizer._memo is not None
    for text in [*corpora.texts(5, seed=3), 'e', ' e', '\n']:
        assert tokenizer.encode(text) == plain(path).encode(text)


@pytest.mark.parametrize(('bos', 'eos'), [(False, 1), (True, 0), (True, 1), (False, 0), (False, 2)])
def test_special_tokens_of_a_document(tokenizer, bos, eos):
    ids = tokenizer.encode_document('the end </s>', bos=bos, eos_per_document=eos)
    assert ids.dtype == np.uint16
    assert np.sum(ids == tokenizer.bos_id) == bos
    assert np.sum(ids == tokenizer.eos_id) == eos  # the literal </s> is plain text
    assert ids[bos : len(ids) - eos].tolist() == tokenizer.encode('the end </s>')


def test_a_model_without_eos_is_refused_only_if_one_is_wanted(tmp_path):
    tokenizer = spm.SentencePieceTokenizer(train_variant(tmp_path / 'variant.model', eos_id=-1))
    assert len(tokenizer.encode_document('e', bos=True, eos_per_document=0))
    with pytest.raises(errors.UsageError, match='no EOS'):
        tokenizer.encode_document('e', bos=False, eos_per_document=1)


def test_awkward_texts_go_through(tokenizer):
    assert tokenizer.encode('') == []
    assert tokenizer.encode('a\ud800b') == tokenizer.encode('a\ufffdb')
    assert tokenizer.encode('\ud83d\ude00') == tokenizer.encode('😀')  # a pair that JSON's escapes left apart
    assert tokenizer.decode(tokenizer.encode('a\0b')) == 'a\0b'
    long = 'the quick fox ' * 700_000
    assert len(tokenizer.encode(long)) > 1_000_000
    assert len(tokenizer.encode('x1' * 100_000)) == len(plain(tokenizer.path).encode('x1' * 100_000))


def test_missing_and_invalid_files_are_refused(tmp_path):
    with pytest.raises(errors.UsageError, match=r'tokenizer .*absent.*cannot be read'):
        spm.SentencePieceTokenizer(tmp_path / 'absent.model')
    for content in (b'', b'{"model": "BPE"}', corpora.tokenizer_path().read_bytes()[:1000]):
        (tmp_path / 'bad.model').write_bytes(content)
        with pytest.raises(errors.UsageError, match=r'bad\.model.*not a SentencePiece model'):
            spm.SentencePieceTokenizer(tmp_path / 'bad.model')


def test_training_is_llamas_and_deterministic(tmp_path, tokenizer):
    spm.train(corpora.texts(200, seed=99), tmp_path / 'again.model', corpora.PIECES)
    again = spm.SentencePieceTokenizer(tmp_path / 'again.model')
    assert again.sha256 == tokenizer.sha256
    processor = plain(tokenizer.path)
    assert (tokenizer.vocab_size, processor.unk_id(), tokenizer.bos_id, tokenizer.eos_id) == (corpora.PIECES, 0, 1, 2)
    assert processor.pad_id() == -1
    assert processor.id_to_piece(3) == '<0x00>'
    pieces = [processor.id_to_piece(i) for i in range(259, tokenizer.vocab_size)]
    assert not any(any(c.isdigit() for c in piece) and len(piece) > 1 for piece in pieces)
    assert processor.encode('e', out_type=str)[0].startswith('\u2581')
    assert tokenizer.decode(tokenizer.encode('🦙\n')) == '🦙\n'


def test_too_many_pieces_for_the_texts_are_refused(tmp_path):
    with pytest.raises(errors.UsageError, match='tokenizer_pieces=5000'):
        spm.train(['a few words'], tmp_path / 'x.model', 5000)
    assert not list(tmp_path.iterdir())


def test_llama_on_real_text(test_data_dir):
    tokenizer = spm.SentencePieceTokenizer(test_data_dir / 'tokenizer' / 'tokenizer.model')
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (32_000, 1, 2)
    assert tokenizer._memo is not None
    published = json.loads((test_data_dir / 'tokenizer' / 'llama_encoded.json').read_text())
    assert [1, *tokenizer.encode(published['text'])] == published['token_ids']
    for text in corpora.texts(20, seed=5):
        assert tokenizer.encode(text) == plain(tokenizer.path).encode(text)
