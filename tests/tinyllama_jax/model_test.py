"""The model against transformers' Llama, its parameter names, its size, its initialisation."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import tinyllama_1b
from eval_bridge.hf import convert
from kernels import reference
from tests.support import tiny_export
from tinyllama_jax import model
from tinyllama_jax.config import ModelConfig


def _config(*, heads, kv_heads, embed, rope_scaling=1.0, **fields):
    return ModelConfig(
        vocab_size=tiny_export.PIECES, seq_len=64, num_layers=2, embed_dim=embed, num_heads=heads,
        num_kv_heads=kv_heads, head_dim=embed // heads, hidden_dim=72, rope_scaling=rope_scaling,
        compute_dtype='float32', **fields,
    )  # fmt: skip


_forward = jax.jit(model.forward, static_argnames='config')
_hidden = jax.jit(model.hidden, static_argnames='config')
_loss_and_grads = jax.jit(jax.value_and_grad(model.loss, has_aux=True), static_argnames=('config', 'remat'))

SHAPES = [  # (configuration, B, T): groups of 1, 2 and 8 queries, odd lengths, scaled rotation, layers unrolled
    (_config(heads=4, kv_heads=4, embed=32, rope_base=500.0, scan_layers=False), 1, 5),
    (_config(heads=4, kv_heads=2, embed=48, norm_eps=1e-3), 3, 17),
    (_config(heads=8, kv_heads=1, embed=64, rope_scaling=4.0), 2, 63),
]


@pytest.mark.parametrize(('config', 'B', 'T'), SHAPES)
def test_logits_and_gradients_equal_transformers(tmp_path, config, B, T):
    torch = tiny_export.require_torch()
    params = tiny_export.random_params(config, seed=T)
    theirs = tiny_export.transformers_llama(params, config, tmp_path).eval()
    rows_BR = np.random.default_rng(T).integers(config.vocab_size, size=(B, T + 1))
    tokens_BT, targets_BT = rows_BR[:, :-1], rows_BR[:, 1:]

    their_logits_BTV = theirs(torch.from_numpy(tokens_BT)).logits
    logits_BTV, loss, grads = _forward_and_gradients(params, tokens_BT, targets_BT, config)
    assert float(jnp.std(logits_BTV)) > 0.5, 'logits near zero would show nothing'
    np.testing.assert_allclose(logits_BTV, their_logits_BTV.detach(), atol=1e-4, rtol=0)

    their_loss = torch.nn.functional.cross_entropy(
        their_logits_BTV.flatten(0, 1), torch.from_numpy(targets_BT).flatten()
    )
    their_loss.backward()
    assert float(loss) == pytest.approx(their_loss.item(), abs=1e-5)
    their_grads = _gradients_as_ours(theirs, tmp_path / 'gradients')
    for (path, grad), their_grad in zip(
        jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(their_grads), strict=True
    ):
        error, size = np.linalg.norm(grad - their_grad), np.linalg.norm(their_grad)
        assert size > 0
        assert error <= 1e-4 * size, jax.tree_util.keystr(path)


@functools.partial(jax.jit, static_argnames='config')
def _forward_and_gradients(params, tokens_BT, targets_BT, config):
    (loss, _), grads = jax.value_and_grad(model.loss, has_aux=True)(params, tokens_BT, targets_BT, config)
    return model.forward(params, tokens_BT, config), loss, grads


def _gradients_as_ours(theirs, folder):
    """The gradients of transformers' model in our tree: saved in the place of its weights, then imported."""
    for parameter in theirs.parameters():
        parameter.data = parameter.grad
    theirs.save_pretrained(folder)
    return convert.import_weights(folder)[0]


def test_layers_apart_give_the_same_and_what_attend_returns():
    config = SHAPES[1][0]
    params = tiny_export.random_params(config)
    apart = {**params, 'layers': model.unstacked(params['layers'], config.num_layers)}
    tokens_BT = np.random.default_rng(0).integers(config.vocab_size, size=(2, 15))

    def attend(q_BTNH, k_BTKH, v_BTKH, addend):
        return reference.attention(q_BTNH, k_BTKH, v_BTKH), k_BTKH + addend

    read = functools.partial(jax.jit(model.hidden, static_argnames=('config', 'attend')), config=config, attend=attend)
    x_BTD, keys_LBTKH = read(params, tokens_BT, cache=jnp.arange(2.0))
    same_BTD, keys = read(apart, tokens_BT, cache=[0.0, 1.0])
    np.testing.assert_allclose(x_BTD, _hidden(params, tokens_BT, config)[0], atol=1e-5)
    np.testing.assert_allclose(same_BTD, x_BTD, atol=1e-5)
    assert isinstance(keys, list)
    np.testing.assert_allclose(np.stack(keys), keys_LBTKH, atol=1e-5)


