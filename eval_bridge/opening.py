"""Opens the model to evaluate: a run's checkpoint, a Llama's folder, or any model that transformers knows.

Each comes with its identity: hashes of weights and tokenizer, and how it is computed.
"""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from lm_eval.api.model import TemplateLM

from eval_bridge import lm
from eval_bridge.hf import convert
from eval_bridge.protocols import Protocol
from tinyllama_jax import errors, sharding
from tinyllama_jax.config import Config, MeshConfig, ModelConfig
from tinyllama_jax.run import workdir
from tinyllama_jax.tokenizer import loading

_BATCH_SIZE = 8
_WEIGHTS = ('*.safetensors', '*.bin')
_SETTINGS = ('*token*', 'tokenizer/*', f'{workdir.IMPORTED}/*')  # of a run, beside its configuration
_TOKENIZERS = ('*token*.json', 'tokenizer.model', 'vocab.json', 'merges.txt')


@dataclasses.dataclass(frozen=True)
class Opened:
    """A model for lm-eval, and its identity: JSON values that tell it from other models, stamped into its results."""

    model: TemplateLM
    identity: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Run:
    """The checkpoint of a workdir at `step` (by default the newest); a `config` given must not contradict it."""

    folder: pathlib.Path
    step: int | None = None
    config: Config | None = None

    def check_model(self, *, for_parity: bool = False) -> None:
        """Raises UsageError if there is no run; meant to be called before any model is evaluated."""
        del for_parity  # a run is always a Llama
        workdir.read_config(self.folder)

    @contextlib.contextmanager
    def open(self, protocol: Protocol, backend: str | None = None) -> Iterator[Opened]:
        """Opens the model in JAX, or an export of it in transformers (`backend` hf). Raises as workdir.load does."""
        loaded = workdir.load(self.folder, self.config, self.step)
        bos = loaded.config.data.bos
        tokenizer = workdir.load_tokenizer(self.folder, loaded.config, loaded.tokenizer_path)
        identity = {'step': loaded.step, 'weights_sha256': _hash_of_arrays(loaded.params)}
        settings = json.dumps([dataclasses.asdict(loaded.config.model), bos, _hash_of_files(self.folder, _SETTINGS)])
        identity['settings_sha256'] = hashlib.sha256(settings.encode()).hexdigest()
        if backend != 'hf':
            yield _open_in_jax(loaded.params, loaded.config.model, tokenizer, protocol, 'float32', identity)
            return
        with tempfile.TemporaryDirectory() as folder:
            exported = pathlib.Path(folder) / 'export'
            options = {'add_bos': bos, 'imported': self.folder / workdir.IMPORTED}
            convert.export(loaded.params, loaded.config.model, loaded.tokenizer_path, exported, **options)
            yield _open_in_transformers(exported, protocol, identity, tokenizer.sha256)


@dataclasses.dataclass(frozen=True)
class Folder:
    """The model in a Hugging Face folder."""

    folder: pathlib.Path

    def check_model(self, *, for_parity: bool = False) -> None:
        """Raises UsageError if there is no model, or, `for_parity`, if it is not a Llama: JAX runs no other."""
        model_type = convert.read_config(self.folder).get('model_type')
        if for_parity and model_type != 'llama':
            raise errors.UsageError(
                f"--parity compares our model with transformers' on the same weights, and {self.folder} is not a "
                f'Llama: its model_type is {model_type!r}.'
            )

    @contextlib.contextmanager
    def open(self, protocol: Protocol, backend: str | None = None) -> Iterator[Opened]:
        """Opens a Llama in JAX, another architecture in transformers. Raises UsageError for a bad folder."""
        config = convert.read_config(self.folder)
        identity = {'model': self.folder.name, 'weights_sha256': _hash_of_files(self.folder, _WEIGHTS)}
        identity['settings_sha256'] = _hash_of_files(self.folder, ('*.json',))
        if backend == 'hf' or (backend is None and config.get('model_type') != 'llama'):
            yield _open_in_transformers(self.folder, protocol, identity, _hash_of_files(self.folder, _TOKENIZERS))
            return
        convert.say_what_generation_leaves_out(self.folder)
        params, model_config = convert.import_weights(self.folder)
        tokenizer = loading.load(self.folder)
        stored = str(config.get('dtype') or config.get('torch_dtype') or 'float32')
        yield _open_in_jax(params, model_config, tokenizer, protocol, stored, identity)


