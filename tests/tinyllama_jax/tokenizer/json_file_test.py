"""A tokenizer.json and the files beside it: what transformers' AutoTokenizer reads of them, and what is refused."""

import json
import shutil

import numpy as np
import pyarrow.parquet
import pytest
import zstandard

from tests.support import corpora, json_tokenizers, tiny_export
from tests.support.json_tokenizers import edit
from tests.tinyllama_jax.tokenizer import spm_test
from tinyllama_jax import errors
from tinyllama_jax.tokenizer import json_file, loading

TEXTS = [
    '', ' ', 'Hello  world 1984\n\n\tx', ' a', 'a ', '你好 🙂 é e\u0301 ﬁ', '\x00\r\n', 'def f(x):\n    return x , y',
    "I 'm it 's <s> a</s>b <pad> [PAD] <|im_end|> x <|begin_of_text|>y <extra>z", '<s>', '<|begin_of_text|>a', '▁a ▁',
]  # fmt: skip


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """Kind -> a folder with such a tokenizer; `llama2` is an export of a SentencePiece model of ours."""
    root = tmp_path_factory.mktemp('json')
    texts = [tiny_export.text(), *corpora.texts(40)]
    made = {kind: json_tokenizers.write(root / kind, kind, texts) for kind in json_tokenizers.KINDS}
    made['llama2'] = tiny_export.write_export(root, add_bos=True)
    for name in ('model.safetensors', 'config.json', 'generation_config.json', 'tokenizer.model'):
        (made['llama2'] / name).unlink()
    return made


@pytest.fixture
def copied(folders, tmp_path):
    return lambda kind: shutil.copytree(folders[kind], tmp_path / kind)


def reference(folder):
    transformers = pytest.importorskip('transformers')
    edit(folder / 'config.json', model_type='llama')
    return transformers.AutoTokenizer.from_pretrained(folder)


def assert_same(folder, texts=TEXTS):
    """Fails unless ids, decoded texts, BOS, EOS and the largest id are AutoTokenizer's."""
    theirs, ours = reference(folder), loading.load(folder)
    assert [ours.bos_id, ours.eos_id] == [
        -1 if index is None else index for index in (theirs.bos_token_id, theirs.eos_token_id)
    ]
    assert ours.vocab_size == max(theirs.get_vocab().values()) + 1
    for text in texts:
        for special in (False, True):
            ids = theirs.encode(text, add_special_tokens=special)
            assert ours.encode(text, special=special) == ids, text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text


def tokens(*names, **flags):
    plain = dict.fromkeys(('lstrip', 'rstrip', 'normalized', 'single_word'), False)
    return [{'content': name, **plain, 'special': True, **flags} for name in names]


@pytest.mark.parametrize('kind', [*json_tokenizers.KINDS, 'llama2'])
@pytest.mark.parametrize(
    'changes',
    [
        {},
        {'tokenizer_class': None},
        {'tokenizer_class': 'LlamaTokenizerFast'},
        {'tokenizer_class': 'LlamaTokenizer', 'legacy': True, 'add_prefix_space': True},
        {'tokenizer_class': 'LlamaTokenizer', 'add_prefix_space': False, 'added_tokens_decoder': {}},
        {'tokenizer_class': 'GPT2Tokenizer', 'add_prefix_space': True},
        {'tokenizer_class': 'Qwen2TokenizerFast'},
        {'tokenizer_class': 'GPTNeoXTokenizerFast'},
        {'tokenizer_class': 'GemmaTokenizer'},
        {'add_bos_token': True, 'add_eos_token': True},
        {'add_bos_token': False, 'pad_token': '<extra>'},
        {'split_special_tokens': True},
        {'clean_up_tokenization_spaces': True},
        {'additional_special_tokens': ['<extra>', 'return']},
        {'extra_special_tokens': {'image_token': '<extra>'}, 'bos_token': None},
        {'added_tokens_decoder': {'5': tokens('x', special=False)[0], '90': tokens('<extra>', lstrip=True)[0]}},
        {'bos_token': {'__type': 'AddedToken', **tokens('<extra>', rstrip=True)[0]}},
    ],
    ids=lambda changes: '-'.join(f'{key}={value}'[:40] for key, value in changes.items()) or 'as-written',
)
def test_what_the_files_say_is_taken_as_transformers_takes_it(copied, kind, changes):
    folder = copied(kind)
    edit(folder / 'tokenizer_config.json', **changes)
    name = (changes.get('tokenizer_class') or '').removesuffix('Fast')
    if name in json_file._REBUILT and kind in ('unigram', 'wordpiece'):
        with pytest.raises(errors.UsageError, match='holds no BPE model'):
            loading.load(folder)
    elif name != 'GemmaTokenizer' or kind == 'llama2':  # transformers cannot use the others as Gemma's
        assert_same(folder)


