"""The chunks of the loss: any number of tokens, no weight at all, and a vocabulary split over devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from kernels import chunked_loss, cpu, reference
from tests.support import kernel_checks
from tests.support.kernel_checks import normal

B, T, D, V = 2, 9, 16, 32
TARGETS_BT = jnp.asarray(np.random.default_rng(0).integers(0, V, (B, T)), jnp.int32)
WEIGHTS_BT = jnp.asarray(np.random.default_rng(1).integers(0, 3, (B, T)), jnp.float32)


@pytest.mark.parametrize('tokens', [1, 7, 8, 9, 16, 17])
def test_chunks_hold_all_tokens_in_order_and_zeros_at_the_end(tokens, monkeypatch):
    monkeypatch.setattr(chunked_loss, 'CHUNK', 8)
    x_nCD = chunked_loss._chunks(1 + jnp.arange(2.0 * tokens).reshape(1, tokens, 2))
    assert x_nCD.shape[0] == -(-tokens // 8) and x_nCD.shape[1] <= 8
    flat = x_nCD.reshape(-1)
    np.testing.assert_array_equal(flat[: 2 * tokens], 1 + np.arange(2 * tokens))
    assert not flat[2 * tokens :].any() and flat.size - 2 * tokens < 2 * x_nCD.shape[0], 'no chunk of padding alone'


def test_a_batch_without_weight_has_no_loss_and_no_gradient():
    def loss(x_BTD, head_DV):
        return cpu.cross_entropy(x_BTD, head_DV, TARGETS_BT, weights_BT=jnp.zeros((B, T)), z_loss=1e-3)[0]

    value, gradients = jax.value_and_grad(loss, (0, 1))(normal(0, B, T, D), normal(1, D, V))
    assert value == 0 and not any(gradient.any() for gradient in gradients)


def test_the_parts_have_no_gradient():
    gradient = jax.grad(lambda x: cpu.cross_entropy(x, normal(1, D, V), TARGETS_BT)[1]['nll'])(normal(0, B, T, D))
    assert not gradient.any()


@pytest.mark.parametrize('chunk', [4, 2_048])
def test_a_vocabulary_split_over_devices_gives_the_whole_one_s(chunk, monkeypatch):
    monkeypatch.setattr(chunked_loss, 'CHUNK', chunk)
    mesh = jax.make_mesh((4,), ('v',), devices=jax.devices()[:4], axis_types=(jax.sharding.AxisType.Auto,))
    options = {'weights_BT': WEIGHTS_BT, 'z_loss': 1e-2}

    def local(x_BTD, head_DV):
        return cpu.cross_entropy(x_BTD, head_DV, TARGETS_BT, **options, vocab_axis='v')[0]

    split = jax.shard_map(local, mesh=mesh, in_specs=(P(), P(None, 'v')), out_specs=P())
    whole = functools.partial(reference.cross_entropy, targets_BT=TARGETS_BT, **options)
    arrays = [normal(0, B, T, D, scale=3.0), normal(1, D, V)]
    results = kernel_checks.results(split, arrays)
    expected = kernel_checks.results(lambda *arrays: whole(*arrays)[0], arrays)
    assert kernel_checks.within(kernel_checks.errors(results, expected), kernel_checks.FLOAT32)
