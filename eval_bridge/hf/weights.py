"""Named tensors in the files Hugging Face keeps them in: safetensors or PyTorch's .bin, whole or in shards.

Tensors are read and written one at a time; writing safetensors needs the memory of
one tensor. Knows file formats, not models.
"""

import dataclasses
import json
import math
import pathlib
import zipfile
from collections.abc import Callable, Iterator

import ml_dtypes
import numpy as np
import safetensors

from tinyllama_jax import errors

DTYPES = {'float32': np.dtype(np.float32), 'bfloat16': np.dtype(ml_dtypes.bfloat16)}
MAX_SHARD_BYTES = 5 * 10**9
_STEMS = {'safetensors': ('model', '.safetensors'), 'pytorch': ('pytorch_model', '.bin')}
FORMATS = tuple(_STEMS)
_CODES = {'float32': 'F32', 'bfloat16': 'BF16'}  # safetensors' names


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor to write: its shape, and a function that makes the contiguous array."""

    shape: tuple[int, ...]
    array: Callable[[], np.ndarray]


def require_torch(what: str):
    """The torch module; raises UsageError saying that `what` needs it where it is not installed."""
    try:
        import torch
    except ImportError:
        raise errors.UsageError(f'{what} needs torch, which is not installed here; use safetensors.') from None
    return torch


def write(
    folder: pathlib.Path, tensors: dict[str, Tensor], *, dtype: str, format: str, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Writes arrays of `dtype` into one file, or into shards of at most `max_shard_bytes` with an index."""
    sizes = {name: math.prod(tensor.shape) * DTYPES[dtype].itemsize for name, tensor in tensors.items()}
    shards = _split(sizes, max_shard_bytes)
    stem, suffix = _STEMS[format]
    files = [f'{stem}-{index:05d}-of-{len(shards):05d}{suffix}' for index in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = [stem + suffix]
    else:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {'metadata': {'total_size': sum(sizes.values())}, 'weight_map': weight_map}
        (folder / f'{stem}{suffix}.index.json').write_text(json.dumps(index, indent=2) + '\n')
    write_file = {'safetensors': _write_safetensors, 'pytorch': _write_pytorch}[format]
    for file, names in zip(files, shards, strict=True):
        write_file(folder / file, {name: tensors[name] for name in names}, dtype)


def _split(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Names in order, in runs of at most `limit` bytes (or of one name)."""
    shards, room = [], -1
    for name, size in sizes.items():
        if size > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    return shards


def _write_safetensors(path: pathlib.Path, tensors: dict[str, Tensor], dtype: str) -> None:
    """The format as a stream: the header's length, the header in JSON, the arrays."""
    header, offset = {'__metadata__': {'format': 'pt'}}, 0
    for name, tensor in tensors.items():
        end = offset + math.prod(tensor.shape) * DTYPES[dtype].itemsize
        header[name] = {'dtype': _CODES[dtype], 'shape': tensor.shape, 'data_offsets': [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b' ' * (-len(text) % 8)
    with path.open('wb') as file:
        file.write(len(text).to_bytes(8, 'little') + text)
        for tensor in tensors.values():
            file.write(tensor.array().view(np.uint8).data)


def _write_pytorch(path: pathlib.Path, tensors: dict[str, Tensor], dtype: str) -> None:
    torch = require_torch('--format=pytorch')
    bits = {'float32': np.float32, 'bfloat16': np.int16}[dtype]  # torch does not know numpy's bfloat16
    state = {
        name: torch.from_numpy(np.require(tensor.array(), requirements='W').view(bits)).view(getattr(torch, dtype))
        for name, tensor in tensors.items()
    }
    try:
        torch.save(state, path)
    except RuntimeError as error:  # how torch reports a failed write
        raise OSError(errors.first_line(error)) from error


def read(folder: pathlib.Path) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) of every tensor in a folder's safetensors, else .bin files.

    Raises UsageError naming the file that is missing or unreadable.
    """
    for format, read_file in (('safetensors', _read_safetensors), ('pytorch', _read_pytorch)):
        files = _files(folder, format)
        for file in files:
            yield from read_file(file)
        if files:
            return
    raise errors.UsageError(f'{folder} holds neither model.safetensors nor pytorch_model.bin, whole or in shards.')


def _files(folder: pathlib.Path, format: str) -> list[pathlib.Path]:
    stem, suffix = _STEMS[format]
    whole, index = folder / (stem + suffix), folder / f'{stem}{suffix}.index.json'
    if whole.exists():
        return [whole]
    if not index.exists():
        return []
    try:
        names = set(json.loads(index.read_text())['weight_map'].values())
    except (ValueError, KeyError):
        raise errors.UsageError(f'{index} is no index of weights.') from None
    files = [folder / pathlib.Path(name).name for name in sorted(names)]
    for file in files:
        if not file.exists():
            raise errors.UsageError(f'{index} names {file.name}, which is not there; is the folder complete?')
    return files


def _read_safetensors(path: pathlib.Path) -> Iterator[tuple[str, np.ndarray]]:
    try:
        with safetensors.safe_open(path, framework='np') as file:
            for name in file.keys():  # noqa: SIM118 - the file object is no mapping
                yield name, file.get_tensor(name)
    except safetensors.SafetensorError as error:
        raise errors.UsageError(f'{path} cannot be read ({error}); is it complete?') from None


def _read_pytorch(path: pathlib.Path) -> Iterator[tuple[str, np.ndarray]]:
    torch = require_torch(f'{path}')
    try:
        tensors = torch.load(path, map_location='cpu', weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch raises many kinds, pickle's among them
        reason = errors.first_line(error)
        raise errors.UsageError(f'{path} cannot be read as weights alone ({reason}).') from None
    for name, tensor in tensors.items():
        yield name, tensor.float().numpy()
