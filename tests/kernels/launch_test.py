"""The launching of a kernel: its arguments, its outputs, the grid's limit, the interpreter as a chip."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import chips, launch
from tests.support import kernel_checks

pytestmark = kernel_checks.needs_triton
triton = pytest.importorskip('triton', reason='Triton is there for Linux on x86-64 and ARM only')
import triton.language as tl  # noqa: E402

TILE = chips.Tile({'BLOCK': 4}, warps=1)


@triton.jit
def _scale_half_kernel(x_ptr, y_ptr, FACTOR: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * 2 * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets) * FACTOR)


def test_the_interpreter_runs_a_kernel_and_shows_what_it_does_not_write():
    x = jnp.arange(16, dtype=jnp.float32)
    output = jax.ShapeDtypeStruct((16,), jnp.float32)
    (y,) = launch.call(launch.INTERPRETER, _scale_half_kernel, (x,), (output,), grid=(2,), tile=TILE, FACTOR=3)
    written = (np.arange(16) // 4) % 2 == 0
    np.testing.assert_array_equal(y, np.where(written, 3 * np.arange(16), np.nan))


def test_a_chip_s_own_run_gets_the_constants_and_the_tile_s_sizes():
    calls = []

    def record(*arguments):
        calls.append(arguments)
        return (jnp.zeros(3),)

    chip = dataclasses.replace(chips.CHIPS['sm_90'], run=record)
    inputs, outputs = (jnp.ones(3),), (jax.ShapeDtypeStruct((3,), jnp.float32),)
    (y,) = launch.call(chip, _scale_half_kernel, inputs, outputs, grid=(1,), tile=TILE, FACTOR=2)
    assert y.shape == (3,)
    (arguments,) = calls
    assert arguments == (chip, _scale_half_kernel, inputs, outputs, (1,), TILE, {'FACTOR': 2, 'BLOCK': 4})


@pytest.mark.parametrize('name', chips.CHIPS)
def test_a_program_for_a_chip_holds_the_kernel_compiled_for_it(name, monkeypatch):
    import jax_triton

    options = {}
    call = jax_triton.triton_call
    monkeypatch.setattr(jax_triton, 'triton_call', lambda *args, **how: (options.update(how), call(*args, **how))[1])
    output = jax.ShapeDtypeStruct((16,), jnp.float32)

    def scaled(x):
        return launch.call(chips.CHIPS[name], _scale_half_kernel, (x,), (output,), grid=(2,), tile=TILE, FACTOR=3)

    assert kernel_checks.cuda_kernels(scaled, jnp.ones(16)) == ['_scale_half_kernel']
    assert f'sm_{options["compute_capability"]}' == name
    assert (options['num_warps'], options['num_stages'], options['BLOCK']) == (1, 2, 4)


def test_too_many_tiles_of_a_row_are_refused():
    arguments = (launch.INTERPRETER, _scale_half_kernel, (jnp.ones(4),), ())
    with pytest.raises(ValueError, match='_scale_half_kernel: 65536 tiles of a row; 65535 at most'):
        launch.call(*arguments, grid=(1, 65_536), tile=TILE, FACTOR=1)
