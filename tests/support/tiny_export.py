"""A tokenizer, weights and Hugging Face folder small enough to make in a test."""

import dataclasses
import functools
import pathlib
import re
import tempfile

import jax
import numpy as np
import pytest
from sentencepiece import sentencepiece_model_pb2

from eval_bridge.hf import convert
from tests.conftest import ROOT
from tests.support import tiny
from tinyllama_jax import model
from tinyllama_jax.tokenizer import spm

PIECES = 400
MODEL = dataclasses.replace(tiny.MODEL, vocab_size=PIECES, seq_len=48)


@functools.cache
def text() -> str:
    """Returns English, code and other scripts: this project's own sources."""
    files = sorted(ROOT.glob('tinyllama_jax/**/*.py')) + sorted(ROOT.glob('kernels/*.py'))
    return '\n'.join(path.read_text(encoding='utf-8') for path in files)[:60_000] + 'naïve café Straße Ωμέγα 42\n'


def random_params(config, *, std: float = 0.1, seed: int = 0):
    """Returns weights whose logits are far from uniform and whose norms are not 1; needs no compilation."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape, scale=std).astype(np.float32)
        return noise + 1 if path[-1].key == 'scale' else noise

    shapes = jax.eval_shape(lambda: model.init_params(config, jax.random.key(0)))
    return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.cache
def params():
    """Returns weights of `MODEL`."""
    return random_params(MODEL)


@functools.cache
def _tokenizer_bytes() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / 'tokenizer.model'
        spm.train([text()], path, PIECES)
        return path.read_bytes()


def write_tokenizer(path: pathlib.Path) -> pathlib.Path:
    """Writes a SentencePiece model of `PIECES` pieces, trained once."""
    path.write_bytes(_tokenizer_bytes())
    return path


def write_merged_tokenizer(path: pathlib.Path) -> pathlib.Path:
    """Writes the model of `write_tokenizer` with 100 more pieces of equal scores, as people merge vocabularies."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(_tokenizer_bytes())
    have, words = {piece.piece for piece in proto.pieces}, sorted(set(re.findall(r'[a-z]{4,}', text())))
    new = dict.fromkeys(word[i : i + n] for word in words for n in (2, 3) for i in range(len(word) - n + 1))
    for piece in [piece for piece in new if piece not in have][:100]:
        proto.pieces.add(piece=piece, score=0)
    path.write_bytes(proto.SerializeToString())
    return path


def write_export(folder: pathlib.Path, config=MODEL, **options) -> pathlib.Path:
    """Exports `params()` to a Hugging Face folder inside `folder` and returns its path."""
    output = folder / 'export'
    convert.export(params(), config, write_tokenizer(folder / 'tokenizer.model'), output, **options)
    return output


def require_torch():
    """Returns torch, on one thread: for small models its threads only wait for each other. Skips without it."""
    torch = pytest.importorskip('torch')
    torch.set_num_threads(1)
    return torch


def transformers_llama(params, config, folder: pathlib.Path):
    """Returns transformers' model with our weights, through an export inside `folder`."""
    transformers = pytest.importorskip('transformers')
    convert.export(params, config, write_tokenizer(folder / 'tokenizer.model'), folder / 'export')
    return transformers.AutoModelForCausalLM.from_pretrained(folder / 'export', attn_implementation='eager')
