"""Which variants of a run are tried, and in which order; what fits is played by a rule, which plan_test compiles."""

import dataclasses

import pytest

from tests.support import tiny
from tinyllama_jax.config import Config, MeshConfig
from tinyllama_jax.plan import variants
from tinyllama_jax.settings import experiment


def _config(mesh: MeshConfig = MeshConfig(), *, batch: int = 1_024, size: int = 8, remat: str = 'none') -> Config:  # noqa: B008
    train = dataclasses.replace(tiny.CONFIG.train, global_batch_size=batch, micro_batch_size=size, remat=remat)
    return dataclasses.replace(tiny.CONFIG, mesh=mesh, train=train)


def _least(config: Config, fits) -> tuple[Config | None, int]:
    """The least change with which a rule of (mesh, train) is met, and how many different variants were looked at."""
    asked = set()

    def fitting(each: Config) -> Config | None:
        asked.add((each.mesh, each.train))
        return each if fits(each.mesh, each.train) else None

    return variants.least_change(config, fitting), len(asked)


def test_recomputation_comes_first_and_as_little_of_it_as_will_do():
    found, asked = _least(_config(), lambda _, train: train.remat in ('attention', 'full'))
    assert found == _config(remat='attention')
    assert variants.flags(_config(), found) == '--config.train.remat=attention'
    assert asked <= 5


@pytest.mark.parametrize(('size', 'wanted'), [(27, 9), (8, 4), (10, 10), (7, 1)])
def test_then_micro_batches_of_which_each_divides_the_former_largest_first(size, wanted):
    config = _config(batch=1_890, size=size, remat='full')
    found, _ = _least(config, lambda _, train: train.micro_batch_size <= wanted)
    assert found == variants.variant(config, micro_batch_size=wanted)


def test_then_all_is_split_over_every_gpu():
    copies = _config(MeshConfig(data=-1, fsdp=1, zero=1), remat='full')
    found, asked = _least(copies, lambda mesh, _: mesh.fsdp == -1 and mesh.zero == 3)
    assert found == dataclasses.replace(copies, mesh=MeshConfig())
    flags = '--config.mesh.data=1 --config.mesh.fsdp=-1 --config.mesh.zero=3'
    assert variants.flags(copies, found) == flags
    typed = copies
    for flag in flags.split():
        typed = experiment.override(typed, *flag.removeprefix('--config.').split('='))
    assert typed == found
    assert asked <= 6


def test_then_layers_are_split_too():
    found, _ = _least(_config(remat='full'), lambda mesh, _: mesh.tensor == 4)
    assert found.mesh == MeshConfig(tensor=4)


def test_where_nothing_fits_each_mesh_s_largest_and_smallest_are_looked_at():
    assert _least(_config(), lambda *_: False) == (None, 6)


@pytest.mark.parametrize(
    ('batch', 'shards', 'size', 'wanted'),
    [
        (1_024, 16, 8, [4, 8, 16, 32]),
        (1_024, 512, 8, [1, 2]),
        (96, 8, 4, [2, 3, 4, 6, 12]),
        (1, 1, 1, [1]),
        (27, 1, 27, [27]),
        (100, 8, 4, []),
    ],
)
def test_a_search_goes_over_what_divides_a_gpu_s_batch(batch, shards, size, wanted):
    assert variants.sizes_to_search(_config(batch=batch, size=size), shards) == wanted
