"""config.json: every kind of rotation against transformers, in both spellings; what is refused, and by which name."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest

from eval_bridge.hf import convert, model_config
from tests.support import tiny_export
from tinyllama_jax import errors, model
from tinyllama_jax.config import ModelConfig

MODEL = dataclasses.replace(tiny_export.MODEL, seq_len=128, num_heads=2, num_kv_heads=1, head_dim=32)
LLAMA3 = {
    'rope_type': 'llama3', 'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
    'original_max_position_embeddings': 64,
}  # fmt: skip
YARN = {'rope_type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 32}
ROPES = {
    'default': {'rope_type': 'default'},
    'linear': {'rope_type': 'linear', 'factor': 2.5},
    'llama3': LLAMA3,
    'yarn': YARN,
    'yarn in full': YARN | {'beta_fast': 4, 'beta_slow': 0.5, 'truncate': False, 'attention_factor': 1.3},
    'yarn by mscale': YARN | {'factor': 8, 'mscale': 1.0, 'mscale_all_dim': 0.5, 'beta_fast': 1.5},
    'dynamic': {'rope_type': 'dynamic', 'factor': 3.0},
}
PATH = pathlib.Path('folder/config.json')


def _values(**fields):
    """Returns a config.json as an export writes it, with these fields; those that are 'drop' are left out."""
    values = model_config.write(MODEL, 'float32') | fields
    return {name: value for name, value in values.items() if value != 'drop'}


@pytest.mark.parametrize('rope', ROPES)
def test_rotation_is_that_of_transformers(tmp_path, rope):
    transformers = pytest.importorskip('transformers')
    torch = tiny_export.require_torch()
    params = tiny_export.random_params(MODEL, std=0.15)
    tokenizer = tiny_export.write_tokenizer(tmp_path / 'tokenizer.model')
    convert.export(params, MODEL, tokenizer, tmp_path / 'folder')
    path = tmp_path / 'folder' / 'config.json'
    # Texts are longer than these 96 positions, where dynamic rotation changes.
    path.write_text(json.dumps(_values(rope_theta=500.0, rope_scaling=ROPES[rope], max_position_embeddings=96)))
    imported, config = convert.import_weights(tmp_path / 'folder')
    tokens_BT = np.random.default_rng(0).integers(MODEL.vocab_size, size=(2, 120))
    ours = jax.jit(model.forward, static_argnames='config')(imported, tokens_BT, config)

    def theirs(folder):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            return loaded(torch.from_numpy(tokens_BT)).logits

    assert float(np.std(ours)) > 0.5, 'logits near zero would show nothing'
    np.testing.assert_allclose(ours, theirs(tmp_path / 'folder'), atol=1e-4, rtol=0)
    convert.export(imported, config, tokenizer, tmp_path / 'again')
    np.testing.assert_allclose(ours, theirs(tmp_path / 'again'), atol=1e-4, rtol=0)


@pytest.mark.parametrize('rope', ROPES)
def test_both_spellings_and_an_export_describe_one_model(rope):
    given = ROPES[rope]
    config = model_config.read(_values(rope_theta=500.0, rope_scaling=given), PATH)
    of_five = _values(rope_theta='drop', rope_scaling='drop', rope_parameters=given | {'rope_theta': 500.0})
    assert model_config.read(of_five, PATH) == config
    assert model_config.read(_values(rope_theta=45774528000.0), PATH).rope_base == 45774528000.0  # of Gradient's 4 M
    both = _values(rope_theta=500, rope_scaling=given, rope_parameters=given | {'rope_theta': 500.0})
    assert model_config.read(both, PATH) == config
    older = {('type' if name == 'rope_type' else name): value for name, value in given.items()}
    assert model_config.read(_values(rope_theta=500.0, rope_scaling=older), PATH) == config
    assert model_config.read(model_config.write(config, 'float32'), PATH) == config
    outside = {name: value for name, value in given.items() if name.startswith('original')}
    inside = {name: value for name, value in given.items() if name not in outside}
    assert model_config.read(_values(rope_theta=500.0, rope_scaling=inside, **outside), PATH) == config


def test_what_is_missing_has_transformers_defaults():
    dropped = ('max_position_embeddings', 'num_key_value_heads', 'head_dim', 'rms_norm_eps', 'rope_theta')
    config = model_config.read(_values(rope_scaling='drop', **dict.fromkeys(dropped, 'drop')), PATH)
    assert config == ModelConfig(
        vocab_size=MODEL.vocab_size, num_layers=2, embed_dim=32, num_heads=2, num_kv_heads=2, head_dim=16,
        hidden_dim=48, norm_eps=1e-6,
    )  # fmt: skip
    assert model_config.read(_values(head_dim=None, num_key_value_heads=None), PATH).head_dim == 16


@pytest.mark.parametrize(
    ('fields', 'named'),
    [
        # Two fields, one thing.
        ({'rope_theta': 500.0, 'rope_parameters': {'rope_type': 'default', 'rope_theta': 1e4}}, 'rope_theta .* beside'),
        ({'rope_scaling': LLAMA3, 'rope_parameters': YARN}, 'rope_scaling .*rope_parameters'),
        ({'rope_scaling': {'type': 'linear', 'rope_type': 'yarn', 'factor': 2.0}}, 'type .*rope_type'),
        ({'rope_scaling': YARN, 'original_max_position_embeddings': 64}, 'original_max_position_embeddings .* beside'),
        # Types.
        ({'hidden_size': '64'}, "hidden_size is '64', not a whole number"),
        ({'vocab_size': 400.0}, r'vocab_size is 400\.0, not a whole number'),
        ({'num_hidden_layers': None}, 'num_hidden_layers is None'),
        ({'num_hidden_layers': 10**400}, 'num_hidden_layers is 1000'),
        ({'num_attention_heads': [2]}, r'num_attention_heads is \[2\]'),
        ({'num_key_value_heads': 0}, 'num_kv_heads'),
        ({'head_dim': 0}, 'head_dim'),
        ({'intermediate_size': True}, 'intermediate_size is True'),
        ({'max_position_embeddings': None}, 'max_position_embeddings is None'),
        ({'rms_norm_eps': '1e-5'}, "rms_norm_eps is '1e-5', not a number"),
        ({'rope_theta': '10000'}, "rope_theta is '10000'"),
        ({'rope_scaling': 'linear'}, "rope_scaling is 'linear'"),
        ({'rope_scaling': {'type': 'linear', 'factor': '2'}}, r"rope_scaling\.factor is '2'"),
        ({'rope_scaling': YARN | {'truncate': 'no'}}, r"rope_scaling\.truncate is 'no'"),
        ({'tie_word_embeddings': 'false'}, "tie_word_embeddings is 'false'"),
        # What our model does not compute.
        ({'rope_scaling': {'type': 'longrope', 'factor': 2.0}}, r"rope_scaling\.type is 'longrope'; only default"),
        ({'rope_parameters': {'full_attention': {'rope_type': 'default'}}, 'rope_scaling': None}, 'rope_parameters is'),
        ({'rope_scaling': LLAMA3 | {'high_freq_factor': 1.0}}, 'rope_slow_turns'),
        ({'rope_scaling': {'rope_type': 'llama3', 'factor': 2.0}}, r'has no field rope_scaling\.low_freq_factor'),
        ({'rope_scaling': YARN | {'partial_rotary_factor': 0.5}}, r'rope_scaling\.partial_rotary_factor'),
        ({'partial_rotary_factor': 0.5}, 'partial_rotary_factor'),
    ],
)
def test_a_field_that_cannot_be_used_is_named(fields, named):
    with pytest.raises(errors.UsageError, match=f'^{PATH}.*{named}'):
        model_config.read(_values(**fields), PATH)
