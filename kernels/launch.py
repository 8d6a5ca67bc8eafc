"""How a Triton kernel runs: on a GPU through jax-triton, or on the CPU in Triton's interpreter.

Only this file calls jax-triton. The chip is an argument, never asked of a device, so that programs can be
lowered for a GPU that this machine does not have.
"""

import itertools

import jax
import numpy as np

from kernels import checks, chips, varying
from kernels.chips import Chip, Tile

_MOST_PROGRAMS = 65_535  # along a grid's second axis (CUDA C++ Programming Guide, table 30)


def call(chip: Chip, kernel, inputs, outputs, *, grid, tile: Tile, **constants) -> tuple:
    """Runs a kernel on `chip` and returns its outputs, a tuple of arrays like `outputs` (ShapeDtypeStructs).

    The kernel's parameters are inputs, outputs, then `constants` and the tile's sizes by name.
    """
    if max(grid[1:], default=0) > _MOST_PROGRAMS:
        raise ValueError(f'{kernel.__name__}: {grid[1]} tiles of a row; {_MOST_PROGRAMS} at most')
    run = chip.run or _run_on_gpu
    results = run(chip, kernel, inputs, outputs, grid, tile, constants | tile.sizes)
    names = varying.axes(*inputs)
    return tuple(varying.along(names, result) for result in results)


def _run_on_gpu(chip, kernel, inputs, outputs, grid, tile, constants):
    import jax_triton

    return jax_triton.triton_call(
        *inputs,
        kernel=kernel,
        out_shape=outputs,
        grid=grid,
        num_warps=tile.warps,
        num_stages=tile.stages,
        compute_capability=int(chip.name.removeprefix('sm_')),
        **constants,
    )


def interpret(chip, kernel, inputs, outputs, grid, tile, constants):
    """Runs a kernel in Triton's interpreter on the CPU; takes the arguments of `_run_on_gpu`."""
    from kernels import interpreter

    def run(*arrays):
        arrays = [np.ascontiguousarray(array) for array in arrays]
        # NaN, so that an element that the kernel does not write is noticed.
        results = [np.full(output.shape, np.nan, output.dtype) for output in outputs]
        interpreter.run(kernel, grid, *arrays, *results, **constants)
        return tuple(results)

    return jax.pure_callback(run, tuple(outputs), *inputs, vmap_method='sequential')


INTERPRETER = Chip(
    'interpreter',
    multiprocessors=1,
    shared_bytes=0,  # not limited, and never read
    attention=dict.fromkeys(
        itertools.product(checks.KERNEL_DTYPES, checks.HEAD_DIMS),
        chips.attention_tiles(forward=(64, 32, 4, 2), dq=(64, 32, 4, 2), dkv=(32, 64, 4, 2)),
    ),
    # Three programs seldom divide the number of rows, so that some loop over fewer.
    streaming=chips.STREAMING | {'rms_norm_backward': Tile({}, warps=4, programs=3)},
    run=interpret,
)
