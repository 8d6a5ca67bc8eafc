"""Models to evaluate: a run's checkpoint, a Llama's folder, or any model that transformers knows.

What is opened comes with its identity: hashes of weights and tokenizer, and how it is computed.
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
from lm_eval.api.model import LM

from eval_bridge import lm
from eval_bridge.hf import convert
from eval_bridge.protocols import Protocol
from tinyllama_jax import errors, sharding, tokenizer
from tinyllama_jax.config import Config, MeshConfig, ModelConfig
from tinyllama_jax.run import workdir

BACKENDS = ('jax', 'hf')
_BATCH_SIZE = 8
_WEIGHTS = ('*.safetensors', '*.bin')
_TOKENIZERS = ('tokenizer.model', 'tokenizer.json', 'vocab.json', 'merges.txt')


@dataclasses.dataclass(frozen=True)
class Opened:
    """A model for lm-eval, and what tells it from every other: plain values, stamped into its results."""

    model: LM
    identity: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Run:
    """The checkpoint of a workdir at `step`, the newest by default; a `config` given must not contradict it."""

    folder: pathlib.Path
    step: int | None = None
    config: Config | None = None

    def check(self, *, compared: bool = False) -> None:
        """Makes sure, before another is evaluated, that there is a run. Raises UsageError where not."""
        del compared  # a run is a Llama
        workdir.read_config(self.folder)

    @contextlib.contextmanager
    def opened(self, protocol: Protocol, backend: str | None = None) -> Iterator[Opened]:
        """The model in JAX, or of an export of it by transformers (`backend` hf). Raises UsageError as workdir.load."""
        loaded = workdir.load(self.folder, self.config, self.step)
        pieces, bos = tokenizer.Tokenizer(loaded.tokenizer_path), loaded.config.data.bos
        identity = {'step': loaded.step, 'weights_sha256': _hash_of_arrays(loaded.params)}
        if backend != 'hf':
            model = _in_jax(loaded.params, loaded.config.model, pieces, protocol, 'float32', bos)
            yield _described(model, identity, 'jax', pieces.sha256)
            return
        with tempfile.TemporaryDirectory() as folder:
            exported = pathlib.Path(folder) / 'export'
            convert.export(loaded.params, loaded.config.model, loaded.tokenizer_path, exported, add_bos=bos)
            yield _described(_in_transformers(exported, protocol), identity, 'hf', pieces.sha256)


@dataclasses.dataclass(frozen=True)
class Folder:
    """A Hugging Face folder."""

    folder: pathlib.Path

    def check(self, *, compared: bool = False) -> None:
        """Makes sure, before another is evaluated, that there is a model, one of ours if it is to be compared.

        Raises UsageError where not.
        """
        kind = convert.read_config(self.folder).get('model_type')
        if compared and kind != 'llama':
            raise errors.UsageError(
                f"--parity compares our model with transformers' on the same weights, and {self.folder} is no Llama: "
                f'its model_type is {kind!r}.'
            )

    @contextlib.contextmanager
    def opened(self, protocol: Protocol, backend: str | None = None) -> Iterator[Opened]:
        """By default a Llama in JAX, and other architectures with transformers. Raises UsageError for a bad folder."""
        config = convert.read_config(self.folder)
        identity = {'model': self.folder.name, 'weights_sha256': _hash_of_files(self.folder, _WEIGHTS)}
        if backend == 'hf' or (backend is None and config.get('model_type') != 'llama'):
            pieces = _hash_of_files(self.folder, _TOKENIZERS)
            yield _described(_in_transformers(self.folder, protocol), identity, 'hf', pieces)
            return
        params, shape = convert.import_weights(self.folder)
        tokens = convert.load_tokenizer(self.folder)
        stored = str(config.get('dtype') or config.get('torch_dtype') or 'float32')
        model = _in_jax(params, shape, tokens, protocol, stored, convert.adds_bos(self.folder))
        yield _described(model, identity, 'jax', tokens.sha256)


def _in_jax(params, shape, pieces, protocol: Protocol, stored: str, bos: bool) -> lm.JaxLM:
    _refuse_tokenizer(pieces.path, pieces.vocab_size, shape.vocab_size)
    dtype = protocol.dtype if protocol.dtype != 'auto' else 'bfloat16' if stored == 'bfloat16' else 'float32'
    add_bos = bos if protocol.add_bos is None else protocol.add_bos
    return lm.JaxLM(
        params, shape, pieces, batch_size=_BATCH_SIZE, add_bos=add_bos and pieces.bos_id >= 0, mesh=_mesh(shape),
        dtype=dtype,
    )  # fmt: skip


def _mesh(shape: ModelConfig) -> Mesh | None:
    """All devices: rows are divided among them, and weights where their width can be; None for one device."""
    if jax.device_count() == 1:
        return None
    divided = shape.embed_dim % jax.device_count() == 0
    return sharding.make_mesh(MeshConfig() if divided else MeshConfig(data=-1, fsdp=1))


def _in_transformers(folder: pathlib.Path, protocol: Protocol) -> LM:
    try:
        import torch
        import transformers
        from lm_eval.models import huggingface
    except ImportError as error:
        raise errors.UsageError(
            f'{folder} is evaluated with transformers, for which {error.name} is missing; '
            'pip install -r requirements.txt.'
        ) from None
    try:
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=protocol.dtype,
            output_loading_info=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # which names them; they are refused below
        )
    except Exception as error:  # of safetensors and tokenizers too, which raise bare Exception
        raise errors.UsageError(f'{folder} cannot be opened by transformers: {errors.first_line(error)}') from None
    for kind in ('missing_keys', 'mismatched_keys'):  # transformers would make numbers up for them
        for name in sorted(key if isinstance(key, str) else key[0] for key in found[kind]):
            raise errors.UsageError(f'{folder}: the weights have no {name} of the shape that config.json makes it.')
    model.to('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        opened = huggingface.HFLM(
            pretrained=model, tokenizer=str(folder), backend='causal', add_bos_token=protocol.add_bos,
            batch_size=_BATCH_SIZE,
        )  # fmt: skip
    except (OSError, ValueError) as error:
        raise errors.UsageError(
            f'{folder} has no tokenizer that transformers opens: {errors.first_line(error)}'
        ) from None
    _refuse_tokenizer(folder, len(opened.tokenizer), model.get_input_embeddings().num_embeddings)
    return opened


def _refuse_tokenizer(path: pathlib.Path, pieces: int, known: int) -> None:
    """Raises UsageError for a tokenizer with more pieces than the model; it may have fewer, where rows are padded."""
    if pieces > known:
        raise errors.UsageError(
            f'{path} has {pieces} pieces, but the model knows {known}; it is not the tokenizer that the model was '
            'trained with.'
        )


def _described(model: LM, identity: dict[str, Any], backend: str, tokenizer_sha256: str) -> Opened:
    if backend == 'jax':
        dtype, add_bos = model.dtype, model.add_bos
    else:
        dtype, add_bos = str(model.model.dtype).removeprefix('torch.'), model.add_bos_token
    return Opened(
        model,
        {
            **identity, 'backend': backend, 'dtype': dtype, 'add_bos': add_bos, 'max_length': model.max_length,
            'tokenizer_sha256': tokenizer_sha256,
        },
    )  # fmt: skip


def _hash_of_arrays(tree) -> str:
    """SHA-256 of every leaf's path, dtype, shape and bytes."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf)
        digest.update(json.dumps([jax.tree_util.keystr(path), str(array.dtype), array.shape]).encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()


def _hash_of_files(folder: pathlib.Path, patterns: tuple[str, ...]) -> str:
    """SHA-256 of the names and contents of a folder's files."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in patterns for path in folder.glob(pattern)):
        with path.open('rb') as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, 'sha256').digest())
    return digest.hexdigest()