def test_truncation_padding_and_what_a_class_replaces_are_not_obeyed(copied):
    folder = copied('llama3')
    plain = loading.load(folder).encode(TEXTS[2])
    truncation = {'direction': 'Right', 'max_length': 3, 'strategy': 'LongestFirst', 'stride': 0}
    padding = {'strategy': {'Fixed': 64}, 'direction': 'Right', 'pad_to_multiple_of': None, 'pad_id': 0,
               'pad_type_id': 0, 'pad_token': '<|end_of_text|>'}  # fmt: skip
    edit(folder / 'tokenizer.json', truncation=truncation, padding=padding)
    assert loading.load(folder).encode(TEXTS[2]) == plain
    assert_same(folder)
    folder = copied('llama2')
    edit(folder / 'tokenizer.json', truncation=truncation, normalizer={'type': 'Lowercase'})
    edit(folder / 'tokenizer_config.json', tokenizer_class='LlamaTokenizer')
    assert_same(folder)


@pytest.mark.parametrize('kind', ['llama3', 'qwen2', 'llama2'])
def test_older_folders_keep_tokens_elsewhere(copied, kind):
    folder = copied(kind)
    (folder / 'tokenizer_config.json').unlink()
    eos = next(
        name for name in ('</s>', '<|end_of_text|>', '<|endoftext|>') if name in (folder / 'tokenizer.json').read_text()
    )
    edit(folder / 'special_tokens_map.json', bos_token=tokens('<extra>')[0], eos_token=eos, pad_token='[PAD]')
    size = loading.load(folder).vocab_size
    edit(folder / 'added_tokens.json', **{'[PAD]': size - 1, 'naïve': size})
    assert_same(folder)
    edit(folder / 'tokenizer_config.json', tokenizer_class='LlamaTokenizer')
    assert_same(folder)


@pytest.mark.parametrize(
    ('settings', 'of_the_map'),
    [
        ({'additional_special_tokens': ['<a>'], 'extra_special_tokens': {'image_token': '<b>'}}, ['<c>']),
        ({'additional_special_tokens': ['<a>']}, ['<b>', '<c>']),
        ({'additional_special_tokens': []}, ['<b>']),
        ({'extra_special_tokens': {}}, ['<b>']),
        ({'fill_token': {'__type': 'AddedToken', 'content': '<b>'}}, ['<a>']),
        ({'extra_special_tokens': [{'__type': 'AddedToken', 'content': '<a>', 'special': False}]}, None),
    ],
)
def test_special_tokens_without_a_role_are_taken_as_transformers_takes_them(copied, settings, of_the_map):
    folder = copied('llama3')
    edit(folder / 'tokenizer_config.json', **settings)
    if of_the_map is not None:
        edit(folder / 'special_tokens_map.json', additional_special_tokens=of_the_map)
    assert_same(folder, ['x<a> <b>y<c>', '<|eot_id|><b>'])


def test_spaces_of_a_bpe_tokenizer_s_texts_are_cleaned_only_if_both_settings_say_so(copied):
    folder = copied('llama3')
    edit(folder / 'tokenizer_config.json', clean_up_tokenization_spaces=True)
    assert loading.load(folder).decode(loading.load(folder).encode('x , y')) == 'x , y'
    edit(folder / 'tokenizer_config.json', clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output=True)
    assert loading.load(folder).decode(loading.load(folder).encode('x , y')) == 'x, y'
    assert_same(folder)


def test_new_special_tokens_have_ids_in_the_order_of_their_roles(copied):
    folder = copied('qwen2')
    edit(folder / 'tokenizer_config.json', bos_token='<s>', eos_token='</s>', pad_token='[PAD]')
    assert_same(folder)


def test_bos_and_eos_may_be_config_json_s_alone(copied):
    folder = copied('llama3')
    edit(folder / 'tokenizer_config.json', bos_token=None, eos_token=None)
    assert (loading.load(folder).bos_id, loading.load(folder).stop_ids) == (-1, ())
    edit(folder / 'config.json', bos_token_id=0, eos_token_id=[1, 2])
    tokenizer = loading.load(folder)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.stop_ids) == (0, 1, (1, 2))