def test_packed_documents_train_as_documents_alone():
    config = SHAPES[1][0]
    params = tiny_export.random_params(config)
    rows_BR = np.random.default_rng(0).integers(config.vocab_size, size=(2, 9))
    tokens_BT, targets_BT = rows_BR[:, :-1], rows_BR[:, 1:]
    (alone, _), grads = _loss_and_grads(params, tokens_BT, targets_BT, config)
    (packed, _), packed_grads = _loss_and_grads(
        params,
        tokens_BT.reshape(1, 16),
        targets_BT.reshape(1, 16),
        dataclasses.replace(config, rope_scaling=4.0),  # since attention knows distances only, others prove nothing
        positions_BT=4 * np.tile(np.arange(8), 2)[None],
        segment_ids_BT=np.repeat([0, 1], 8)[None],
        remat='full',
    )
    assert float(packed) == pytest.approx(float(alone), rel=1e-6)
    for grad, packed_grad in zip(jax.tree.leaves(grads), jax.tree.leaves(packed_grads), strict=True):
        assert np.linalg.norm(grad - packed_grad) <= 1e-5 * np.linalg.norm(grad)


def test_bfloat16_compute_stays_near_float32():
    config = SHAPES[1][0]
    params = tiny_export.random_params(config)
    tokens_BT = np.arange(17)[None]
    exact = _forward(params, tokens_BT, config)
    rounded = _forward(params, tokens_BT, dataclasses.replace(config, compute_dtype='bfloat16'))
    assert rounded.dtype == jnp.float32
    error = float(jnp.linalg.norm(rounded - exact) / jnp.linalg.norm(exact))
    assert 1e-4 < error < 3e-2, 'bfloat16 has 8 bits: some 1 % is right, nothing at all is not'


def _abstract(config):
    return jax.eval_shape(lambda: model.init_params(config, jax.random.key(0)))


def test_parameter_names_and_shapes_are_the_contract():
    config = _config(heads=8, kv_heads=2, embed=64)
    L, D, N, K, H, F, V = 2, 64, 8, 2, 8, 72, tiny_export.PIECES
    found = {
        jax.tree_util.keystr(path, simple=True, separator='/'): (leaf.shape, leaf.dtype)
        for path, leaf in jax.tree_util.tree_leaves_with_path(_abstract(config))
    }
    shapes = {
        'embed': (V, D),
        'layers/attention/q': (L, D, N, H),
        'layers/attention/k': (L, D, K, H),
        'layers/attention/v': (L, D, K, H),
        'layers/attention/o': (L, N, H, D),
        'layers/mlp/gate': (L, D, F),
        'layers/mlp/up': (L, D, F),
        'layers/mlp/down': (L, F, D),
        'layers/attention_norm/scale': (L, D),
        'layers/mlp_norm/scale': (L, D),
        'final_norm/scale': (D,),
        'lm_head': (D, V),
    }
    assert found == {path: (shape, jnp.float32) for path, shape in shapes.items()}


def test_the_paper_s_model_has_1_100_048_384_parameters():
    leaves = jax.tree.leaves(_abstract(tinyllama_1b.get_config().model))
    assert sum(math.prod(leaf.shape) for leaf in leaves) == 1_100_048_384


@pytest.mark.parametrize('init', ['normal', 'original'])
def test_initial_standard_deviations_are_within_one_percent(init):
    L, D = 4, 512
    config = ModelConfig(
        vocab_size=256, num_layers=L, embed_dim=D, num_heads=4, num_kv_heads=2, head_dim=64, hidden_dim=256, init=init
    )
    key = jax.random.key(3, impl='unsafe_rbg')  # compiles in a third of the time
    params = jax.jit(model.init_params, static_argnames='config')(config, key)
    other, residual = {
        'normal': (0.02, 0.02 / math.sqrt(2 * L)),
        'original': (math.sqrt(0.4 / D), 1 / math.sqrt(D) / L),
    }[init]
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = path[-1].key
        if name == 'scale':
            assert (np.asarray(leaf) == 1).all()
            continue
        expected = residual if name in ('o', 'down') else other
        assert np.std(leaf) == pytest.approx(expected, rel=0.01), name
        assert abs(np.mean(leaf)) < 5 * expected / math.sqrt(leaf.size), name
