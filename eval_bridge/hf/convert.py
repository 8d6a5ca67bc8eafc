"""Parameters and Hugging Face folders, both ways. Only this file knows Hugging Face's names.

A weight of ours has its input axes first ([D, N, H] for queries); Hugging Face's is
the matrix [out, in]. The rotary layout is the same, so nothing is permuted and a
round trip is bit-equal. Tensors pass one at a time, so that a 1.1 B export needs
little memory beside the parameters.
"""

import contextlib
import dataclasses
import json
import math
import pathlib
import shutil
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from eval_bridge.hf import tokenizer as hf_tokenizer
from eval_bridge.hf import weights
from tinyllama_jax import config as config_lib
from tinyllama_jax import errors, model, tokenizer
from tinyllama_jax import step as step_lib
from tinyllama_jax.config import Config, ModelConfig
from tinyllama_jax.process import signals
from tinyllama_jax.run import workdir
from tinyllama_jax.settings import tree

# (our path, Hugging Face's name, input axes of ours; 0: not transposed). {} is the layer.
_NAMES = (
    ('embed', 'model.embed_tokens.weight', 0),
    ('layers/attention_norm/scale', 'model.layers.{}.input_layernorm.weight', 0),
    ('layers/attention/q', 'model.layers.{}.self_attn.q_proj.weight', 1),
    ('layers/attention/k', 'model.layers.{}.self_attn.k_proj.weight', 1),
    ('layers/attention/v', 'model.layers.{}.self_attn.v_proj.weight', 1),
    ('layers/attention/o', 'model.layers.{}.self_attn.o_proj.weight', 2),
    ('layers/mlp_norm/scale', 'model.layers.{}.post_attention_layernorm.weight', 0),
    ('layers/mlp/gate', 'model.layers.{}.mlp.gate_proj.weight', 1),
    ('layers/mlp/up', 'model.layers.{}.mlp.up_proj.weight', 1),
    ('layers/mlp/down', 'model.layers.{}.mlp.down_proj.weight', 1),
    ('final_norm/scale', 'model.norm.weight', 0),
    ('lm_head', 'lm_head.weight', 1),
)
_IGNORED = '.rotary_emb.inv_freq'  # a buffer that older checkpoints carry


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a Hugging Face tensor lies in our tree: leaf `path`, slice `layer` of it (None: all)."""

    path: str
    layer: int | None
    input_axes: int
    shape: tuple[int, ...]  # of our slice

    @property
    def hf_shape(self) -> tuple[int, ...]:
        if not self.input_axes:
            return self.shape
        return math.prod(self.shape[self.input_axes :]), math.prod(self.shape[: self.input_axes])

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        if not self.input_axes:
            return array
        return array.reshape(math.prod(self.shape[: self.input_axes]), -1).T

    def from_hf(self, array: np.ndarray) -> np.ndarray:
        return array.T.reshape(self.shape) if self.input_axes else array


def _places(config: ModelConfig) -> dict[str, _Place]:
    """Hugging Face's name -> our place, for every parameter, in the order of the forward pass."""
    shapes = {path: leaf.shape for path, leaf in _leaves(_abstract_params(config)).items()}
    unstacked = {name: _Place(path, None, axes, shapes[path]) for path, name, axes in _NAMES if '{}' not in name}
    stacked = {
        name.format(layer): _Place(path, layer, axes, shapes[path][1:])
        for layer in range(config.num_layers)
        for path, name, axes in _NAMES
        if '{}' in name
    }
    embed, *last = unstacked.items()
    return dict([embed, *stacked.items(), *last])


def _abstract_params(config: ModelConfig):
    return jax.eval_shape(lambda: model.init_params(config, jax.random.key(0)))


def _leaves(params) -> dict[str, Any]:
    found, _ = jax.tree_util.tree_flatten_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf for path, leaf in found}