def test_each_id_that_ends_a_text_is_known(copied):
    folder = copied('llama3')
    assert loading.load(folder).stop_ids == (1,)
    edit(folder / 'config.json', eos_token_id=2)
    assert loading.load(folder).stop_ids == (2, 1)
    edit(folder / 'generation_config.json', eos_token_id=[1, 9, -1])
    assert loading.load(folder).stop_ids == (1, 9)
    for wrong in ('1', [[1]], 1.0, True, {'x': 1}, 1 << 31):
        edit(folder / 'generation_config.json', eos_token_id=wrong)
        with pytest.raises(errors.UsageError, match=r'generation_config.json: eos_token_id is .*, neither an id nor'):
            loading.load(folder)


@pytest.mark.parametrize(
    'settings',
    [
        {},
        {'add_bos_token': True, 'pad_token': '<pad>', 'legacy': True},
        {'add_bos_token': True, 'add_eos_token': True, 'bos_token': '<extra>', 'legacy': False},
        {'add_prefix_space': False, 'added_tokens_decoder': {'400': tokens('<|im_end|>')[0]}},
    ],
)
def test_a_sentencepiece_model_alone_is_read_as_transformers_reads_a_llama_s(tmp_path, settings):
    tiny_export.write_tokenizer(tmp_path / 'tokenizer.model')
    edit(tmp_path / 'tokenizer_config.json', tokenizer_class='LlamaTokenizer', **settings)
    assert_same(tmp_path, [*TEXTS, tiny_export.text()])


@pytest.mark.parametrize(
    'options',
    [
        {'user_defined_symbols': ['<|im_start|>', '<|im_end|>'], 'control_symbols': ['<extra>']},
        {'normalization_rule_name': 'nmt_nfkc', 'remove_extra_whitespaces': True},  # OpenLLaMA's
        {'byte_fallback': False, 'add_dummy_prefix': False, 'pad_id': 3, 'bos_id': 0, 'eos_id': 1, 'unk_id': 2},
    ],
)
def test_other_sentencepiece_models_alone_are_read_as_transformers_reads_them(tmp_path, options):
    spm_test.train_variant(tmp_path / 'tokenizer.model', **options)
    edit(tmp_path / 'tokenizer_config.json', tokenizer_class='LlamaTokenizer', add_bos_token=True)
    assert_same(tmp_path, [*TEXTS, tiny_export.text()])
    edit(tmp_path / 'added_tokens.json', **{'[PAD]': loading.load(tmp_path).vocab_size})
    edit(tmp_path / 'tokenizer_config.json', extra_special_tokens=['naïve'])
    assert_same(tmp_path)


def test_merges_of_a_sentencepiece_model_alone_are_ranked_as_by_transformers(tmp_path, test_data_dir):
    edit(tmp_path / 'tokenizer_config.json', tokenizer_class='LlamaTokenizer')
    tiny_export.write_merged_tokenizer(tmp_path / 'tokenizer.model')
    assert_same(tmp_path, [*TEXTS, tiny_export.text()])
    shutil.copyfile(test_data_dir / 'tokenizer' / 'tokenizer.model', tmp_path / 'tokenizer.model')
    assert_same(tmp_path, [*TEXTS, *(' ' * count + 'x' for count in range(40)), tiny_export.text()])


def test_added_tokens_beside_a_sentencepiece_model_are_honoured(tmp_path):
    model = tiny_export.write_tokenizer(tmp_path / 'tokenizer.model')
    edit(tmp_path / 'added_tokens.json', **{'[PAD]': 400, '<|im_start|>': 401, '<|im_end|>': 402})
    edit(tmp_path / 'tokenizer_config.json', tokenizer_class='LlamaTokenizer', add_bos_token=True, pad_token='[PAD]')
    tokenizer, plain = loading.load(tmp_path), loading.load(model)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (403, 1, 2)
    assert_same(tmp_path, [*TEXTS, '<|im_start|>def f(x)<|im_end|> return [PAD]'])
    for text in ('def f(x)', 'Hello  world\n\tx', tiny_export.text()):
        assert tokenizer.encode(text) == plain.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == plain.decode(plain.encode(text))


def test_ids_have_holes_and_the_largest_counts(copied):
    folder = copied('llama3')
    content = json.loads((folder / 'tokenizer.json').read_text())
    content['model']['vocab']['<far>'] = 5_000
    content['added_tokens'] += [{'id': 5_000, **tokens('<far>')[0]}]
    (folder / 'tokenizer.json').write_text(json.dumps(content))
    assert loading.load(folder).vocab_size == 5_001
    assert loading.load(folder).encode('<far>') == [5_000]
    assert_same(folder)


