"""What is known about each chip: multiprocessors, shared memory, tile shapes of kernels, peaks of its GPUs.

A new chip is a row in `CHIPS`, and for `plan` a row in tinyllama_jax/plan/targets.py.
"""

import dataclasses
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Tile:
    """Compile-time block sizes of a kernel, and the warps and pipeline stages it is compiled for.

    `programs`: programs per multiprocessor, of a kernel whose programs loop over rows.
    """

    sizes: dict[str, int]
    warps: int
    stages: int = 2
    programs: int = 4


# The same on every chip: these kernels only stream memory. RMSNorm's, RoPE's and SwiGLU's are the fastest of a sweep on
# an H100, or within a percent of it; the others were not swept.
STREAMING = {
    'attention_delta': Tile({'BLOCK_Q': 64}, warps=4),
    'rms_norm_forward': Tile({}, warps=8),
    'rms_norm_backward': Tile({}, warps=4),
    'rope': Tile({'BLOCK': 128}, warps=4),
    'swiglu_forward': Tile({'BLOCK': 1024}, warps=4),
    'swiglu_backward': Tile({'BLOCK': 1024}, warps=4),
    'cross_entropy_sums': Tile({'BLOCK': 4096}, warps=8),
    'cross_entropy_gradient': Tile({'BLOCK': 4096}, warps=8),
}


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by identity: a static argument of jit must be hashable
class Chip:
    """What kernels run on: a GPU of one compute capability, or Triton's interpreter (`launch.INTERPRETER`)."""

    name: str  # the compute capability, such as sm_90
    multiprocessors: int
    shared_bytes: int  # at most, for one block (CUDA C++ Programming Guide, table 30)
    attention: dict[tuple[str, int], dict[str, Tile]]  # (dtype, head dim): tiles of the attention kernels
    peak_flops: dict[str, float] = dataclasses.field(default_factory=dict)  # GPU: dense bf16 FLOP/s (data sheets)
    streaming: dict[str, Tile] = dataclasses.field(default_factory=lambda: STREAMING)
    run: Callable | None = None  # runs a kernel in place of jax-triton (`launch.call`)

    def attention_tile(self, kernel: str, dtype: str, head_dim: int, *, segments: bool) -> Tile:
        """Returns the tile shape of an attention kernel, which may be another one with segment ids."""
        tiles = self.attention[dtype, head_dim]
        return tiles.get(f'{kernel}_segments' if segments else kernel, tiles[kernel])


def attention_tiles(**kernels: tuple[int, int, int, int]) -> dict[str, Tile]:
    """Returns the tiles of the attention kernels from (BLOCK_Q, BLOCK_K, warps, stages) of each."""
    return {
        f'attention_{name}': Tile({'BLOCK_Q': block_q, 'BLOCK_K': block_k}, warps, stages)
        for name, (block_q, block_k, warps, stages) in kernels.items()
    }


# Registers limit these tiles: no kernel may spill (kernels/resources.py), and some need smaller ones with segment ids.
# Those of sm_90, bfloat16 and head dim 64 are the fastest of a sweep on an H100 (bench/results): small, so that several
# share a multiprocessor and one multiplies while another computes exponentials. The others are not tuned.
_FLOAT32 = {  # for checks, not for speed: tensor cores have no float32
    ('float32', 64): attention_tiles(forward=(32, 32, 4, 2), dq=(16, 32, 4, 2), dkv=(16, 32, 8, 1)),
    ('float32', 128): attention_tiles(forward=(32, 16, 8, 2), dq=(32, 16, 8, 2), dkv=(16, 64, 8, 2)),
}
_A100 = Chip(
    'sm_80',
    peak_flops={'A100': 312e12},
    multiprocessors=108,
    shared_bytes=163 * 1024,
    attention=_FLOAT32
    | {
        ('bfloat16', 64): attention_tiles(
            forward=(128, 64, 4, 3), forward_segments=(128, 64, 8, 3), dq=(64, 32, 4, 2), dkv=(32, 64, 4, 3)
        ),
        ('bfloat16', 128): attention_tiles(forward=(128, 64, 8, 2), dq=(64, 64, 8, 2), dkv=(32, 64, 8, 2)),
    },
)
_H100 = Chip(
    'sm_90',
    peak_flops={'H100': 989e12, 'H200': 989e12, 'GH200': 989e12},
    multiprocessors=132,
    shared_bytes=227 * 1024,
    attention=_FLOAT32
    | {
        ('bfloat16', 64): attention_tiles(
            forward=(64, 64, 4, 3), dq=(64, 64, 4, 2), dkv=(64, 64, 4, 3), dkv_segments=(32, 64, 4, 3)
        ),
        ('bfloat16', 128): attention_tiles(forward=(128, 128, 8, 2), dq=(64, 64, 8, 2), dkv=(32, 64, 8, 2)),
    },
)
CHIPS = {chip.name: chip for chip in (_A100, _H100)}
