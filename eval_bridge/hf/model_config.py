"""Reads and writes a Llama's config.json, with rotary embedding as transformers 4 and 5 spell it.

Fields are read as transformers 5 reads them. A file that says one thing twice, and differently, is refused, because
the versions of transformers differ in what they take.
"""

import math
import pathlib
from collections.abc import Mapping
from typing import Any

from tinyllama_jax import config as config_lib
from tinyllama_jax import errors
from tinyllama_jax.config import Config, ModelConfig

# Other values of these fields would make another model.
_ALLOWED: dict[str, tuple[Any, ...]] = {
    'model_type': ('llama',),
    'hidden_act': ('silu', 'swish'),
    'attention_bias': (False,),
    'mlp_bias': (False,),
    'quantization_config': (None,),
    'partial_rotary_factor': (1, None),
    'tie_word_embeddings': (False, True),
}
# What an export keeps of the config.json that a model was imported with, and what it may drop without a word.
_KEPT = (
    'bos_token_id', 'eos_token_id', 'pad_token_id', 'tokenizer_class', 'attention_dropout', 'initializer_range',
    'use_cache',
)  # fmt: skip
_DROPPED = (
    '_name_or_path', 'dtype', 'original_max_position_embeddings', 'partial_rotary_factor', 'pretraining_tp',
    'quantization_config', 'rope_parameters', 'transformers_version',
)  # fmt: skip
_REQUIRED = object()


class _Fields:
    """The fields of an object in the file `path`; `prefix` is where in the file it stands."""

    def __init__(self, values: Mapping[str, Any], path: pathlib.Path, prefix: str = ''):
        self.values, self.path, self._prefix = values, path, prefix

    def refused(self, name: str, problem: str) -> errors.UsageError:
        return errors.UsageError(f'{self.path}: {self._prefix}{name} is {self.values.get(name)!r}{problem}.')

    def number(self, name: str, kind: type, default: Any = _REQUIRED) -> Any:
        """Returns a field as `kind`, int or float; `default` if it is missing."""
        if name not in self.values:
            if default is _REQUIRED:
                raise errors.UsageError(f'{self.path} has no field {self._prefix}{name}.')
            return default
        value = self.values[name]
        if type(value) not in (int, kind) or abs(value) >= (2**31 if kind is int else 2**1000):
            raise self.refused(name, f', not {"a whole number" if kind is int else "a number"}; mend the file')
        return kind(value)

    def inner(self, name: str) -> '_Fields':
        """Returns the object in a field, which may be missing, null or empty."""
        value = self.values.get(name) or {}
        if not isinstance(value, dict) or any(isinstance(part, dict) for part in value.values()):
            raise self.refused(name, ', not one object of plain values')
        return _Fields(value, self.path, f'{name}.')

    def optional(self, name: str, kind: type, default: Any) -> Any:
        """Returns a field as `kind`; `default` if it is missing or null."""
        return default if self.values.get(name) is None else self.number(name, kind)


