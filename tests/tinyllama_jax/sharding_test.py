"""The rule table covers every array, and eight devices compute what one does."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tests.support import tiny
from tinyllama_jax import errors, sharding
from tinyllama_jax import step as step_lib
from tinyllama_jax.config import MeshConfig


def test_every_array_of_the_state_has_a_rule():
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    specs = step_lib.state_shardings(tiny.CONFIG, mesh)
    assert specs.params['layers']['attention']['q'].spec == P(None, 'fsdp', 'tensor', None)
    flat = [(jax.tree_util.keystr(path), leaf.spec) for path, leaf in jax.tree_util.tree_leaves_with_path(specs)]
    moments = [spec for name, spec in flat if 'mu' in name and 'gate' in name]
    assert moments == [P(None, 'fsdp', 'tensor')]


def test_an_array_without_a_rule_raises():
    mesh = sharding.make_mesh(MeshConfig())
    with pytest.raises(ValueError, match='no rule for layers/router'):
        sharding.shardings({'layers': {'router': jnp.zeros((8, 8))}}, mesh)


def test_a_mesh_that_does_not_fit_names_the_field():
    with pytest.raises(errors.UsageError, match='data=3.*8 devices'):
        sharding.make_mesh(MeshConfig(data=3, fsdp=1))
    mesh = sharding.make_mesh(MeshConfig(fsdp=1, tensor=8))
    with pytest.raises(errors.UsageError, match='config.mesh.tensor: 8 devices do not divide .*attention/k'):
        step_lib.state_shardings(tiny.CONFIG, mesh)


MESHES = {
    'fsdp': MeshConfig(fsdp=8),
    'hybrid': MeshConfig(data=2, fsdp=4),
    'replicas': MeshConfig(data=8, fsdp=1),
    'zero-1': MeshConfig(data=2, fsdp=4, zero=1),
    'tensor': MeshConfig(data=2, fsdp=2, tensor=2),
    'four': MeshConfig(data=2, fsdp=2),
    'tensor-zero-1': MeshConfig(data=2, fsdp=2, tensor=2, zero=1),
}


@pytest.mark.parametrize(
    ('mesh', 'options'),
    [(mesh, {}) for mesh in MESHES if mesh != 'four']
    + [('tensor', {'masked': True}), ('four', {'accumulation': 2, 'gradient_dtype': 'float32', 'remat': 'names'})],
)
def test_losses_equal_those_of_one_device(mesh, options):
    one = _losses(MeshConfig(fsdp=1), jax.devices()[:1], masked=options.get('masked', False))
    devices = jax.devices()[: 4 if mesh == 'four' else 8]
    np.testing.assert_allclose(_losses(MESHES[mesh], devices, **options), one, atol=1e-5, rtol=0)


def _losses(mesh_config, devices, *, masked=False, accumulation=1, **train):
    config = dataclasses.replace(
        tiny.CONFIG,
        mesh=mesh_config,
        data=dataclasses.replace(tiny.CONFIG.data, document_mask=masked, restart_positions=masked),
        train=dataclasses.replace(tiny.CONFIG.train, micro_batch_size=1, **train),
    )
    mesh = sharding.make_mesh(mesh_config, devices)
    state, train_step = step_lib.init_state(config, mesh), step_lib.jit_train_step(config, mesh)
    losses = []
    for rows_ABR in tiny.batches(4, accumulation=accumulation):
        state, scalars = train_step(state, rows_ABR, tiny.segment_ids(rows_ABR) if masked else None)
        losses.append(float(scalars['loss']))
    return losses


def test_local_columns_are_the_whole_batch_of_one_process():
    assert sharding.local_columns(sharding.make_mesh(MeshConfig()), 16) == slice(0, 16)
