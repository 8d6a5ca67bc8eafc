"""Registers, shared memory and spills of every kernel on every chip, without a GPU: `python -m kernels.resources`.

Every kernel that an op launches, forward and backward, at the shapes of the 1.1 B model, is compiled by
Triton and assembled by its ptxas. Exits with 1 if one of them spills registers, needs global scratch or
more shared memory than a block has, or rounds float32 to TF32.
"""

import argparse
import atexit
import dataclasses
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import attention, chips, cross_entropy, rms_norm, rope, swiglu
from kernels.chips import Tile

_POINTERS = {'bfloat16': '*bf16', 'float32': '*fp32', 'int32': '*i32'}
_TOOLS = pathlib.Path(triton.__file__).parent / 'backends/nvidia/bin'
# The 1.1 B model (paper, table 1), at a micro-batch of 8.
_B, _T, _N, _K, _D, _F, _V = 8, 2048, 32, 4, 2048, 5632, 32000


@dataclasses.dataclass(frozen=True)
class Launch:
    """A kernel and what it is compiled for; `variant` names the dtype and the options."""

    kernel: triton.JITFunction
    variant: str
    arrays: tuple
    tile: Tile
    constants: dict

    @property
    def name(self) -> str:
        """The kernel and its variant, such as attention_forward bfloat16 H64."""
        back = ' back' if self.constants.get('SIGN') == -1 else ''  # rope's own gradient
        return f'{self.kernel.__name__.removesuffix("_kernel")} {self.variant}{back}'


def launches(chip: str) -> list[Launch]:
    """Returns every kernel that the ops launch at 1.1 B shapes, for each dtype, head dim and option."""
    launched = []
    for dtype in ('bfloat16', 'float32'):
        for H in (64, 128):
            launched += _attention(chip, dtype, H, segments=False) + _attention(chip, dtype, H, segments=True)
        launched += _streaming(chip, dtype)
    return list({each.name: each for each in launched}.values())


def _recorded(chip: str, variant: str, function, *arrays) -> list[Launch]:
    """Returns what `function(chip, *arrays)` and its gradient launch."""
    recorded = []

    def record(_, kernel, inputs, outputs, grid, tile, constants):
        recorded.append(Launch(kernel, variant, (*inputs, *outputs), tile, constants))
        return tuple(jnp.zeros(output.shape, output.dtype) for output in outputs)

    recorder = dataclasses.replace(chips.CHIPS[chip], run=record)

    def gradients(*arrays):
        out, vjp = jax.vjp(lambda *arrays: function(recorder, *arrays), *arrays)
        return vjp(out)

    jax.eval_shape(gradients, *arrays)
    return recorded


def _attention(chip: str, dtype: str, H: int, *, segments: bool) -> list[Launch]:
    q, k = (jax.ShapeDtypeStruct((_B, _T, heads, H), dtype) for heads in (_N, _K))

    def function(chip, q, k, v):
        ids_BT = jnp.zeros((_B, _T), jnp.int32) if segments else None
        return attention.attention(q, k, v, ids_BT, chip)

    launched = _recorded(chip, f'{dtype} H{H}' + ' segments' * segments, function, q, k, k)
    return [each for each in launched if each.constants.get('SEGMENTS', False) == segments]


def _streaming(chip: str, dtype: str) -> list[Launch]:
    """Returns the launches of the ops that stream memory."""
    x, scale = jax.ShapeDtypeStruct((_B, _T, _D), dtype), jax.ShapeDtypeStruct((_D,), jnp.float32)
    queries, keys = (jax.ShapeDtypeStruct((_B, _T, heads, 64), dtype) for heads in (_N, _K))
    wide = jax.ShapeDtypeStruct((_B, _T, _F), dtype)
    head = jax.ShapeDtypeStruct((_D, _V), dtype)

    def normed(chip, x, scale, residual=None):
        return rms_norm.rms_norm(x, scale, residual, 1e-5, chip)

    def turned(chip, x):
        return rope.rope(x, jnp.zeros((_B, _T), jnp.int32), 10_000.0, 1.0, chip)

    def loss(chip, x, head):
        targets_BT, options = jnp.zeros((_B, _T), jnp.int32), {'weights_BT': None, 'z_loss': 0.0, 'vocab_axis': None}
        return cross_entropy.cross_entropy(x, head, targets_BT, **options, chip=chip)[0]

    return [
        *_recorded(chip, dtype, normed, x, scale),
        *_recorded(chip, f'{dtype} residual', normed, x, scale, x),
        *_recorded(chip, f'{dtype} N{_N}', turned, queries),
        *_recorded(chip, f'{dtype} N{_K}', turned, keys),
        *_recorded(chip, dtype, lambda chip, gate, up: swiglu.swiglu(gate, up, chip), wide, wide),
        *_recorded(chip, dtype, loss, x, head),
    ]


