"""The test before the first step: passes with right kernels on a mesh, stops with a wrong one."""

import dataclasses

import jax
import pytest

from kernels import dispatch
from tests import kernel_checks, tiny
from tests.ops_test import INTERPRETED
from tinyllama_jax import errors, ops, selftest, sharding
from tinyllama_jax.config import MeshConfig

pytestmark = kernel_checks.needs_triton
CONFIG = dataclasses.replace(
    tiny.CONFIG,
    model=dataclasses.replace(tiny.MODEL, seq_len=24, head_dim=64),
    train=dataclasses.replace(tiny.CONFIG.train, micro_batch_size=1),
    kernels=INTERPRETED,
)


def _ops(config=CONFIG):
    mesh = sharding.make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])
    return ops.for_run(config, mesh)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_right_kernels_pass_on_a_mesh(dtype):
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, compute_dtype=dtype))
    lines = []
    found = selftest.check(config, _ops(), lines.append)
    assert found.keys() == set(dispatch.OPS)
    assert max(found.values()) < selftest.TOLERANCES[dtype] / 2
    assert lines[0].startswith(f'self-test passed: largest errors in {dtype} attention ')


def test_a_wrong_kernel_is_named_with_its_error(monkeypatch):
    right = dispatch.swiglu

    def wrong(gate_BTF, up_BTF, *, impl=None, chip=None):
        y_BTF = right(gate_BTF, up_BTF, impl=impl, chip=chip)
        return y_BTF if impl == 'xla' else y_BTF.at[0, 3].multiply(1.01)  # one row, by one percent

    monkeypatch.setattr(dispatch, 'swiglu', wrong)
    with pytest.raises(
        errors.RunError, match=r'self-test: swiglu \(interpret\) is off by 0\.0\S* in float32, and 0.0001'
    ):
        selftest.check(CONFIG, _ops())


def test_plain_jax_is_not_tested_against_itself():
    config = dataclasses.replace(CONFIG, kernels=dataclasses.replace(INTERPRETED, swiglu='xla', attention=None))
    assert selftest.check(config, _ops(config)).keys() == {'rms_norm', 'rope', 'cross_entropy'}
