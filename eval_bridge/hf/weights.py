"""Reads and writes the files of a Hugging Face folder: named tensors and JSON.

Tensors are in safetensors or PyTorch's .bin files, whole or in shards. They are read and
written one at a time; writing safetensors needs the memory of one tensor. This file knows
file formats, not models.
"""

import dataclasses
import json
import math
import pathlib
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from tinyllama_jax import errors

DTYPES = {'float32': np.dtype(np.float32), 'bfloat16': np.dtype(ml_dtypes.bfloat16)}
MAX_SHARD_BYTES = 5 * 10**9
_STEMS = {'safetensors': ('model', '.safetensors'), 'pytorch': ('pytorch_model', '.bin')}
FORMATS = tuple(_STEMS)
_CODES = {'float32': 'F32', 'bfloat16': 'BF16'}  # safetensors' names
_READ = {'F64': 'float64', 'F32': 'float32', 'F16': 'float16', 'BF16': 'bfloat16'}  # and torch's


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor to write: its shape, and a function that returns the contiguous array."""

    shape: tuple[int, ...]
    array: Callable[[], np.ndarray]


def require_torch(what: str):
    """Returns the torch module. Raises UsageError, saying that `what` needs torch, if it is not installed."""
    try:
        import torch
    except ImportError:
        raise errors.UsageError(f'{what} needs torch, which is not installed here; use safetensors.') from None
    return torch


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Returns the object in a JSON file. Raises UsageError if it cannot be read, or is no object."""
    try:
        values = json.loads(path.read_text(encoding='utf-8'))
    except OSError as error:
        raise errors.UsageError(f'{path} cannot be read ({error.strerror}); give a Hugging Face folder.') from None
    except ValueError:
        raise errors.UsageError(f'{path} is not valid JSON.') from None
    if not isinstance(values, dict):
        raise errors.UsageError(f'{path} holds a {type(values).__name__}, not a JSON object; give another file.')
    return values


def write_json(path: pathlib.Path, values: dict[str, Any]) -> None:
    """Writes `values` as indented JSON."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')


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
        write_json(folder / f'{stem}{suffix}.index.json', index)
    write_file = {'safetensors': _write_safetensors, 'pytorch': _write_pytorch}[format]
    for file, names in zip(files, shards, strict=True):
        write_file(folder / file, {name: tensors[name] for name in names}, dtype)


def _split(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Splits the names, in order, into lists of at most `limit` bytes; a larger tensor has a list of its own."""
    shards, room = [], -1
    for name, size in sizes.items():
        if size > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    return shards


def _write_safetensors(path: pathlib.Path, tensors: dict[str, Tensor], dtype: str) -> None:
    """Streams the format: the header's length, the header in JSON, the arrays."""
    header: dict[str, dict[str, Any]] = {'__metadata__': {'format': 'pt'}}
    offset = 0
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
    bits = {'float32': np.float32, 'bfloat16': np.int16}[dtype]  # torch does not know ml_dtypes' bfloat16
    state = {
        name: torch.from_numpy(np.require(tensor.array(), requirements='W').view(bits)).view(getattr(torch, dtype))
        for name, tensor in tensors.items()
    }
    try:
        torch.save(state, path)
    except RuntimeError as error:  # how torch reports a failed write
        raise OSError(errors.first_line(error)) from error


def read(folder: pathlib.Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (name, array) of every tensor in a folder's safetensors files, else its .bin files.

    Raises UsageError naming the file that is missing or unreadable, or the tensor that is not of a floating dtype.
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
        files = [folder / pathlib.Path(name).name for name in sorted(set(read_json(index)['weight_map'].values()))]
    except (AttributeError, KeyError, TypeError):
        raise errors.UsageError(f'{index} is not an index of weights: it has no weight_map of file names.') from None
    for file in files:
        if not file.exists():
            raise errors.UsageError(f'{index} names {file.name}, which is not there; is the folder complete?')
    return files


def _read_safetensors(path: pathlib.Path) -> Iterator[tuple[str, np.ndarray]]:
    try:
        with safetensors.safe_open(path, framework='np') as file:
            for name in file.keys():  # noqa: SIM118 - the file object is not a mapping
                dtype = file.get_slice(name).get_dtype()
                if dtype not in _READ:
                    raise _wrong_dtype(path, name, dtype)
                yield name, file.get_tensor(name)
    except (safetensors.SafetensorError, OSError) as error:
        raise errors.UsageError(f'{path} cannot be read ({error}); is it complete?') from None


def _wrong_dtype(path: pathlib.Path, name: str, dtype: str) -> errors.UsageError:
    return errors.UsageError(f'{path}: {name} is of {dtype}; only {", ".join(_READ)} can be read.')


def _read_pytorch(path: pathlib.Path) -> Iterator[tuple[str, np.ndarray]]:
    torch = require_torch(f'{path}')
    try:
        tensors = torch.load(path, map_location='cpu', weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch raises many kinds, pickle's errors too
        reason = errors.first_line(error)
        raise errors.UsageError(f'{path} cannot be read as weights alone ({reason}).') from None
    for name, tensor in tensors.items() if isinstance(tensors, dict) else [('its content', tensors)]:
        if not (isinstance(name, str) and isinstance(tensor, torch.Tensor) and isinstance(tensors, dict)):
            raise errors.UsageError(
                f'{path}: {name} is of type {type(tensor).__name__}; give a file of nothing but named tensors, as '
                'torch.save(model.state_dict(), ...) writes it.'
            )
        plain = tensor.layout is torch.strided and not tensor.is_meta
        dtype = str(tensor.dtype if plain else f'{tensor.device.type}, {tensor.layout}').removeprefix('torch.')
        if dtype not in _READ.values():
            raise _wrong_dtype(path, name, dtype)
        yield name, tensor.detach().float().numpy()
