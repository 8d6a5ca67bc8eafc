"""Which variants of a run are tried, and in which order. A rule says what fits; command_test compiles it."""

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
    """Returns the least change that meets the rule fits(mesh, train), and how many different variants were tried."""
    tried = set()

    def counted(each: Config) -> bool:
        tried.add((each.mesh, each.train))
        return fits(each.mesh, each.train)

    return variants.least_change(config, counted), len(tried)


def test_recomputation_comes_first_and_as_little_of_it_as_will_do():
    changed, tried = _least(_config(), lambda _, train: train.remat in ('attention', 'full'))
    assert changed == _config(remat='attention')
    assert variants.flags(_config(), changed) == '--config.train.remat=attention'
    assert tried <= 5


@pytest.mark.parametrize(('size', 'wanted'), [(27, 9), (8, 4), (10, 10), (7, 1)])
def test_then_smaller_micro_batches_that_divide_the_configured_one_the_largest_first(size, wanted):
    config = _config(batch=1_890, size=size, remat='full')
    changed, _ = _least(config, lambda _, train: train.micro_batch_size <= wanted)
    assert changed == variants.variant(config, micro_batch_size=wanted)


def test_then_all_is_split_over_every_gpu():
    copies = _config(MeshConfig(data=-1, fsdp=1, zero=1), remat='full')
    changed, tried = _least(copies, lambda mesh, _: mesh.fsdp == -1 and mesh.zero == 3)
    assert changed == dataclasses.replace(copies, mesh=MeshConfig())
    flags = '--config.mesh.data=1 --config.mesh.fsdp=-1 --config.mesh.zero=3'
    assert variants.flags(copies, changed) == flags
    typed = copies
    for flag in flags.split():
        typed = experiment.override(typed, *flag.removeprefix('--config.').split('='))
    assert typed == changed
    assert tried <= 6


def test_then_layers_are_split_too():
    changed, _ = _least(_config(remat='full'), lambda mesh, _: mesh.tensor == 4)
    assert changed.mesh == MeshConfig(tensor=4)


def test_if_nothing_fits_the_largest_and_the_smallest_variant_of_each_mesh_are_tried():
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
def test_a_search_tries_micro_batches_that_divide_a_gpu_s_share(batch, shards, size, wanted):
    assert variants.sizes_to_search(_config(batch=batch, size=size), shards) == wanted
