"""Variants of a run that need less memory: more recomputation, smaller micro-batches, other meshes.

What one needs, and whether it can run at all, only its compiled program tells (plan.py): here is
which ones to compile, and in which order, so that few have to be.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from tinyllama_jax import config as config_lib
from tinyllama_jax.config import Config, MeshConfig
from tinyllama_jax.settings import tree

_TENSOR = (2, 4)  # sizes of the tensor axis that are tried


def variant(config: Config, mesh: MeshConfig | None = None, **train_settings) -> Config:
    """`config` on this mesh (none: its own), with these settings of `config.train`."""
    train = dataclasses.replace(config.train, **train_settings)
    return dataclasses.replace(config, mesh=mesh or config.mesh, train=train)


def flags(old: Config, new: Config) -> str:
    """What a user adds to the command line to get from one configuration to another."""
    changes = tree.differences(config_lib.to_dict(old), config_lib.to_dict(new), 'config')
    return ' '.join(f'--{field}={value}' for field, (_, value) in changes.items())


def sizes_to_search(config: Config, shards: int) -> list[int]:
    """Micro-batches that divide what a GPU has of the batch, from half the configured one to four times it.

    If there is none among them, the largest two; none at all if the batch does not divide by the mesh's shards.
    """
    batch, size = config.train.global_batch_size, config.train.micro_batch_size
    divisors = _divisors(batch // shards) if batch % shards == 0 else []
    return [each for each in divisors if max(size // 2, 1) <= each <= 4 * size] or divisors[-2:]


def least_change(config: Config, fitting: Callable[[Config], Any]) -> Any:
    """The first of `fitting`'s answers that is not None, over changes of remat policy, then micro-batch, then mesh.

    It may be asked twice about one variant. On a mesh memory falls with the micro-batch and with recomputation: what
    recomputes everything is asked about first, and a mesh is left if even the smallest of these does not fit.
    """
    policies = list(config_lib.REMAT)  # the least recomputation first
    policies = policies[policies.index(config.train.remat) :]
    sizes = _divisors(config.train.micro_batch_size)[::-1]
    for mesh in _meshes(config.mesh):
        rows = [[variant(config, mesh, remat=policy, micro_batch_size=size) for policy in policies] for size in sizes]
        if fitting(rows[0][-1]) is not None or fitting(rows[-1][-1]) is not None:
            row = next(row for row in rows if fitting(row[-1]) is not None)
            return next(answer for each in row if (answer := fitting(each)) is not None)
    return None


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _meshes(mesh: MeshConfig) -> Iterator[MeshConfig]:
    """The mesh; all else split over every GPU; and with layers split too."""
    yield mesh
    split = MeshConfig(data=1, fsdp=-1, tensor=max(mesh.tensor, 1), zero=3)
    if split != mesh:
        yield split
    for tensor in _TENSOR:
        if tensor > split.tensor:
            yield dataclasses.replace(split, tensor=tensor)
