"""Opened models: how they are computed, what identifies them, what is refused."""

import dataclasses
import importlib.util
import json
import shutil

import pytest

from eval_bridge import lm, opening, protocols
from eval_bridge.hf import convert
from tests.support import json_tokenizers, tiny_export
from tinyllama_jax import errors
from tinyllama_jax.tokenizer import loading


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tiny_export.write_export(tmp_path_factory.mktemp('opening'), add_bos=True, dtype='bfloat16')


def test_the_protocol_decides_precision_and_bos(folder):
    for protocol, dtype, add_bos in ((protocols.PAPER, 'float32', False), (protocols.CURRENT, 'bfloat16', True)):
        with opening.Folder(folder).open(protocol) as opened:
            assert (opened.identity['dtype'], opened.identity['add_bos']) == (dtype, add_bos)
            assert (opened.model.dtype, opened.model.add_bos) == (dtype, add_bos)


def test_weights_and_tokenizer_identify_a_folder(folder, tmp_path):
    def identity(path):
        with opening.Folder(path).open(protocols.PAPER) as opened:
            return opened.identity

    before = identity(folder)
    shutil.copytree(folder, tmp_path / 'copy')
    assert identity(tmp_path / 'copy') == before | {'model': 'copy'}
    path = tmp_path / 'copy' / 'config.json'  # another base of rotation is another model
    path.write_text(json.dumps(json.loads(path.read_text()) | {'rope_theta': 500.0}))
    changed = identity(tmp_path / 'copy')
    assert changed == before | {'model': 'copy', 'settings_sha256': changed['settings_sha256']}
    assert changed['settings_sha256'] != before['settings_sha256']
    shutil.copyfile(folder / 'config.json', path)
    convert.export(
        tiny_export.random_params(tiny_export.MODEL, seed=1),
        tiny_export.MODEL,
        folder / 'tokenizer.model',
        tmp_path / 'other',
        add_bos=True,
    )
    other = identity(tmp_path / 'other')
    assert other['weights_sha256'] != before['weights_sha256']
    assert other['tokenizer_sha256'] == before['tokenizer_sha256']


def test_texts_begin_as_the_folder_s_tokenizer_says(tmp_path):
    pytest.importorskip('lm_eval.models.huggingface')
    source = json_tokenizers.write(tmp_path / 'llama3', 'llama3', [tiny_export.text()], pieces=400, add_bos_token=False)
    convert.export(tiny_export.params(), tiny_export.MODEL, source, tmp_path / 'export')
    for protocol in (protocols.CURRENT, protocols.PAPER):
        with (
            opening.Folder(tmp_path / 'export').open(protocol) as ours,
            opening.Folder(tmp_path / 'export').open(protocol, 'hf') as theirs,
        ):
            for text in ('a b', '', ' a', '<|begin_of_text|>a', 'a<|end_of_text|>b'):
                assert ours.model.tok_encode(text) == theirs.model.tok_encode(text), text
            assert ours.identity['add_bos'] == (protocol is protocols.CURRENT)
            assert ours.model.prefix_token_id == theirs.model.prefix_token_id


def test_a_hole_in_the_ids_does_not_hide_the_largest(folder, tmp_path):
    shutil.copytree(folder, tmp_path / 'far')
    content = json.loads((tmp_path / 'far' / 'tokenizer.json').read_text())
    content['model']['vocab']['<far>'] = 410
    (tmp_path / 'far' / 'tokenizer.json').write_text(json.dumps(content))
    for backend in (None, *['hf'] * (importlib.util.find_spec('transformers') is not None)):
        with (
            pytest.raises(errors.UsageError, match='has 411 pieces, but the model knows 400'),
            opening.Folder(tmp_path / 'far').open(protocols.PAPER, backend),
        ):
            pass


def test_a_tokenizer_that_names_neither_bos_nor_eos_is_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / 'bare')
    (tmp_path / 'bare' / 'tokenizer.model').unlink()
    (tmp_path / 'bare' / 'tokenizer_config.json').unlink()
    path = tmp_path / 'bare' / 'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | {'bos_token_id': None, 'eos_token_id': None}))
    with (
        pytest.raises(errors.UsageError, match='has neither BOS nor EOS'),
        opening.Folder(tmp_path / 'bare').open(protocols.PAPER),
    ):
        pass


def test_a_tokenizer_with_more_pieces_than_the_model_is_refused(folder):
    tokenizer = loading.load(folder)
    config = dataclasses.replace(tiny_export.MODEL, vocab_size=tiny_export.PIECES - 8)
    with pytest.raises(errors.UsageError, match='has 400 pieces, but the model knows 392'):
        opening._open_in_jax({}, config, tokenizer, protocols.PAPER, 'float32', {})


def test_weights_of_another_shape_are_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / 'wide')
    path = tmp_path / 'wide' / 'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | {'intermediate_size': 96}))
    with (
        pytest.raises(errors.UsageError, match='_proj.weight has the shape'),
        opening.Folder(tmp_path / 'wide').open(protocols.PAPER),
    ):
        pass


def test_rows_and_weights_are_divided_among_the_devices(folder):
    requests = [(None, list(range(3, 3 + length)), [length, 9]) for length in range(1, 30)]
    with opening.Folder(folder).open(protocols.PAPER) as opened:
        embed = opened.model._params['embed']
        assert embed.sharding.shard_shape(embed.shape) == (tiny_export.PIECES, tiny_export.MODEL.embed_dim // 8)
        results = opened.model._loglikelihood_tokens(requests)
        alone = lm.JaxLM(*convert.import_weights(folder), loading.load(folder))
        for (value, greedy), (expected, same) in zip(results, alone._loglikelihood_tokens(requests), strict=True):
            assert (value, greedy) == (pytest.approx(expected, abs=1e-5), same)


def test_a_width_that_the_devices_do_not_divide_leaves_the_weights_whole():
    assert dict(opening._mesh(tiny_export.MODEL).shape) == {'data': 1, 'fsdp': 8, 'tensor': 1}
    odd = dataclasses.replace(tiny_export.MODEL, embed_dim=36)
    assert dict(opening._mesh(odd).shape) == {'data': 8, 'fsdp': 1, 'tensor': 1}


def test_a_model_that_is_not_there_or_not_comparable_is_refused_early(folder, tmp_path):
    opening.Folder(folder).check_model(for_parity=True)
    with pytest.raises(errors.UsageError, match='config.json cannot be read'):
        opening.Folder(tmp_path).check_model()
    with pytest.raises(errors.UsageError, match='there is no config.json'):
        opening.Run(tmp_path).check_model()
    (tmp_path / 'config.json').write_text('{"model_type": "gpt_neox"}')
    opening.Folder(tmp_path).check_model()
    with pytest.raises(errors.UsageError, match="is not a Llama: its model_type is 'gpt_neox'"):
        opening.Folder(tmp_path).check_model(for_parity=True)
