"""Converts parameters to Hugging Face folders and back; the only file that knows the names of their tensors.

Our weights have their input axes first ([D, N, H] for queries); Hugging Face's are matrices [out, in].
Both lay out rotary pairs alike, so nothing is permuted and a round trip is bit-equal. Tensors are
converted one at a time: a 1.1 B export needs little memory beside the parameters.
"""

import contextlib
import dataclasses
import math
import os
import pathlib
import shutil
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from eval_bridge.hf import model_config as hf_model_config
from eval_bridge.hf import tokenizer as hf_tokenizer
from eval_bridge.hf import weights
from tinyllama_jax import config as config_lib
from tinyllama_jax import errors, model
from tinyllama_jax import step as step_lib
from tinyllama_jax.config import Config, ModelConfig
from tinyllama_jax.process import signals
from tinyllama_jax.run import resume, workdir
from tinyllama_jax.tokenizer import loading

# (our path, Hugging Face's name, number of our input axes; 0: not transposed). {} is the layer.
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
_KEPT_FILES = ('config.json', 'generation_config.json')  # a run keeps those of the folder that it was imported from


@dataclasses.dataclass(frozen=True)
class _Slice:
    """The part of our parameters that one Hugging Face tensor holds: leaf `path`, its slice `layer` (None: all)."""

    path: str
    layer: int | None
    input_axes: int
    shape: tuple[int, ...]  # ours, without the axis of layers

    @property
    def hf_shape(self) -> tuple[int, ...]:
        if not self.input_axes:
            return self.shape
        return math.prod(self.shape[self.input_axes :]), math.prod(self.shape[: self.input_axes])

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        return array.reshape(self.hf_shape[::-1]).T if self.input_axes else array

    def from_hf(self, array: np.ndarray) -> np.ndarray:
        return array.T.reshape(self.shape) if self.input_axes else array


def _slices(config: ModelConfig) -> dict[str, _Slice]:
    """Returns Hugging Face's name -> our slice for every parameter, in the order of the forward pass."""
    shapes = {path: leaf.shape for path, leaf in _leaves(_abstract_params(config)).items()}
    single = {name: _Slice(path, None, axes, shapes[path]) for path, name, axes in _NAMES if '{}' not in name}
    stacked = {
        name.format(layer): _Slice(path, layer, axes, shapes[path][1:])
        for layer in range(config.num_layers)
        for path, name, axes in _NAMES
        if '{}' in name
    }
    embed, *after_layers = single.items()
    return dict([embed, *stacked.items(), *after_layers])


def _abstract_params(config: ModelConfig):
    return jax.eval_shape(lambda: model.init_params(config, jax.random.key(0)))


def _leaves(params) -> dict[str, Any]:
    paths_and_leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf for path, leaf in paths_and_leaves}


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
    imported: pathlib.Path | None = None,
) -> None:
    """Writes a folder that transformers loads offline: weights, configuration, tokenizer.

    Args:
      params: nested dict of numpy or jax arrays.
      tokenizer_path: what the run trained with: a SentencePiece model, a tokenizer.json, or a folder with one.
      output: a new or empty folder; it appears only when it is complete.
      dtype: float32 or bfloat16, of the weights.
      format: safetensors, or pytorch (pytorch_model.bin; needs torch).
      add_bos: whether a SentencePiece model's tokenizer puts BOS first, as the training data did.
      max_shard_bytes: larger models are split into files of at most this size, with an index.
      imported: the config.json and generation_config.json of the folder that the model was imported from; the ids of
        special tokens and the settings of generation are theirs.

    Raises UsageError for an output that is not empty, an unknown dtype or format, or a
    model or tokenizer that the format cannot express; RunError if writing fails.
    """
    output = pathlib.Path(output)
    for name, value, choices in (('dtype', dtype, weights.DTYPES), ('format', format, weights.FORMATS)):
        if value not in choices:
            raise errors.UsageError(f'--{name}={value} is not one of {", ".join(choices)}.')
    if model_config.embed_dim % model_config.num_heads:
        raise errors.UsageError(
            f'config.model.embed_dim: {model_config.embed_dim} is not a multiple of num_heads = '
            f'{model_config.num_heads}, which Hugging Face requires of a Llama.'
        )
    if format == 'pytorch':
        weights.require_torch('--format=pytorch')
    tokenizer = loading.load(tokenizer_path)
    if tokenizer.vocab_size > model_config.vocab_size:
        raise errors.UsageError(
            f'{tokenizer_path} has {tokenizer.vocab_size} pieces but config.model.vocab_size is '
            f'{model_config.vocab_size}; give the tokenizer that the model was trained with.'
        )
    with _new_folder(output) as folder:
        hf_tokenizer.write(folder, pathlib.Path(tokenizer_path), add_bos=add_bos, max_length=model_config.seq_len)
        ends = list(tokenizer.stop_ids)
        special = {
            'bos_token_id': _id_or_none(tokenizer.bos_id),
            'eos_token_id': ends if len(ends) > 1 else next(iter(ends), None),
        }
        kept, generation = (
            weights.read_json(imported / name) if imported and (imported / name).exists() else None
            for name in _KEPT_FILES
        )
        config_json = hf_model_config.write(model_config, dtype, imported=kept, **special)
        weights.write_json(folder / 'config.json', config_json)
        special = {name: config_json[name] for name in (*special, 'pad_token_id') if name in config_json}
        weights.write_json(folder / 'generation_config.json', generation or {**special, 'do_sample': False})
        tensors = _hf_tensors(params, model_config, dtype)
        weights.write(folder, tensors, dtype=dtype, format=format, max_shard_bytes=max_shard_bytes)


