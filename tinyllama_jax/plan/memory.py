"""What lies in a GPU's memory when a compiled step needs most of it, from XLA's own account of live ranges."""

import re
from collections.abc import Iterable
from typing import NamedTuple

from tinyllama_jax.plan import hlo
from tinyllama_jax.plan.hlo import Array, Instruction, Program

PARTS = (
    'parameters', 'optimiser state', 'gradients', 'saved activations', 'copies of parameters', 'loss', 'other buffers',
    'batch', 'gaps',
)  # fmt: skip
_ARGUMENT = re.compile(r'op_name="(\w[^"]*)"')
_ARGUMENTS = {'state.params': 'parameters', 'state.': 'optimiser state', 'rows': 'batch', 'segment': 'batch'}


class Value(NamedTuple):
    """An array in memory; two that lie at the same place are one, updated."""

    name: str  # of the instruction that makes it
    array: Array
    bytes: int
    place: tuple[int, int]  # allocation and offset


def at_peak(live_ranges: str, assignment: str) -> list[Value]:
    """The values alive at the peak, one a place; from XLA's dumped files of live ranges and buffer assignment."""
    values = _assigned(assignment)
    _, _, rest = live_ranges.partition('(peak):\n')
    names = re.findall(r'\s*(\S+): \d+ bytes \(cumulative', rest.partition('Stack trace')[0])
    found = sorted((values[name] for name in names if name in values), key=lambda value: value.bytes)
    return list({value.place: value for value in found}.values())


def _assigned(assignment: str) -> dict[str, Value]:
    """Every value of a program by its name{index}."""
    found, allocation = {}, -1
    for line in assignment.splitlines():
        if match := re.match(r'allocation (\d+):', line):
            allocation = int(match[1])
        elif match := re.match(r' value: <\d+ (\S+)(?: \(phi\))? @\d+> \(size=(\d+),offset=(\d+)\): (.*)', line):
            name, brace, index = match[1].partition('{')
            if not match[4].startswith('('):  # a tuple is a table of addresses
                (array,) = hlo.arrays(match[4])
                found[name + (brace + index or '{}')] = Value(name, array, int(match[2]), (allocation, int(match[3])))
    return found


def parts(values: Iterable[Value], program: Program, shapes: 'Shapes', peak_bytes: int) -> dict[str, int]:
    """Bytes of each of `PARTS` at the peak; `gaps` are left between buffers."""
    found = dict.fromkeys(PARTS, 0)
    instructions = {
        name: instruction
        for computation in program.computations.values()
        for name, instruction in computation.instructions.items()
    }
    for value in values:
        found[_part(instructions.get(value.name), value.array, shapes)] += value.bytes
    found['gaps'] = max(peak_bytes - sum(found.values()), 0)
    return found


class Shapes:
    """The sizes by which parameters and what has their shape are recognised, transposed though they may be."""

    def __init__(self, parameters: Iterable[tuple[int, ...]], layers: int, vocab: int):
        """Shapes of parameters, whole and as a device holds them, layers first; and two sizes of the model."""
        parameters = list(parameters)
        single = [shape[1:] for shape in parameters if shape[:1] == (layers,)]
        self.parameters = {_key(shape) for shape in parameters + single}
        self.layers, self.vocab = layers, vocab


def _key(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(size for size in shape if size > 1))


def _part(instruction: Instruction | None, array: Array, shapes: Shapes) -> str:
    """Which of `PARTS` an array belongs to that an instruction made."""
    if instruction and instruction.opcode == 'parameter' and (argument := _ARGUMENT.search(instruction.attributes)):
        return next((part for start, part in _ARGUMENTS.items() if argument[1].startswith(start)), 'batch')
    key = _key(array.shape)
    if (instruction and instruction.kind == 'all-gather') or (array.dtype != 'f32' and key in shapes.parameters):
        return 'copies of parameters'
    if key in shapes.parameters and len(key) > 1:
        return 'gradients'
    if array.shape[:1] == (shapes.layers,):
        return 'saved activations'
    return 'loss' if shapes.vocab in array.shape else 'other buffers'