def compiled(launched: Launch, chip: str):
    """Returns the kernel compiled by Triton as jax-triton does it: every address is a multiple of 16 bytes."""
    pointers = [_POINTERS[array.dtype.name] for array in launched.arrays]
    names = launched.kernel.arg_names
    signature = dict(zip(names, pointers, strict=False)) | dict.fromkeys(names[len(pointers) :], 'constexpr')
    source = ASTSource(
        fn=launched.kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in launched.constants.items()},
        attrs={(i,): [['tt.divisibility', 16]] for i in range(len(pointers))},
    )
    if not os.environ.get('TRITON_CACHE_DIR'):  # jax-triton sets it to '', which Triton takes for a path
        os.environ['TRITON_CACHE_DIR'] = tempfile.mkdtemp(prefix='triton-')
        atexit.register(shutil.rmtree, os.environ['TRITON_CACHE_DIR'], ignore_errors=True)
    target = GPUTarget('cuda', int(chip.removeprefix('sm_')), 32)
    options = {'num_warps': launched.tile.warps, 'num_stages': launched.tile.stages}
    return triton.compile(source, target=target, options=options)


def usage(launched: Launch, chip: str) -> dict:
    """Returns a kernel's needs; `spills` counts loads and stores, `tf32` the instructions that round float32."""
    binary = compiled(launched, chip)
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(binary.asm['cubin'])
        file.flush()
        resources = _output_of('cuobjdump', '--dump-resource-usage', file.name)
        registers, stack, local = (
            int(re.findall(rf'{name}:(\d+)', resources)[0]) for name in ('REG', 'STACK', 'LOCAL')
        )
        # A kernel that spills has a stack; the others are not disassembled, which takes longer than most compilations.
        code = _output_of('nvdisasm', '-c', file.name) if stack or local else ''
    return {
        'kernel': launched.name,
        'chip': chip,
        'registers': registers,
        'spills': len(re.findall(r'\b(?:STL|LDL)\b', code)),
        'shared_bytes': binary.metadata.shared,
        'global_scratch_bytes': binary.metadata.global_scratch_size,
        'tf32': len(re.findall(r'\.tf32', binary.asm['ptx'])),
    }


def _output_of(tool: str, *arguments: str) -> str:
    return subprocess.run([_TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def table() -> list[dict]:
    """Returns the usage of every kernel on every chip; prints its progress on stderr."""
    pairs, rows = [(launched, chip) for chip in chips.CHIPS for launched in launches(chip)], []
    for number, (launched, chip) in enumerate(pairs, start=1):
        print(f'[{number}/{len(pairs)}] {launched.name} on {chip}', file=sys.stderr)
        rows.append(usage(launched, chip))
    return rows


def faults(row: dict) -> list[str]:
    """Returns why a kernel would run slowly or wrongly on its chip; empty if nothing is wrong."""
    reasons = [f'{row[name]} {name}' for name in ('spills', 'global_scratch_bytes', 'tf32') if row[name]]
    limit = chips.CHIPS[row['chip']].shared_bytes
    if row['shared_bytes'] > limit:
        reasons.append(f'{row["shared_bytes"]} shared_bytes of {limit}')
    return reasons


def markdown(rows: list[dict]) -> str:
    """Returns the table in Markdown, as docs/kernels.md holds it."""
    columns = list(rows[0])
    lines = ['| ' + ' | '.join(column.replace('_', ' ') for column in columns) + ' |', '|' + '---|' * len(columns)]
    return '\n'.join(lines + ['| ' + ' | '.join(str(row[column]) for column in columns) + ' |' for row in rows])


def main(*arguments: str) -> int:
    """Prints the table as Markdown or JSON and returns the exit status."""
    parser = argparse.ArgumentParser(prog='python -m kernels.resources', description=__doc__.partition('\n')[0])
    parser.add_argument('--json', action='store_true', help='print a list of objects instead of a table')
    flags, rows = parser.parse_args(arguments), table()
    print(json.dumps(rows, indent=1) if flags.json else markdown(rows))
    bad = {f'{row["kernel"]} on {row["chip"]}': faults(row) for row in rows if faults(row)}
    for kernel, reasons in bad.items():
        print(f'{kernel}: {", ".join(reasons)}', file=sys.stderr)
    return 1 if bad else 0


if __name__ == '__main__':
    sys.exit(main(*sys.argv[1:]))
