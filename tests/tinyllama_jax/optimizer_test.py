"""The schedules at their corners, the decay mask, and the chain against its formula."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tinyllama_jax import optimizer
from tinyllama_jax.config import OptimizerConfig

STEPS = 1_430_512  # the paper's


def _rate(step, *, steps=STEPS, **fields):
    return float(optimizer.learning_rate(OptimizerConfig(**fields), steps)(jnp.int32(step)))


@pytest.mark.parametrize(
    ('step', 'rate'),
    [
        (0, 0.0),
        (1, 4e-4 / 2_000),
        (1_999, 4e-4 * 1_999 / 2_000),
        (2_000, 4e-4),
        (2_000 + (STEPS - 2_000) // 2, 2.2e-4),
        (STEPS - 1, 4e-5),
        (STEPS + 10_000, 4e-5),
    ],
)
def test_cosine_at_its_corners(step, rate):
    assert _rate(step) == pytest.approx(rate, rel=1e-5, abs=1e-12)


@pytest.mark.parametrize(
    ('step', 'rate'),
    [(0, 0.0), (50, 2e-4), (100, 4e-4), (799, 4e-4), (800, 4e-4), (900, 2.2e-4), (999, 4e-5 + 3.6e-4 / 200)],
)
def test_warmup_stable_decay_at_its_corners(step, rate):
    got = _rate(step, steps=1_000, schedule='wsd', warmup_steps=100, decay_steps=200)
    assert got == pytest.approx(rate, rel=1e-5, abs=1e-12)


@pytest.mark.parametrize('step', [0, 1, 1_999, 2_000, 700_000, STEPS - 1])
def test_the_original_s_rate_is_that_of_the_step_s_last_micro_step(step):
    iteration, warmup, total = 8 * (step + 1) - 1, 16_000, 8 * STEPS
    ratio = (iteration - warmup) / (total - warmup)
    expected = 4e-4 * iteration / warmup if ratio < 0 else 4e-5 + 0.5 * (1 + np.cos(np.pi * ratio)) * (4e-4 - 4e-5)
    assert _rate(step, micro_steps_per_step=8) == pytest.approx(expected, rel=1e-5)


def test_stuck_rate_stays_at_its_peak_then_falls_to_the_schedule():
    assert _rate(500_000, stuck_until_step=600_000) == pytest.approx(4e-4)
    assert _rate(1_000, stuck_until_step=600_000) == pytest.approx(2e-4)
    assert _rate(600_000, stuck_until_step=600_000) == _rate(600_000) < 3.5e-4


PARAMS = {'layers': {'mlp': {'gate': jnp.full((2, 3, 4), 0.5)}, 'mlp_norm': {'scale': jnp.ones((2, 3))}}}


@pytest.mark.parametrize(('decay', 'scale_decays'), [('matrices', False), ('all', True)])
def test_decay_mask(decay, scale_decays):
    mask = optimizer.decay_mask(OptimizerConfig(decay=decay), PARAMS)
    assert mask == {'layers': {'mlp': {'gate': True}, 'mlp_norm': {'scale': scale_decays}}}


def test_one_update_is_clipped_adamw():
    config = OptimizerConfig(warmup_steps=0, clip_norm=1.0)
    tx = optimizer.make_optimizer(config, 100)
    grads = jax.tree.map(lambda leaf: 10.0 * jnp.ones_like(leaf), PARAMS)
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
    g = 10.0 / float(optax.tree.norm(grads))  # after clipping; Adam's first step is g / (|g| + eps)
    direction = g / (g + 1e-8)
    np.testing.assert_allclose(updates['layers']['mlp']['gate'], -4e-4 * (direction + 0.1 * 0.5), rtol=1e-5)
    np.testing.assert_allclose(updates['layers']['mlp_norm']['scale'], -4e-4 * direction, rtol=1e-5)


def test_small_gradients_are_not_scaled():
    tx = optimizer.make_optimizer(dataclasses.replace(OptimizerConfig(), clip_norm=1e9, warmup_steps=0, eps=1.0), 100)
    grads = jax.tree.map(lambda leaf: 0.25 * jnp.ones_like(leaf), PARAMS)
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates['layers']['mlp_norm']['scale'], -4e-4 * 0.25 / 1.25, rtol=1e-5)


@pytest.mark.parametrize('field', ['schedule', 'name'])
def test_a_choice_that_only_the_config_knows_raises(field):
    config = dataclasses.replace(OptimizerConfig(), **{field: 'muon'})
    with pytest.raises(ValueError, match=f"optimizer.{field}: 'muon' has no"):
        optimizer.make_optimizer(config, 10)
