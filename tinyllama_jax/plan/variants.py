"""Variants of a run that need less memory: more recomputation, smaller micro-batches, other meshes.

Only a compiled program shows how much memory a variant needs and whether it runs at all. This file chooses which
variants are compiled, and in which order, so that they are few.
"""

import dataclasses
from collections.abc import Callable, Iterator

from tinyllama_jax import config as config_lib
from tinyllama_jax.config import Config, MeshConfig
from tinyllama_jax.settings import tree

_TENSOR = (2, 4)  # sizes of the tensor axis that are tried


def variant(config: Config, mesh: MeshConfig | None = None, **train_settings) -> Config:
    """Returns `config` with other settings of `config.train`, on another mesh if one is given."""
    train = dataclasses.replace(config.train, **train_settings)
    return dataclasses.replace(config, mesh=mesh or config.mesh, train=train)


def flags(old: Config, new: Config) -> str:
    """Returns the flags that turn one configuration into another."""
    changes = tree.differences(config_lib.to_dict(old), config_lib.to_dict(new), 'config')
    return ' '.join(f'--{field}={value}' for field, (_, value) in changes.items())


def sizes_to_search(config: Config, shards: int) -> list[int]:
    """Returns the micro-batches that divide a GPU's share of the batch, from half to four times the configured one.

    If there are none, returns the two largest that divide; none if the batch is not a multiple of `shards`.
    """
    batch, size = config.train.global_batch_size, config.train.micro_batch_size
    divisors = _divisors(batch // shards) if batch % shards == 0 else []
    return [each for each in divisors if max(size // 2, 1) <= each <= 4 * size] or divisors[-2:]


def least_change(config: Config, fits: Callable[[Config], bool]) -> Config | None:
    """Returns the variant that `fits` with the least change; None if none does. May ask `fits` twice about a variant.

    It keeps the configured mesh if anything fits there, then the largest micro-batch, then the least recomputation.
    Both save memory, so nothing fits on a mesh if the smallest micro-batch with most recomputation does not.
    """
    policies = list(config_lib.REMAT)  # the least recomputation first
    policies = policies[policies.index(config.train.remat) :]
    sizes = _divisors(config.train.micro_batch_size)[::-1]
    for mesh in _meshes(config.mesh):
        most_recomputed = [variant(config, mesh, remat=policies[-1], micro_batch_size=size) for size in sizes]
        # If the largest micro-batch does not fit, the smallest shows whether any does.
        if fits(most_recomputed[0]) or fits(most_recomputed[-1]):
            largest = next(each for each in most_recomputed if fits(each))
            candidates = [variant(largest, remat=policy) for policy in policies]
            return next(each for each in candidates if fits(each))
    return None


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _meshes(mesh: MeshConfig) -> Iterator[MeshConfig]:
    """Yields the mesh, then one that splits everything over all GPUs, then those that split layers (tensor) too."""
    yield mesh
    split = MeshConfig(data=1, fsdp=-1, tensor=max(mesh.tensor, 1), zero=3)
    if split != mesh:
        yield split
    for tensor in _TENSOR:
        if tensor > split.tensor:
            yield dataclasses.replace(split, tensor=tensor)
