"""The table of GPUs: complete, in agreement with the kernels' table of chips; unknown names are refused."""

import dataclasses

import pytest

from kernels import chips
from tinyllama_jax import errors
from tinyllama_jax.plan import targets


def test_an_unknown_target_is_refused_with_a_list_of_the_known():
    with pytest.raises(errors.UsageError, match=r'--target=v100: choose one of a100-40gb, .*h200-141gb'):
        targets.find('v100')
    with pytest.raises(errors.UsageError, match='--target=: choose'):
        targets.find(None)


@pytest.mark.parametrize('name', targets.TARGETS)
def test_rates_are_below_what_the_hardware_can_do(name):
    target = targets.find(name)
    assert target.matmul_flops < target.peak_flops
    assert all(rate < target.matmul_flops for rate in target.attention_flops)
    assert target.network_bandwidth < target.nvlink_bandwidth < target.memory_bandwidth
    chip = chips.CHIPS['sm_{}{}'.format(*target.compute_capability)]
    assert chip.multiprocessors == target.multiprocessors
    assert chip.shared_bytes == target.description['shared_memory_per_block_optin']
    gigabytes = int(name.partition('-')[2].removesuffix('gb'))
    assert 0.9 * gigabytes * 1e9 < target.memory_bytes <= gigabytes * 2**30


def test_a_gpu_without_a_peak_is_named():
    unknown = dataclasses.replace(targets.find('a100-40gb'), device_name='NVIDIA V100-SXM2-16GB')
    with pytest.raises(ValueError, match='V100-SXM2-16GB has no peak_flops in kernels/chips'):
        _ = unknown.peak_flops


def test_xla_is_told_the_figures_of_the_table():
    text = targets.xla_description(targets.find('h200-141gb'))
    assert 'device_memory_size: 151397597184' in text and 'core_count: 132' in text
    assert 'major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES' in text