def export(
    params: dict,
    model_config: ModelConfig,
    tokenizer_path: pathlib.Path,
    output: pathlib.Path,
    *,
    dtype: str = 'float32',
    format: str = 'safetensors',
    add_bos: bool = False,
    max_shard_bytes: int = weights.MAX_SHARD_BYTES,
) -> None:
    """Writes a folder that transformers loads offline: weights, configuration, tokenizer.

    Args:
      params: nested dict of numpy or jax arrays.
      tokenizer_path: the SentencePiece model the run trained with.
      output: a new or empty folder; it appears only when it is complete.
      dtype: float32 or bfloat16, of the weights.
      format: safetensors, or pytorch (pytorch_model.bin; needs torch).
      add_bos: whether the exported tokenizer puts BOS first, as the training data did.
      max_shard_bytes: larger models are cut into files of at most this size, with an index.

    Raises UsageError for an output that is not empty, an unknown dtype or format, or a
    model or tokenizer that the format cannot express; RunError when writing fails.
    """
    output = pathlib.Path(output)
    _check_export(model_config, dtype, format)
    pieces = tokenizer.Tokenizer(tokenizer_path)
    if pieces.vocab_size > model_config.vocab_size:
        raise errors.UsageError(
            f'{tokenizer_path} has {pieces.vocab_size} pieces but config.model.vocab_size is '
            f'{model_config.vocab_size}; give the tokenizer the model was trained with.'
        )
    with _new_folder(output) as folder:
        _write_tokenizer(folder, pieces, model_config, add_bos)
        _write_json(folder / 'config.json', _hf_config(model_config, pieces, dtype))
        special = {'bos_token_id': _id_or_none(pieces.bos_id), 'eos_token_id': _id_or_none(pieces.eos_id)}
        _write_json(folder / 'generation_config.json', {**special, 'do_sample': False})
        tensors = _hf_tensors(params, model_config, dtype)
        weights.write(folder, tensors, dtype=dtype, format=format, max_shard_bytes=max_shard_bytes)


def _check_export(config: ModelConfig, dtype: str, format: str) -> None:
    for name, value, choices in (('dtype', dtype, weights.DTYPES), ('format', format, weights.FORMATS)):
        if value not in choices:
            raise errors.UsageError(f'--{name}={value} is not one of {", ".join(choices)}.')
    if config.embed_dim % config.num_heads:
        raise errors.UsageError(
            f'config.model.embed_dim: {config.embed_dim} is not a multiple of num_heads = {config.num_heads}, '
            'which Hugging Face requires of a Llama.'
        )
    if format == 'pytorch':
        weights.require_torch('--format=pytorch')


