"""The table of chips: every row has what every kernel asks it for."""

import dataclasses
import itertools
import re

import pytest

from kernels import checks, chips, launch

EVERY = pytest.mark.parametrize('chip', [*chips.CHIPS.values(), launch.INTERPRETER], ids=lambda chip: chip.name)


@EVERY
def test_a_chip_has_tiles_for_all_that_the_kernels_take(chip):
    assert chip.attention.keys() == set(itertools.product(checks.KERNEL_DTYPES, checks.HEAD_DIMS))
    assert chip.streaming.keys() == chips.STREAMING.keys()
    for (dtype, head_dim), kernel in itertools.product(chip.attention, ('forward', 'dq', 'dkv')):
        for segments in (False, True):
            tile = chip.attention_tile(f'attention_{kernel}', dtype, head_dim, segments=segments)
            block_q, block_k = tile.sizes['BLOCK_Q'], tile.sizes['BLOCK_K']
            # tl.dot takes blocks of at least 16, and tl.arange powers of two.
            assert {block_q, block_k} <= {16, 32, 64, 128} and tile.warps in (4, 8)
            assert kernel != 'dkv' or block_k % block_q == 0, 'the kernel counts whole tiles of queries on the diagonal'


def test_chips_are_named_by_compute_capability():
    assert list(chips.CHIPS) == [chip.name for chip in chips.CHIPS.values()]
    assert all(re.fullmatch(r'sm_\d{2,3}', name) for name in chips.CHIPS)
    assert all(chip.multiprocessors > 100 and chip.shared_bytes > 160_000 for chip in chips.CHIPS.values())


def test_a_kernel_with_segment_ids_may_have_a_tile_of_its_own():
    tiles = chips.attention_tiles(forward=(64, 32, 4, 2), dq=(64, 64, 4, 2), dq_segments=(32, 64, 8, 3))
    chip = dataclasses.replace(launch.INTERPRETER, attention={('float32', 64): tiles})
    own = chip.attention_tile('attention_dq', 'float32', 64, segments=True)
    assert own == chips.Tile({'BLOCK_Q': 32, 'BLOCK_K': 64}, warps=8, stages=3)
    assert chip.attention_tile('attention_dq', 'float32', 64, segments=False) == tiles['attention_dq']
    assert chip.attention_tile('attention_forward', 'float32', 64, segments=True) == tiles['attention_forward']
