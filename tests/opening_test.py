"""Opened models: how they are computed, what identifies them, what is refused."""

import dataclasses
import json
import shutil

import pytest

from eval_bridge import convert, opening, protocols
from tests import tiny_export
from tinyllama_jax import errors, tokenizer


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tiny_export.write_export(tmp_path_factory.mktemp('opening'), add_bos=True, dtype='bfloat16')


def test_the_protocol_decides_precision_and_bos(folder):
    for protocol, dtype, add_bos in ((protocols.PAPER, 'float32', False), (protocols.CURRENT, 'bfloat16', True)):
        with opening.Folder(folder).opened(protocol) as opened:
            assert (opened.identity['dtype'], opened.identity['add_bos']) == (dtype, add_bos)
            assert (opened.model.dtype, opened.model.add_bos) == (dtype, add_bos)


def test_weights_and_tokenizer_identify_a_folder(folder, tmp_path):
    def identity(path):
        with opening.Folder(path).opened(protocols.PAPER) as opened:
            return opened.identity

    before = identity(folder)
    shutil.copytree(folder, tmp_path / 'copy')
    assert identity(tmp_path / 'copy') == before | {'model': 'copy'}
    convert.export(
        tiny_export.random_params(tiny_export.MODEL, seed=1),
        tiny_export.MODEL,
        folder / 'tokenizer.model',
        tmp_path / 'other',
    )
    other = identity(tmp_path / 'other')
    assert other['weights_sha256'] != before['weights_sha256']
    assert other['tokenizer_sha256'] == before['tokenizer_sha256']


def test_a_tokenizer_with_more_pieces_than_the_model_is_refused(folder):
    pieces = tokenizer.Tokenizer(folder / 'tokenizer.model')
    shape = dataclasses.replace(tiny_export.MODEL, vocab_size=tiny_export.PIECES - 8)
    with pytest.raises(errors.UsageError, match='has 400 pieces, but the model knows 392'):
        opening._in_jax({}, shape, pieces, protocols.PAPER, 'float32', False)


def test_weights_of_another_shape_are_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / 'wide')
    path = tmp_path / 'wide' / 'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | {'intermediate_size': 96}))
    with (
        pytest.raises(errors.UsageError, match='_proj.weight has the shape'),
        opening.Folder(tmp_path / 'wide').opened(protocols.PAPER),
    ):
        pass