@contextlib.contextmanager
def _new_folder(output: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder beside `output` that takes its name on success and disappears on failure."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise errors.UsageError(f'--output={output} exists and is not an empty folder; give a new one.')
    partial = output.with_name(f'.{output.name}.partial')
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        with signals.unfinished(partial):
            yield partial
            partial.rename(output)
    except OSError as error:
        raise errors.RunError(f'--output={output} could not be written: {error.strerror or error}.') from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_json(path: pathlib.Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')


def _id_or_none(index: int) -> int | None:
    return None if index < 0 else index


def _hf_config(config: ModelConfig, pieces: tokenizer.Tokenizer, dtype: str) -> dict[str, Any]:
    # rope_theta and rope_scaling in transformers 4's form, which 5 reads too.
    scaling = None if config.rope_scaling == 1 else {'type': 'linear', 'factor': config.rope_scaling}
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
        'max_position_embeddings': config.seq_len,
        'rms_norm_eps': config.norm_eps,
        'rope_theta': config.rope_base,
        'rope_scaling': scaling,
        'attention_bias': False,
        'attention_dropout': 0.0,
        'mlp_bias': False,
        'tie_word_embeddings': False,
        'bos_token_id': _id_or_none(pieces.bos_id),
        'eos_token_id': _id_or_none(pieces.eos_id),
        'initializer_range': 0.02,
        'use_cache': True,
        'torch_dtype': dtype,
    }


def _write_tokenizer(folder: pathlib.Path, pieces: tokenizer.Tokenizer, config: ModelConfig, add_bos: bool) -> None:
    shutil.copyfile(pieces.path, folder / 'tokenizer.model')
    content = hf_tokenizer.build(pieces.path, add_bos=add_bos)
    _write_json(folder / 'tokenizer.json', content)
    special = {token['id']: token['content'] for token in content['added_tokens']}
    _write_json(
        folder / 'tokenizer_config.json',
        {
            'tokenizer_class': 'PreTrainedTokenizerFast',
            'add_bos_token': add_bos,
            'add_eos_token': False,
            'bos_token': special.get(pieces.bos_id),
            'eos_token': special.get(pieces.eos_id),
            'unk_token': content['model']['unk_token'],
            'clean_up_tokenization_spaces': False,
            'model_input_names': ['input_ids', 'attention_mask'],
            'model_max_length': config.seq_len,
        },
    )


def _hf_tensors(params: dict, config: ModelConfig, dtype: str) -> dict[str, weights.Tensor]:
    leaves = _leaves(params)

    def tensor(place: _Place) -> weights.Tensor:
        return weights.Tensor(place.hf_shape, lambda: _hf_array(leaves[place.path], place, dtype))

    return {name: tensor(place) for name, place in _places(config).items()}


def _hf_array(leaf, place: _Place, dtype: str) -> np.ndarray:
    array = np.asarray(leaf if place.layer is None else leaf[place.layer])
    return np.ascontiguousarray(place.to_hf(array.astype(weights.DTYPES[dtype], copy=False)))


def import_weights(folder: pathlib.Path) -> tuple[dict, ModelConfig]:
    """The parameters (float32 numpy arrays) and the model of a Llama's Hugging Face folder.

    Reads safetensors, else PyTorch's .bin files (which needs torch), whole or in
    shards, in any floating dtype. Tied embeddings become two equal matrices.
    Raises UsageError naming the file, field or tensor that is missing, unreadable
    or not what this model computes.
    """
    folder = pathlib.Path(folder)
    values = read_config(folder)
    config = _model_config(values, folder / 'config.json')
    places = _places(config)
    params = jax.tree.map(lambda leaf: np.empty(leaf.shape, np.float32), _abstract_params(config))
    leaves, found = _leaves(params), set()
    for name, array in weights.read(folder):
        if name in places:
            _fill(leaves, places[name], name, array, folder)
            found.add(name)
        elif not name.endswith(_IGNORED):
            raise errors.UsageError(f'{folder} holds a tensor {name}, which a Llama without biases does not have.')
    if values.get('tie_word_embeddings') and 'lm_head.weight' not in found:
        params['lm_head'][...] = params['embed'].T
        found.add('lm_head.weight')
    missing = [name for name in places if name not in found]
    if missing:
        raise errors.UsageError(f'{folder} lacks {len(missing)} tensors, {missing[0]} the first; is it complete?')
    return params, config


def _fill(leaves, place: _Place, name: str, array: np.ndarray, folder: pathlib.Path) -> None:
    if array.shape != place.hf_shape:
        raise errors.UsageError(
            f'{folder}: {name} has the shape {array.shape}, but config.json makes it {place.hf_shape}.'
        )
    leaf = leaves[place.path]
    leaf[... if place.layer is None else place.layer] = place.from_hf(array)


def load_tokenizer(folder: pathlib.Path) -> tokenizer.Tokenizer | hf_tokenizer.JsonTokenizer:
    """The tokenizer of a Hugging Face folder: tokenizer.model where there is one, else tokenizer.json."""
    folder = pathlib.Path(folder)
    if (folder / 'tokenizer.model').exists():
        return tokenizer.Tokenizer(folder / 'tokenizer.model')
    if not (folder / 'tokenizer.json').exists():
        raise errors.UsageError(f'{folder} holds neither tokenizer.model nor tokenizer.json.')
    values = _read_json(folder / 'tokenizer_config.json')
    bos, eos = (_token_text(values.get(key)) for key in ('bos_token', 'eos_token'))
    return hf_tokenizer.JsonTokenizer(folder / 'tokenizer.json', bos=bos, eos=eos)


def adds_bos(folder: pathlib.Path) -> bool:
    """Whether the tokenizer of a Hugging Face folder puts BOS before a text unless told otherwise."""
    path = folder / 'tokenizer_config.json'
    values = _read_json(path) if path.exists() else {}
    # Of transformers' tokenizer classes it is Llama's own whose default is BOS.
    return bool(values.get('add_bos_token', str(values.get('tokenizer_class', '')).startswith('Llama')))


def read_config(folder: pathlib.Path) -> dict[str, Any]:
    """The config.json of a Hugging Face folder. Raises UsageError where there is none."""
    return _read_json(pathlib.Path(folder) / 'config.json')


def _token_text(token: str | dict | None) -> str | None:
    return token['content'] if isinstance(token, dict) else token


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding='utf-8'))
    except OSError as error:
        raise errors.UsageError(f'{path} cannot be read ({error.strerror}); give a Hugging Face folder.') from None
    except ValueError:
        raise errors.UsageError(f'{path} is not JSON.') from None