def test_more_than_65536_ids_take_more_than_16_bits(copied):
    folder = copied('llama3')
    json_tokenizers.widen(folder, first=1_000, count=66_000)
    tokenizer = loading.load(folder)
    assert (tokenizer.vocab_size, tokenizer.dtype) == (67_000, np.uint32)
    document = tokenizer.encode_document('a', bos=True, eos_per_document=2)
    assert document.tolist() == [0, *tokenizer.encode('a'), 1, 1]


def test_what_decides_the_ids_identifies_it_and_all_files_are_copied(copied, tmp_path):
    folder = copied('qwen2')
    (folder / 'chat_template.jinja').write_text('{{ messages }}')
    (folder / 'additional_chat_templates').mkdir()
    (folder / 'additional_chat_templates' / 'tools.jinja').write_text('x')
    before = loading.load(folder)
    for source, target in ((folder, 'a'), (folder / 'tokenizer.json', 'b')):
        loading.keep(source, tmp_path / target)
        copy = loading.kept(tmp_path / target)
        assert loading.load(copy).sha256 == before.sha256
        assert {path.name for path in copy.iterdir()} == {path.name for path in folder.iterdir()}
    edit(folder / 'tokenizer_config.json', chat_template='another')
    assert loading.load(folder).sha256 == before.sha256
    edit(folder / 'tokenizer_config.json', eos_token='<|im_end|>')
    assert loading.load(folder).sha256 != before.sha256


def test_what_cannot_be_read_is_refused_by_name(copied, tmp_path):
    folder = copied('llama3')
    with pytest.raises(errors.UsageError, match=r'absent\.json cannot be read'):
        loading.load(tmp_path / 'absent.json')
    edit(folder / 'tokenizer_config.json', tokenizer_class='T5TokenizerFast')
    with pytest.raises(errors.UsageError, match='tokenizer_class is T5Tokenizer, of which'):
        loading.load(folder)
    tiny_export.write_tokenizer(tmp_path / 'tokenizer.model')
    edit(tmp_path / 'tokenizer_config.json', tokenizer_class='CodeLlamaTokenizer')
    with pytest.raises(errors.UsageError, match='CodeLlamaTokenizer, of which .* LlamaTokenizer tokenizer.model'):
        loading.load(tmp_path)
    edit(folder / 'tokenizer_config.json', tokenizer_class=None, added_tokens_decoder={'a': 1})
    with pytest.raises(errors.UsageError, match='tokens cannot be read'):
        loading.load(folder)
    (folder / 'tokenizer_config.json').write_text('[]')
    with pytest.raises(errors.UsageError, match='tokenizer_config.json holds no JSON object'):
        loading.load(folder)
    (folder / 'tokenizer_config.json').unlink()
    content = json.loads((folder / 'tokenizer.json').read_text())
    content['model']['dropout'] = 0.1
    (folder / 'tokenizer.json').write_text(json.dumps(content))
    with pytest.raises(errors.UsageError, match='dropout is 0.1'):
        loading.load(folder)
    for broken in ('{}', '', '[', '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}'):
        (folder / 'tokenizer.json').write_text(broken)
        with pytest.raises(errors.UsageError, match='is not a valid tokenizer.json'):
            loading.load(folder)


def _real_texts(folder):
    for path in sorted(folder.glob('slimpajama/validation/*/*.zst')):
        lines = zstandard.ZstdDecompressor().stream_reader(path.read_bytes()).read().splitlines()
        yield from (json.loads(line)['text'] for line in lines)
    for path in sorted(folder.glob('starcoderdata/*/*.parquet')):
        yield from pyarrow.parquet.read_table(path, columns=['content']).column(0).to_pylist()[:40]


@pytest.mark.parametrize('kind', ['llama3', 'qwen2', 'smollm', 'unigram'])
def test_ids_of_real_corpora_are_transformers(tmp_path, test_data_dir, kind):
    texts = list(_real_texts(test_data_dir))
    folder = json_tokenizers.write(tmp_path / kind, kind, texts[::60], pieces=3_000)
    assert_same(folder, [text[:8_000] for text in texts[::20]])
    assert json_file.JsonTokenizer(folder / 'tokenizer.json').sha256 == loading.load(folder).sha256
