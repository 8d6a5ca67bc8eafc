"""What a GPU's memory holds at a compiled step's peak, from the files on live ranges and buffers that XLA dumps."""

import re
from collections.abc import Iterable
from typing import NamedTuple

from tinyllama_jax.plan import hlo
from tinyllama_jax.plan.hlo import Array, Instruction, Program

GIB = 2**30
PARTS = (
    'parameters',
    'optimiser state',
    'gradients',
    'saved activations',
    'copies of parameters',
    'loss',
    'other buffers',
    'batch',
    'gaps',
)
_ARGUMENT = re.compile(r'op_name="(\w[^"]*)"')
_ARGUMENTS = {'state.params': 'parameters', 'state.': 'optimiser state', 'rows': 'batch', 'segment': 'batch'}


class Value(NamedTuple):
    """An array in memory. Two values at one address are one array before and after an update in place."""

    name: str  # of the instruction that makes it
    array: Array
    bytes: int
    address: tuple[int, int]  # allocation and offset


def at_peak(live_ranges: str, assignment: str) -> list[Value]:
    """Returns the values alive at the peak, one for each address, from XLA's files of live ranges and buffers."""
    values = _assigned(assignment)
    _, _, rest = live_ranges.partition('(peak):\n')
    names = re.findall(r'\s*(\S+): \d+ bytes \(cumulative', rest.partition('Stack trace')[0])
    alive = sorted((values[name] for name in names if name in values), key=lambda value: value.bytes)
    return list({value.address: value for value in alive}.values())


def _assigned(assignment: str) -> dict[str, Value]:
    """Returns every value of a program by its name{index}."""
    values, allocation = {}, -1
    for line in assignment.splitlines():
        if match := re.match(r'allocation (\d+):', line):
            allocation = int(match[1])
        elif match := re.match(r' value: <\d+ (\S+)(?: \(phi\))? @\d+> \(size=(\d+),offset=(\d+)\): (.*)', line):
            name, brace, index = match[1].partition('{')
            if not match[4].startswith('('):  # a tuple is a table of addresses
                (array,) = hlo.arrays(match[4])
                values[name + (brace + index or '{}')] = Value(name, array, int(match[2]), (allocation, int(match[3])))
    return values


def parts(values: Iterable[Value], program: Program, shapes: 'Shapes', peak_bytes: int) -> dict[str, int]:
    """Returns the bytes of each of `PARTS` at the peak; `gaps` is the memory between buffers."""
    sizes = dict.fromkeys(PARTS, 0)
    instructions = {
        name: instruction
        for computation in program.computations.values()
        for name, instruction in computation.instructions.items()
    }
    for value in values:
        sizes[_part(instructions.get(value.name), value.array, shapes)] += value.bytes
    sizes['gaps'] = max(peak_bytes - sum(sizes.values()), 0)
    return sizes


class Shapes:
    """The shapes by which a buffer's part is recognised; a parameter's axes may come in any order.

    `parameters`: shapes of parameters, whole and as a device holds them, the axis of the layers first.
    """

    def __init__(self, parameters: Iterable[tuple[int, ...]], layers: int, vocab: int):
        parameters = list(parameters)
        single = [shape[1:] for shape in parameters if shape[:1] == (layers,)]
        self.parameters = {_key(shape) for shape in parameters + single}
        self.layers, self.vocab = layers, vocab


def _key(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(size for size in shape if size > 1))


def _part(instruction: Instruction | None, array: Array, shapes: Shapes) -> str:
    """Returns the one of `PARTS` to which an instruction's array belongs."""
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
