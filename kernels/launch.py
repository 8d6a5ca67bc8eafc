"""How a Triton kernel runs: on a GPU through jax-triton, or on the CPU in Triton's interpreter; and its tile shapes.

The only place that calls jax-triton. The chip is an argument, never asked of a device, so that
programs can be lowered for a GPU where there is none.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from kernels import varying

CHIPS = ('sm_80', 'sm_90')  # A100; H100 and H200
_MULTIPROCESSORS: dict[str | None, int] = {'sm_80': 108, 'sm_90': 132}
_INTERPRETED_PROGRAMS = 3
_MOST_PROGRAMS = 65_535  # of a grid's second axis (CUDA C++ Programming Guide, table 30)


@dataclasses.dataclass(frozen=True)
class Tile:
    """Compile-time block sizes of a kernel, and how many warps and pipeline stages it is compiled for.

    `programs`: how many a multiprocessor is given, of a kernel that goes over many rows in each.
    """

    sizes: dict[str, int]
    warps: int
    stages: int = 2
    programs: int = 4


def _pairs(**kernels) -> dict[str, Tile]:
    """Tiles of the attention kernels from (BLOCK_Q, BLOCK_K, warps, stages) of each."""
    return {
        f'attention_{name}': Tile({'BLOCK_Q': block_q, 'BLOCK_K': block_k}, warps, stages)
        for name, (block_q, block_k, warps, stages) in kernels.items()
    }


# By chip, dtype and head dim: register spills bind (kernels/resources.py finds none in these), so that kernels
# with segment ids may need smaller ones. Those of sm_90, bfloat16 and 64 are the fastest of a sweep on an H100
# (bench/results); small ones, of which several share a multiprocessor, so that one multiplies while another one's
# exponentials are computed. The others are not tuned on a GPU.
_ATTENTION: dict[tuple[str | None, str, int], dict[str, Tile]] = {
    ('sm_80', 'bfloat16', 64): _pairs(
        forward=(128, 64, 4, 3), forward_segments=(128, 64, 8, 3), dq=(64, 32, 4, 2), dkv=(32, 64, 4, 3)
    ),
    ('sm_90', 'bfloat16', 64): _pairs(
        forward=(64, 64, 4, 3), dq=(64, 64, 4, 2), dkv=(64, 64, 4, 3), dkv_segments=(32, 64, 4, 3)
    ),
    ('sm_80', 'bfloat16', 128): _pairs(forward=(128, 64, 8, 2), dq=(64, 64, 8, 2), dkv=(32, 64, 8, 2)),
    ('sm_90', 'bfloat16', 128): _pairs(forward=(128, 128, 8, 2), dq=(64, 64, 8, 2), dkv=(32, 64, 8, 2)),
}
for _chip in CHIPS:  # without tensor cores, which have no float32: for checks, not for speed
    _ATTENTION[_chip, 'float32', 64] = _pairs(forward=(32, 32, 4, 2), dq=(16, 32, 4, 2), dkv=(16, 32, 8, 1))
    _ATTENTION[_chip, 'float32', 128] = _pairs(forward=(32, 16, 8, 2), dq=(32, 16, 8, 2), dkv=(16, 64, 8, 2))
_INTERPRETED = _pairs(forward=(64, 32, 4, 2), dq=(64, 32, 4, 2), dkv=(32, 64, 4, 2))

# The same on every chip: these only stream memory. The fastest of a sweep on an H100, by a percent or two.
_ROWS = {
    'attention_delta': Tile({'BLOCK_Q': 64}, warps=4),
    'rms_norm_forward': Tile({}, warps=8),
    'rms_norm_backward': Tile({}, warps=4),
    'rope': Tile({'BLOCK': 128}, warps=4),
    'swiglu_forward': Tile({'BLOCK': 1024}, warps=4),
    'swiglu_backward': Tile({'BLOCK': 1024}, warps=4),
    'cross_entropy_sums': Tile({'BLOCK': 4096}, warps=8),
    'cross_entropy_gradient': Tile({'BLOCK': 4096}, warps=8),
}


@dataclasses.dataclass(frozen=True)
class Target:
    """What kernels run on: a chip of `CHIPS`, or this CPU with `interpret` (by a chip's tiles, if one is named)."""

    chip: str | None = None
    interpret: bool = False

    def programs(self, kernel: str) -> int:
        """How many programs a kernel is given that goes over many rows in each."""
        return self.tile(kernel).programs * _MULTIPROCESSORS[self.chip] if self.chip else _INTERPRETED_PROGRAMS

    def tile(self, kernel: str) -> Tile:
        """The tile shape of a kernel that streams memory."""
        return _ROWS[kernel]

    def attention_tile(self, kernel: str, dtype, head_dim: int, *, segments: bool = False) -> Tile:
        """The tile shape of an attention kernel for this chip."""
        tiles = _ATTENTION[self.chip, jnp.dtype(dtype).name, head_dim] if self.chip else _INTERPRETED
        return tiles.get(f'{kernel}_segments' if segments else kernel, tiles[kernel])

    def call(self, kernel, inputs, outputs, *, grid, tile: Tile, **constants):
        """The kernel's outputs, as `outputs` (ShapeDtypeStructs) say; its parameters are inputs, outputs, constants."""
        constants |= tile.sizes
        if max(grid[1:], default=0) > _MOST_PROGRAMS:
            raise ValueError(f'{kernel.__name__}: {grid[1]} tiles of a row; {_MOST_PROGRAMS} at most')
        if self.interpret:
            results = _interpret(kernel, inputs, outputs, grid, constants)
        else:
            results = self._launch(kernel, inputs, outputs, grid, tile, constants)
        names = varying.axes(*inputs)
        return tuple(varying.along(names, result) for result in results)

    def _launch(self, kernel, inputs, outputs, grid, tile, constants):
        import jax_triton

        return jax_triton.triton_call(
            *inputs, kernel=kernel, out_shape=outputs, grid=grid, num_warps=tile.warps, num_stages=tile.stages,
            compute_capability=int(str(self.chip).removeprefix('sm_')), **constants,
        )  # fmt: skip


def _interpret(kernel, inputs, outputs, grid, constants):
    from kernels import interpreter

    def run(*arrays):
        arrays = [np.ascontiguousarray(array) for array in arrays]
        # Not a number: what a kernel does not write shows.
        results = [np.full(output.shape, np.nan, output.dtype) for output in outputs]
        interpreter.run(kernel, grid, *arrays, *results, **constants)
        return tuple(results)

    return jax.pure_callback(run, tuple(outputs), *inputs, vmap_method='sequential')
