"""The test before the first step: passes with right kernels on a mesh, stops with a wrong one."""

import dataclasses

import jax
import pytest

from kernels import dispatch
from tests.support import kernel_checks, tiny
from tests.tinyllama_jax.ops_test import INTERPRETED
from tinyllama_jax import errors, ops, sharding
from tinyllama_jax.config import MeshConfig
from tinyllama_jax.run import selftest

pytestmark = kernel_checks.needs_triton
CONFIG = dataclasses.replace(
    tiny.CONFIG,
    model=dataclasses.replace(tiny.MODEL, seq_len=24, head_dim=64),
    train=dataclasses.replace(tiny.CONFIG.train, micro_batch_size=1),
    kernels=INTERPRETED,
)

ALONE = dataclasses.replace(CONFIG, kernels=dataclasses.replace(ops.PLAIN, swiglu='interpret'))


def _ops(config=CONFIG):
    mesh = sharding.make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])
    return ops.for_run(config, mesh)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_right_kernels_pass_on_a_mesh(dtype):
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, compute_dtype=dtype))
    lines = []
    errors_of = selftest.check_kernels(config, _ops(), lines.append)
    assert errors_of.keys() == {op for op, implementations in dispatch.OPS.items() if 'interpret' in implementations}
    assert all(error < dispatch.TOLERANCES[dtype][0] / 2 for error in errors_of.values())
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
        selftest.check_kernels(ALONE, _ops(ALONE))


def test_one_that_gives_what_is_not_a_number_does_not_pass_on_a_mesh(monkeypatch):
    right = dispatch.swiglu
    monkeypatch.setattr(dispatch, 'swiglu', lambda *arrays, impl=None, chip=None: (
        right(*arrays, impl='xla') * (1.0 if impl == 'xla' else float('nan'))
    ))  # fmt: skip
    with pytest.raises(errors.RunError, match=r'self-test: swiglu \(interpret\) is off by inf in float32'):
        selftest.check_kernels(ALONE, _ops(ALONE))


def test_a_slightly_wrong_scale_is_noticed_in_bfloat16(monkeypatch):
    right = dispatch.swiglu
    monkeypatch.setattr(dispatch, 'swiglu', lambda *arrays, impl=None, chip=None: (
        right(*arrays, impl='xla') * (1.0 if impl == 'xla' else 1.02)
    ))  # fmt: skip
    config = dataclasses.replace(ALONE, model=dataclasses.replace(ALONE.model, compute_dtype='bfloat16'))
    with pytest.raises(errors.RunError, match=r'swiglu \(interpret\) is off by 0\.0\S* in bfloat16, and 0\.01 is'):
        selftest.check_kernels(config, _ops(config))


def test_one_that_does_not_run_is_named(monkeypatch):
    right = dispatch.swiglu

    def broken(*arrays, impl=None, chip=None):
        if impl == 'xla':
            return right(*arrays, impl=impl)
        raise RuntimeError('ptxas exited with 255\nand said more')

    monkeypatch.setattr(dispatch, 'swiglu', broken)
    with pytest.raises(errors.RunError, match=r'swiglu \(interpret\) did not run: ptxas exited with 255. Do not train'):
        selftest.check_kernels(ALONE, _ops(ALONE))


@pytest.mark.parametrize('op', ['linear', 'embed'])
def test_another_product_or_embedding_is_held_to_plain_jax_too(monkeypatch, op):
    right = getattr(dispatch, op)

    def wrong(*arrays, impl=None, chip=None, **options):
        return right(*arrays, **options) * (1.0 if impl == 'xla' else 1.02)

    chosen = dict(_ops(ALONE).implementations) | {'swiglu': 'xla', op: 'fp8'}
    fp8_ops = dataclasses.replace(_ops(ALONE), implementations=tuple(chosen.items()))
    monkeypatch.setattr(dispatch, op, wrong)
    with pytest.raises(errors.RunError, match=rf'{op} \(fp8\) is off by 0\.02 in float32, and 0\.0001 is'):
        selftest.check_kernels(ALONE, fp8_ops)
    monkeypatch.setitem(dispatch.TOLERANCES, 'fp8', (0.1, 0.05))  # its own numbers are coarser than float32
    assert selftest.check_kernels(ALONE, fp8_ops)[op] > 0.01


def test_plain_jax_is_not_tested_against_itself():
    config = dataclasses.replace(ALONE, kernels=dataclasses.replace(ALONE.kernels, attention=None))
    assert selftest.check_kernels(config, _ops(config)).keys() == {'swiglu'}