@contextlib.contextmanager
def _new_folder(output: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a folder whose files are in `output` on success, and nowhere on failure.

    A new output appears by one renaming. An empty folder that exists may be a mount point or the current one, which
    cannot be replaced: it gets the files one by one, config.json last.
    """
    exists, inside = os.path.lexists(output), output / '.partial'
    if exists and (not output.is_dir() or {*output.iterdir()} - {inside}):
        raise errors.UsageError(f'--output={output} exists and is not an empty folder; give a new one.')
    partial = inside if exists else output.with_name(f'.{output.name}.partial')
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        with signals.unfinished(partial):
            yield partial
            if exists:
                for path in sorted(partial.iterdir(), key=lambda path: path.name == 'config.json'):
                    path.rename(output / path.name)
            else:
                partial.rename(output)
    except OSError as error:
        raise errors.RunError(f'--output={output} could not be written: {error.strerror or error}.') from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _id_or_none(index: int) -> int | None:
    return None if index < 0 else index


def _hf_tensors(params: dict, config: ModelConfig, dtype: str) -> dict[str, weights.Tensor]:
    leaves = _leaves(params)

    def tensor(part: _Slice) -> weights.Tensor:
        def array() -> np.ndarray:  # called when the tensor is written, so that one is in memory at a time
            leaf = leaves[part.path]
            ours = np.asarray(leaf if part.layer is None else leaf[part.layer])
            return np.ascontiguousarray(part.to_hf(ours.astype(weights.DTYPES[dtype], copy=False)))

        return weights.Tensor(part.hf_shape, array)

    return {name: tensor(part) for name, part in _slices(config).items()}


def import_weights(folder: pathlib.Path) -> tuple[dict, ModelConfig]:
    """Returns the parameters (float32 numpy arrays) and the ModelConfig of a Llama's Hugging Face folder.

    Reads safetensors, else PyTorch's .bin files (which needs torch), whole or in
    shards, in floating dtypes of 16 bits or more. Tied embeddings become two equal
    matrices. Names may lack `model.`, as those of transformers' LlamaModel do.
    Raises UsageError naming the file, field or tensor that is missing, unreadable
    or that our model does not compute.
    """
    folder = pathlib.Path(folder)
    values = read_config(folder)
    config = hf_model_config.read(values, folder / 'config.json')
    try:
        params = jax.tree.map(lambda leaf: np.empty(leaf.shape, np.float32), _abstract_params(config))
    except MemoryError as error:
        raise errors.UsageError(
            f'{folder}/config.json describes a model too large for this machine: {error}.'
        ) from None
    leaves, slices, filled = _leaves(params), _slices(config), set()
    for name, array in weights.read(folder):
        if name.endswith(_IGNORED):
            continue
        hf_name = name if name in slices else f'model.{name}'
        part = slices.get(hf_name)
        if part is None:
            raise errors.UsageError(
                f'{folder} holds a tensor {name}, which a Llama without biases of {config.num_layers} layers does not '
                "have; save it again by transformers' save_pretrained if only the name is wrong."
            )
        if hf_name in filled:
            raise errors.UsageError(f'{folder} holds the tensor {name} twice; leave one out.')
        if array.shape != part.hf_shape:
            raise errors.UsageError(
                f'{folder}: {name} has the shape {array.shape}, but config.json makes it {part.hf_shape}.'
            )
        leaves[part.path][... if part.layer is None else part.layer] = part.from_hf(array)
        filled.add(hf_name)
    if values.get('tie_word_embeddings'):
        _tie(params, filled, folder)
    if missing := [name for name in slices if name not in filled]:
        raise errors.UsageError(f'{folder} lacks {len(missing)} tensors, {missing[0]} the first; is it complete?')
    return params, config


def _tie(params: dict, filled: set[str], folder: pathlib.Path) -> None:
    """Fills the embedding or the head from the other. Raises UsageError if the folder holds both, and they differ."""
    embed_VD, head_VD = params['embed'], params['lm_head'].T
    embed, head = 'model.embed_tokens.weight', 'lm_head.weight'
    if head not in filled:
        head_VD[...] = embed_VD
    elif embed not in filled:
        embed_VD[...] = head_VD
    elif not np.array_equal(embed_VD, head_VD, equal_nan=True):
        raise errors.UsageError(
            f'{folder}/config.json: tie_word_embeddings is true, but {embed} and {head} differ; set it to false, or '
            f'leave {head} out.'
        )
    if embed in filled or head in filled:
        filled.update((embed, head))


def read_config(folder: pathlib.Path) -> dict[str, Any]:
    """Returns the config.json of a Hugging Face folder. Raises UsageError if there is none."""
    return weights.read_json(pathlib.Path(folder) / 'config.json')


# Settings of generation that change texts and that our generation does not have, and their values that change nothing.
_UNAPPLIED = {
    **dict.fromkeys(('repetition_penalty', 'num_beams', 'encoder_repetition_penalty', 'guidance_scale'), (1, None)),
    **dict.fromkeys(('no_repeat_ngram_size', 'min_length', 'min_new_tokens'), (0, None)),
    **dict.fromkeys(('bad_words_ids', 'suppress_tokens', 'begin_suppress_tokens', 'sequence_bias'), ([], None)),
    **dict.fromkeys(('forced_bos_token_id', 'forced_eos_token_id', 'stop_strings'), (None,)),
}


def say_what_generation_leaves_out(folder: pathlib.Path) -> None:
    """Prints to stderr the settings in a folder's generation_config.json that our generation does not follow."""
    path = folder / 'generation_config.json'
    values = weights.read_json(path) if path.exists() else {}
    if found := [f'{name}={values[name]!r}' for name, same in _UNAPPLIED.items() if values.get(name) not in same]:
        print(f'{path}: texts are generated without {", ".join(found)}', file=sys.stderr)


def export_run(config: Config | None, folder: pathlib.Path, *, step: int | None, output: str | None, **options) -> None:
    """Exports a workdir's checkpoint (by default the newest) to the new folder `output`; see `export`."""
    if not output:
        raise errors.UsageError('--output=DIR, the folder to write, is missing.')
    loaded = workdir.load(folder, config, step)
    options |= {'add_bos': loaded.config.data.bos, 'imported': folder / workdir.IMPORTED}
    export(loaded.params, loaded.config.model, loaded.tokenizer_path, pathlib.Path(output), **options)
    print(f'exported step {loaded.step} to {output}')


def import_run(
    config: Config | None, folder: pathlib.Path, *, input: str | None, model: str | None = None, command: str
) -> None:
    """Makes a workdir at step 0 from the folder `input` (or `model`); a `config` given must describe the same model.

    What the weights do not decide (seq_len, initialisation, how the model is computed) comes from the config.
    If the folder has no tokenizer, says on stderr where to put one.
    """
    source = input or model
    if not source:
        raise errors.UsageError('--input=DIR, a Hugging Face Llama folder, is missing.')
    tokenizer = hf_tokenizer.find(pathlib.Path(source))
    params, imported = import_weights(pathlib.Path(source))
    say_what_generation_leaves_out(pathlib.Path(source))
    if config is None:
        config = Config(model=imported)
    ours, theirs = ({'model': config_lib.to_dict(each)} for each in (config.model, imported))
    for field, (wanted, given) in resume.changes(ours, theirs, 'weights').items():
        raise errors.UsageError(f'{field} is {wanted}, but {source} has {given}; set --{field}={given}.')
    files = [path for name in _KEPT_FILES if (path := pathlib.Path(source) / name).exists()]
    values, *_ = [weights.read_json(path) for path in files]
    workdir.create(
        folder,
        config,
        step_lib.make_state(config, jax.device_put(params)),
        None if tokenizer is None else pathlib.Path(source),
        command,
        imported=files,
    )
    if tokenizer is not None:
        hf_tokenizer.keep_model(pathlib.Path(source), folder, tokenizer)
    print(f'imported {source} to {folder} at step 0')
    if lost := hf_model_config.lost(values, imported):
        print(f"import: an export of {folder} will not have config.json's {', '.join(lost)}", file=sys.stderr)
    if missing := workdir.missing_tokenizer(folder):
        print(f'import: {missing}', file=sys.stderr)
