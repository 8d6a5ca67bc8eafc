"""The paper's model in the three conventions that flops.py states."""

import pytest

from tinyllama_jax import flops
from tinyllama_jax.config import ModelConfig


def test_parameters_of_the_paper_s_model():
    counts = flops.parameter_counts(ModelConfig())
    assert sum(counts.values()) == 1_100_048_384
    assert counts['embed'] == counts['head'] == 65_536_000


@pytest.mark.parametrize(('convention', 'gflop'), [('C', 6.760), ('F', 7.314), ('N', 7.708)])
def test_gflop_per_token(convention, gflop):
    assert flops.flops_per_token(ModelConfig(), convention) / 1e9 == pytest.approx(gflop, abs=1e-3)


def test_the_paper_s_speed_as_mfu():
    assert flops.mfu(ModelConfig(), 'C', 24_000, 'NVIDIA A100-SXM4-40GB', 1) == pytest.approx(0.520, abs=1e-3)
    assert flops.mfu(ModelConfig(), 'F', 16 * 24_000, 'NVIDIA A100-SXM4-40GB', 16) == pytest.approx(0.563, abs=1e-3)


def test_an_unknown_chip_has_no_mfu():
    assert flops.mfu(ModelConfig(), 'C', 1e3, 'cpu', 1) is None