def read(values: Mapping[str, Any], path: pathlib.Path) -> ModelConfig:
    """Returns the model that `values`, the content of the config.json at `path`, describes.

    Raises UsageError naming the field that is missing, has another type, contradicts another field, or describes
    what our model does not compute.
    """
    fields = _Fields(values, path)
    for name, allowed in _ALLOWED.items():
        if values.get(name, None if name == 'model_type' else allowed[0]) not in allowed:
            raise fields.refused(name, f'; only {" or ".join(map(repr, allowed))} can be imported')
    width, heads = fields.number('hidden_size', int), fields.number('num_attention_heads', int)
    config = ModelConfig(
        vocab_size=fields.number('vocab_size', int),
        seq_len=fields.number('max_position_embeddings', int, 2_048),
        num_layers=fields.number('num_hidden_layers', int),
        embed_dim=width,
        num_heads=heads,
        num_kv_heads=fields.optional('num_key_value_heads', int, heads),
        head_dim=fields.optional('head_dim', int, width // max(heads, 1)),
        hidden_dim=fields.number('intermediate_size', int),
        norm_eps=fields.number('rms_norm_eps', float, 1e-6),  # Hugging Face's default, not ours
        **_rope(fields),
    )
    try:
        return config_lib.validated(Config(model=config)).model
    except errors.UsageError as error:
        raise errors.UsageError(f'{path} is not a Llama that can be imported: {error}') from None


def _rope(fields: _Fields) -> dict[str, Any]:
    """Returns the fields of ModelConfig about rotation, from transformers 5's rope_parameters or 4's rope_scaling."""
    given = [name for name in ('rope_scaling', 'rope_parameters') if fields.values.get(name)] or ['rope_scaling']
    read_as = [_rope_in(fields, fields.inner(name)) for name in given]
    if read_as[0] != read_as[-1]:
        other = fields.values['rope_parameters']
        raise fields.refused('rope_scaling', f', but rope_parameters is {other!r}; leave the wrong one out')
    return read_as[0]


def _rope_in(fields: _Fields, rope: _Fields) -> dict[str, Any]:
    kind = rope.values.get('rope_type', rope.values.get('type', 'default'))
    if rope.values.get('type', kind) != kind:
        raise rope.refused('type', f', but rope_type is {kind!r}; leave the wrong one out')
    if kind not in ('default', 'linear', 'llama3', 'yarn', 'dynamic'):
        raise rope.refused(
            'rope_type' if 'rope_type' in rope.values else 'type',
            '; only default, linear, llama3, yarn and dynamic can be imported',
        )
    if rope.values.get('partial_rotary_factor') not in (1, None):
        raise rope.refused('partial_rotary_factor', '; only 1 can be imported')
    found: dict[str, Any] = {'rope_base': _agreed(fields, rope, 'rope_theta', float, 10_000.0)}
    if kind == 'default':
        return found
    if kind == 'linear':
        return {**found, 'rope_scaling': rope.number('factor', float)}
    length = fields.number('max_position_embeddings', int, 2_048)
    original = length if kind == 'dynamic' else _agreed(fields, rope, 'original_max_position_embeddings', int, length)
    found |= {'rope_kind': kind, 'rope_original_seq_len': original}
    if kind == 'yarn':
        ratio = rope.values.get('factor', 0) is None  # null: the lengths' ratio
        factor = length / max(original, 1) if ratio else rope.number('factor', float)
        return found | {'rope_scaling': factor, **_yarn(rope, factor)}
    if kind == 'llama3':
        found['rope_slow_turns'] = rope.number('low_freq_factor', float)
        found['rope_fast_turns'] = rope.number('high_freq_factor', float)
    return {**found, 'rope_scaling': rope.number('factor', float)}


def _yarn(rope: _Fields, factor: float) -> dict[str, Any]:
    """Returns yarn's own fields, with the defaults of transformers."""

    def growth(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1

    above, below = (rope.optional(name, float, 0.0) for name in ('mscale', 'mscale_all_dim'))
    attention_factor = growth(above) / growth(below) if above and below else growth(1)
    truncate = rope.values.get('truncate', True)
    if not isinstance(truncate, bool):
        raise rope.refused('truncate', ', not true or false; mend the file')
    return {
        'rope_slow_turns': rope.optional('beta_slow', float, 0.0) or 1.0,
        'rope_fast_turns': rope.optional('beta_fast', float, 0.0) or 32.0,
        'rope_truncate': truncate,
        'rope_attention_factor': rope.optional('attention_factor', float, attention_factor),
    }


def _agreed(fields: _Fields, rope: _Fields, name: str, kind: type, default: Any) -> Any:
    """Returns a field that may stand in the rope's object or beside it. Raises UsageError if the two differ."""
    inner, outer = (each.values.get(name) for each in (rope, fields))
    if inner is not None and outer is not None and inner != outer:
        raise rope.refused(name, f', but the field {name} beside it is {outer!r}; leave the wrong one out')
    return (rope if inner is not None else fields).number(name, kind, default)


def lost(values: Mapping[str, Any], config: ModelConfig) -> list[str]:
    """Returns the fields of an imported config.json that an export will not have."""
    known = {*write(config, ''), *_KEPT, *_DROPPED}
    tied = ['tie_word_embeddings'] if values.get('tie_word_embeddings') else []
    return [*tied, *(name for name in values if name not in known)]


def write(config: ModelConfig, dtype: str, *, imported: Mapping[str, Any] | None = None, **special) -> dict[str, Any]:
    """Returns the content of config.json for a model whose weights have `dtype`.

    Args:
      imported: the config.json that the model was imported with; special tokens and such come from there.
      special: bos_token_id and eos_token_id of a model that was not imported.
    """
    return {
        'architectures': ['LlamaForCausalLM'],
        'model_type': 'llama',
        'vocab_size': config.vocab_size,
        'hidden_size': config.embed_dim,
        'intermediate_size': config.hidden_dim,
        'num_hidden_layers': config.num_layers,
        'num_attention_heads': config.num_heads,
        'num_key_value_heads': config.num_kv_heads,
        'head_dim': config.head_dim,
        'hidden_act': 'silu',
        # Beyond this length transformers changes dynamic rotation.
        'max_position_embeddings': config.rope_original_seq_len if config.rope_kind == 'dynamic' else config.seq_len,
        'rms_norm_eps': config.norm_eps,
        # rope_theta and rope_scaling are transformers 4's form, which 5 reads too.
        'rope_theta': config.rope_base,
        'rope_scaling': _rope_scaling(config),
        'attention_bias': False,
        'attention_dropout': 0.0,
        'mlp_bias': False,
        'tie_word_embeddings': False,
        **special,
        'initializer_range': 0.02,
        'use_cache': True,
        'torch_dtype': dtype,
        **{name: imported[name] for name in _KEPT if imported and name in imported},
    }


def _rope_scaling(config: ModelConfig) -> dict[str, Any] | None:
    if config.rope_kind == 'linear':
        return None if config.rope_scaling == 1 else {'type': 'linear', 'factor': config.rope_scaling}
    rope: dict[str, Any] = {'rope_type': config.rope_kind, 'factor': config.rope_scaling}
    if config.rope_kind == 'dynamic':
        return rope
    rope['original_max_position_embeddings'] = config.rope_original_seq_len
    if config.rope_kind == 'llama3':
        return rope | {'low_freq_factor': config.rope_slow_turns, 'high_freq_factor': config.rope_fast_turns}
    return rope | {
        'beta_slow': config.rope_slow_turns,
        'beta_fast': config.rope_fast_turns,
        'truncate': config.rope_truncate,
        'attention_factor': config.rope_attention_factor,
    }