# Fields whose other values would make another model.
_ONLY = {
    'model_type': 'llama',
    'hidden_act': 'silu',
    'attention_bias': False,
    'mlp_bias': False,
    'quantization_config': None,
}


def _model_config(values: dict[str, Any], path: pathlib.Path) -> ModelConfig:
    for field, only in _ONLY.items():
        if values.get(field, None if field == 'model_type' else only) != only:
            raise errors.UsageError(f'{path}: {field} is {values.get(field)!r}; only {only!r} can be imported.')
    try:
        base, scaling = _rope(values, path)
        heads = values['num_attention_heads']
        found = ModelConfig(
            vocab_size=values['vocab_size'],
            seq_len=values.get('max_position_embeddings', 2_048),
            num_layers=values['num_hidden_layers'],
            embed_dim=values['hidden_size'],
            num_heads=heads,
            num_kv_heads=values.get('num_key_value_heads') or heads,
            head_dim=values.get('head_dim') or values['hidden_size'] // heads,
            hidden_dim=values['intermediate_size'],
            norm_eps=values.get('rms_norm_eps', 1e-6),  # Hugging Face's default, not ours
            rope_base=base,
            rope_scaling=scaling,
        )
    except KeyError as error:
        raise errors.UsageError(f'{path} has no field {error.args[0]}.') from None
    return config_lib.validated(Config(model=found)).model


def _rope(values: dict[str, Any], path: pathlib.Path) -> tuple[float, float]:
    """Base and linear scaling, from transformers 5's rope_parameters or 4's rope_theta and rope_scaling."""
    field = 'rope_parameters' if values.get('rope_parameters') else 'rope_scaling'
    rope = values.get(field) or {}
    kind = rope.get('rope_type', rope.get('type', 'default'))
    if kind not in ('default', 'linear') or rope.get('partial_rotary_factor', 1.0) != 1.0:
        raise errors.UsageError(f'{path}: {field} is {rope}; only plain and linearly scaled rotation can be imported.')
    base = rope.get('rope_theta', values.get('rope_theta', 10_000.0))
    return float(base), float(rope['factor']) if kind == 'linear' else 1.0


def export_run(folder: pathlib.Path, config: Config | None, *, step: int | None, output: str | None, **options) -> None:
    """Exports a workdir's checkpoint (the newest by default) to the new folder `output`; see `export`."""
    if not output:
        raise errors.UsageError('--output=DIR, the folder to make, is missing.')
    loaded = workdir.load(folder, config, step)
    options['add_bos'] = loaded.config.data.bos
    export(loaded.params, loaded.config.model, loaded.tokenizer_path, pathlib.Path(output), **options)
    print(f'exported step {loaded.step} to {output}')


def import_run(source: str | None, folder: pathlib.Path, config: Config | None, command: str) -> None:
    """Makes a workdir at step 0 from a Hugging Face folder; a `config` given must describe the same model.

    What the weights do not decide (seq_len, initialisation, how it is computed) is the config's.
    Says what to do where the folder has no tokenizer.model: a SentencePiece model cannot be had from a tokenizer.json.
    """
    if not source:
        raise errors.UsageError('--input=DIR, a Hugging Face Llama folder, is missing.')
    params, found = import_weights(pathlib.Path(source))
    if config is None:
        config = Config(model=found)
    ours, theirs = (workdir.weights_settings(config_lib.to_dict(shape)) for shape in (config.model, found))
    for field, (wanted, there) in tree.differences(ours, theirs, 'config.model').items():
        raise errors.UsageError(f'{field} is {wanted}, but {source} has {there}; set --{field}={there}.')
    pieces = pathlib.Path(source) / 'tokenizer.model'
    workdir.create(
        folder,
        config,
        step_lib.make_state(config, jax.device_put(params)),
        pieces if pieces.exists() else None,
        command,
    )
    print(f'imported {source} to {folder} at step 0')
    if missing := workdir.missing_tokenizer(folder):
        print(f'import: {missing}', file=sys.stderr)
