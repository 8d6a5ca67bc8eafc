"""A tokenizer.json of a SentencePiece model: equal ids, and texts that show where they are not."""

from tests.support import corpora, tiny_export
from tinyllama_jax.tokenizer import convert


def test_the_ids_of_the_vocabulary_s_own_texts_are_equal():
    path = corpora.tokenizer_path()
    content = convert.build(path, add_bos=True)
    texts = [*convert.vocabulary_texts(path), *corpora.texts(20)]
    assert convert.first_difference(path, content, texts) is None
    assert convert.first_difference(path, content, ['the <s>']) is None, 'a special token as plain text'


def test_a_text_shows_where_merges_differ():
    path = corpora.tokenizer_path()
    content = convert.build(path, add_bos=False)
    content['model']['merges'].reverse()
    different = convert.first_difference(path, content, ['a', *corpora.texts(3)])
    assert different in corpora.texts(3)


def test_merged_vocabularies_have_no_equal_tokenizer_json(tmp_path):
    path = tiny_export.write_merged_tokenizer(tmp_path / 'merged.model')
    content = convert.build(path, add_bos=False)
    assert convert.first_difference(path, content, convert.vocabulary_texts(path))


def test_llama_s_own_vocabulary_is_equal(test_data_dir):
    path = test_data_dir / 'tokenizer' / 'tokenizer.model'
    content = convert.build(path, add_bos=False)
    assert convert.first_difference(path, content, convert.vocabulary_texts(path)) is None
