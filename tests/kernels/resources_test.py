"""Every kernel, compiled for each chip at the shapes of the 1.1 B model; and the table in docs/kernels.md."""

import json
import re
import sys

import pytest

from kernels import chips
from tests.conftest import ROOT
from tests.support import kernel_checks

pytestmark = kernel_checks.needs_triton
pytest.importorskip('triton', reason='Triton is there for Linux on x86-64 and ARM only')
from kernels import resources  # noqa: E402

OPS = ('attention', 'rms_norm', 'rope', 'swiglu', 'cross_entropy')


# The compiler is the same on both versions of Python: one goes through all but what takes longest to compile, the
# other through what the 1.1 B model runs on the newer chip. `python -m kernels.resources` goes through everything.
MOST = sys.version_info < (3, 12)


def _chosen(name: str) -> bool:
    return 'float32 H128' not in name if MOST else 'float32' not in name and 'H128' not in name


@pytest.mark.parametrize('chip', list(chips.CHIPS)[0 if MOST else -1 :])
def test_no_kernel_spills_or_asks_for_more_than_the_chip_has(chip):
    launches = resources.launches(chip)
    rows = [resources.usage(each, chip) for each in launches if _chosen(each.name)]
    assert not {f'{row["kernel"]} on {chip}': resources.faults(row) for row in rows if resources.faults(row)}
    names = {row['kernel'] for row in rows}
    assert len(names) == len(rows) and all(any(name.startswith(op) for name in names) for op in OPS)
    assert all(row['registers'] > 0 for row in rows)
    found = {row['kernel']: (row['registers'], row['spills'], row['shared_bytes']) for row in rows}
    documented = _documented(chip)
    assert documented.keys() == {each.name for each in launches}
    assert {name: documented[name] for name in found} == found, (
        'docs/kernels.md is older than the kernels; replace its table by what python -m kernels.resources prints'
    )


def _documented(chip: str) -> dict[str, tuple[int, ...]]:
    """Returns kernel -> (registers, spills, shared bytes) of a chip's rows in docs/kernels.md."""
    text = (ROOT / 'docs/kernels.md').read_text()
    rows = re.findall(rf'^\| (\S[^|]*\S) \| {chip} \| (\d+) \| (\d+) \| (\d+) \|', text, re.MULTILINE)
    return {kernel: tuple(map(int, figures)) for kernel, *figures in rows}


@pytest.mark.parametrize(
    ('change', 'fault'),
    [
        ({'spills': 3}, '3 spills'),
        ({'global_scratch_bytes': 64}, '64 global_scratch_bytes'),
        ({'tf32': 8}, '8 tf32'),
        ({'shared_bytes': 170_000}, '170000 shared_bytes of 166912'),
    ],
)
def test_faults_are_found(change, fault):
    row = {'chip': 'sm_80', 'spills': 0, 'shared_bytes': 0, 'global_scratch_bytes': 0, 'tf32': 0}
    assert resources.faults(row) == []
    assert resources.faults(row | change) == [fault]


def test_the_command_prints_json_and_fails_on_a_fault(monkeypatch, capsys):
    row = {'kernel': 'k', 'chip': 'sm_90', 'registers': 9, 'spills': 0, 'shared_bytes': 1, 'global_scratch_bytes': 0}
    monkeypatch.setattr(resources, 'table', lambda: [row | {'tf32': 0}])
    assert resources.main('--json') == 0
    (printed,) = json.loads(capsys.readouterr().out)
    assert printed.items() >= row.items()
    monkeypatch.setattr(resources, 'table', lambda: [row | {'tf32': 0, 'spills': 7}])
    assert resources.main() == 1
    assert 'k on sm_90: 7 spills' in capsys.readouterr().err
    with pytest.raises(SystemExit, match='2'):
        resources.main('--jsn')


def test_a_kernel_that_spills_is_seen():
    wanted = 'attention_dkv bfloat16 H64'
    launched = next(launched for launched in resources.launches('sm_80') if launched.name == wanted)
    tile = chips.Tile({'BLOCK_Q': 64, 'BLOCK_K': 64}, warps=4)
    too_large = resources.dataclasses.replace(launched, tile=tile, constants=launched.constants | tile.sizes)
    assert resources.usage(too_large, 'sm_80')['spills'] > 0
