"""Variants of a run that need less memory: more recomputation, smaller micro-batches, other meshes.

Only a compiled program shows how much memory a variant needs and whether it runs at all. This file chooses which
variants are compiled, and in which order, so that they are few.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

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


def least_change(config: Config, fitting: Callable[[Config], Any]) -> Any:
    """Returns the first answer of `fitting` that is not None, over changes of remat policy, micro-batch, then mesh.

    On a mesh memory falls with the micro-batch and with recomputation: the largest and the smallest micro-batch are
    tried with most recomputation first, and a mesh is skipped if neither fits. May call `fitting` twice on a variant.
    """
    policies = list(config_lib.REMAT)  # the least recomputation first
    policies = policies[policies.index(config.train.remat) :]
    sizes = _divisors(config.train.micro_batch_size)[::-1]
    for mesh in _meshes(config.mesh):
        grid = [[variant(config, mesh, remat=policy, micro_batch_size=size) for policy in policies] for size in sizes]
        if fitting(grid[0][-1]) is not None or fitting(grid[-1][-1]) is not None:
            row = next(row for row in grid if fitting(row[-1]) is not None)
            return next(answer for each in row if (answer := fitting(each)) is not None)
    return None


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _meshes(mesh: MeshConfig) -> Iterator[MeshConfig]:
    """Yields the mesh; a mesh that splits everything over all GPUs; meshes that split layers (tensor) too."""
    yield mesh
    split = MeshConfig(data=1, fsdp=-1, tensor=max(mesh.tensor, 1), zero=3)
    if split != mesh:
        yield split
    for tensor in _TENSOR:
        if tensor > split.tensor:
            yield dataclasses.replace(split, tensor=tensor)
