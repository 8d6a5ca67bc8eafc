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


@pytest.mark.parametrize(
    ('device_kind', 'peak'),
    [
        ('NVIDIA A100-SXM4-40GB', 312e12),
        ('NVIDIA A100 80GB PCIe', 312e12),
        ('NVIDIA H100 80GB HBM3', 989e12),
        ('NVIDIA H200', 989e12),
        ('NVIDIA GH200 480GB', 989e12),
        ('NVIDIA B200', 2.25e15),
        ('NVIDIA GB200', 2.5e15),
        ('NVIDIA H20', None),
        ('NVIDIA A10G', None),
        ('cpu', None),
    ],
)
def test_a_device_is_known_by_its_whole_name(monkeypatch, device_kind, peak):
    monkeypatch.setattr(flops, 'PEAK_FLOPS', flops.PEAK_FLOPS | {'B200': 2.25e15, 'GB200': 2.5e15})
    assert flops.peak_flops(device_kind) == peak


def test_an_unknown_chip_has_no_mfu():
    assert flops.mfu(ModelConfig(), 'C', 1e3, 'cpu', 1) is None
