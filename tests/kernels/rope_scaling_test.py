"""Stretched rotation: what each kind leaves alone and what it stretches; transformers' numbers are compared elsewhere.

tests/eval_bridge/hf/model_config_test.py compares logits with transformers.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from kernels import dispatch, reference, rope_scaling
from kernels.rope_scaling import RopeScaling
from tests.support.kernel_checks import needs_triton, normal

POSITIONS_BT = jnp.arange(40)[None]


def _angles(scaling, positions_BT=POSITIONS_BT):
    return np.asarray(rope_scaling.angles(positions_BT, 32, 10_000.0, scaling, jnp.float32))


PLAIN = _angles(RopeScaling('dynamic', 1.0, 1_000))


@pytest.mark.parametrize('kind', ['llama3', 'yarn'])
def test_fast_frequencies_stay_and_slow_ones_are_divided(kind):
    stretched = _angles(RopeScaling(kind, 8.0, 512, slow_turns=1.0, fast_turns=4.0))
    np.testing.assert_allclose(stretched[..., :4], PLAIN[..., :4], rtol=1e-6)
    np.testing.assert_allclose(stretched[..., -8:], PLAIN[..., -8:] / 8, rtol=1e-6)
    ratio_h = PLAIN[0, 1] / stretched[0, 1]
    assert (np.diff(ratio_h) >= -1e-6).all() and len(np.unique(ratio_h.round(3))) > 3  # and pass over smoothly


def test_dynamic_changes_only_rows_longer_than_the_original_length():
    scaling = RopeScaling('dynamic', 4.0, 40)
    positions_BT = jnp.stack([POSITIONS_BT[0], POSITIONS_BT[0] + 40])
    both = _angles(scaling, positions_BT)
    np.testing.assert_array_equal(both[0], PLAIN[0])
    np.testing.assert_array_equal(both[1, :, 0], np.arange(40, 80))  # the fastest frequency is 1 for any base
    slowest = 10_000.0 * 5 ** (32 / 31)  # the base: twice the length is 1 + 4 x (2 - 1) times as far
    np.testing.assert_allclose(both[1, :, -1], np.arange(40, 80) * slowest ** (-31 / 32), rtol=1e-5)


def test_an_unknown_kind_raises():
    with pytest.raises(ValueError, match="no scaling of kind 'longrope'"):
        _angles(RopeScaling('longrope', 2.0, 32))


@needs_triton
def test_the_kernel_turns_by_the_same_angles():
    x_BTNH, scaling = normal(0, 1, 40, 2, 64), RopeScaling('yarn', 4.0, 16, attention_factor=1.1)
    expected = reference.rope(jnp.asarray(x_BTNH), POSITIONS_BT, base=1e4, scaling=scaling)
    got = dispatch.rope(jnp.asarray(x_BTNH), POSITIONS_BT, base=1e4, scaling=scaling, impl='interpret')
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert float(jnp.linalg.norm(got)) == pytest.approx(1.1 * float(np.linalg.norm(x_BTNH)), rel=1e-5)