def _open_in_jax(params, model_config: ModelConfig, tokenizer, protocol, stored: str, identity) -> Opened:
    """Opens a Llama. `stored`: its weights' dtype as stored."""
    _refuse_large_tokenizer(tokenizer.path, tokenizer.vocab_size, model_config.vocab_size)
    if max(tokenizer.bos_id, tokenizer.eos_id) < 0:
        raise errors.UsageError(
            f'{tokenizer.path} has neither BOS nor EOS, one of which begins a text without a context; name them in its '
            'tokenizer_config.json (bos_token, eos_token).'
        )
    dtype = protocol.dtype if protocol.dtype != 'auto' else 'bfloat16' if stored == 'bfloat16' else 'float32'
    model = lm.JaxLM(
        params,
        model_config,
        tokenizer,
        batch_size=_BATCH_SIZE,
        add_bos=bool(tokenizer.encode('', special=True)) if protocol.add_bos is None else protocol.add_bos,
        mesh=_mesh(model_config),
        dtype=dtype,
    )
    computed = {'backend': 'jax', 'dtype': dtype, 'add_bos': model.add_bos, 'max_length': model.max_length}
    return Opened(model, {**identity, **computed, 'tokenizer_sha256': tokenizer.sha256})


def _mesh(config: ModelConfig) -> Mesh | None:
    """Returns a mesh of all devices (None for one), which shards weights if the device count divides their width."""
    if jax.device_count() == 1:
        return None
    divided = config.embed_dim % jax.device_count() == 0
    return sharding.make_mesh(MeshConfig() if divided else MeshConfig(data=-1, fsdp=1))


def _open_in_transformers(folder: pathlib.Path, protocol: Protocol, identity, tokenizer_sha256: str) -> Opened:
    try:
        import torch
        import transformers
        from lm_eval.models import huggingface
    except ImportError as error:
        raise errors.UsageError(
            f'{folder} is evaluated with transformers, which needs {error.name}; install requirements-dev.txt on '
            'Python 3.11.'
        ) from None
    try:
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=protocol.dtype,
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # the report names them; they are refused below
        )
    except Exception as error:  # safetensors and tokenizers raise bare Exception
        raise errors.UsageError(f'{folder} cannot be opened by transformers: {errors.first_line(error)}') from None
    for kind in ('missing_keys', 'mismatched_keys'):  # transformers would initialise these at random
        for name in sorted(key if isinstance(key, str) else key[0] for key in report[kind]):
            raise errors.UsageError(f'{folder}: the weights have no {name} of the shape that config.json gives it.')
    model.to('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        hf_lm = huggingface.HFLM(
            pretrained=model,
            tokenizer=str(folder),
            backend='causal',
            add_bos_token=protocol.add_bos,
            batch_size=_BATCH_SIZE,
        )
    except (OSError, ValueError) as error:
        raise errors.UsageError(
            f'{folder} has no tokenizer that transformers opens: {errors.first_line(error)}'
        ) from None
    assert hf_lm.tokenizer is not None  # its type allows None, for models without text
    _refuse_large_tokenizer(
        folder, max(hf_lm.tokenizer.get_vocab().values()) + 1, model.get_input_embeddings().num_embeddings
    )
    dtype = str(model.dtype).removeprefix('torch.')
    computed = {'backend': 'hf', 'dtype': dtype, 'add_bos': hf_lm.add_bos_token, 'max_length': hf_lm.max_length}
    return Opened(hf_lm, {**identity, **computed, 'tokenizer_sha256': tokenizer_sha256})


def _refuse_large_tokenizer(path: pathlib.Path, pieces: int, vocab_size: int) -> None:
    """Raises UsageError for a tokenizer with more pieces than the model; fewer are fine, the rest is padding."""
    if pieces > vocab_size:
        raise errors.UsageError(
            f'{path} has {pieces} pieces, but the model knows {vocab_size}; it is not the tokenizer that the model '
            'was trained with.'
        )


def _hash_of_arrays(tree) -> str:
    """Returns the SHA-256 of every leaf's path, dtype, shape and bytes."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf)
        digest.update(json.dumps([jax.tree_util.keystr(path), str(array.dtype), array.shape]).encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()


def _hash_of_files(folder: pathlib.Path, patterns: tuple[str, ...]) -> str:
    """Returns the SHA-256 of the names and contents of a folder's files."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in patterns for path in folder.glob(pattern) if path.is_file()):
        with path.open('rb') as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, 'sha256').digest())
    return digest.hexdigest()
