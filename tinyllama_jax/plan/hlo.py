"""A compiled XLA program, read from its text: instructions, how often each runs, and its collectives.

XLA's text is no documented format: what is not understood raises, and the tests read programs of both
locked versions.
"""

import dataclasses
import functools
import itertools
import math
import operator
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

COLLECTIVES = ('all-gather', 'reduce-scatter', 'all-reduce', 'all-to-all', 'collective-permute', 'collective-broadcast')
_ITEM_BYTES = {
    'pred': 1, 's8': 1, 'u8': 1, 's16': 2, 'u16': 2, 's32': 4, 'u32': 4, 's64': 8, 'u64': 8,
    'bf16': 2, 'f16': 2, 'f32': 4, 'f64': 8,
}  # fmt: skip
_COMPARISONS = {'LT': operator.lt, 'LE': operator.le, 'GT': operator.gt, 'GE': operator.ge, 'NE': operator.ne}
_ARITHMETIC = {'add': operator.add, 'subtract': operator.sub, 'copy': int, 'bitcast': int}
_MOST_TRIPS = 10_000
_ARRAY = re.compile(r'\b([a-z]+[0-9]*)\[([\d,]*)\]')
_INSTRUCTION = re.compile(r'^\s+(ROOT )?%?([\w.\-]+) = (.*)$')
_HEADER = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{$')


@dataclasses.dataclass(frozen=True)
class Array:
    """Type and shape of one array."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Its size; tokens and tuples have none."""
        return math.prod(self.shape) * _ITEM_BYTES.get(self.dtype, 0)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation; `attributes` is what follows the operands."""

    name: str
    opcode: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    literal: str  # the operands as text: a parameter's number
    attributes: str

    @property
    def bytes(self) -> int:
        """Size of all results."""
        return sum(array.bytes for array in self.results)

    def called(self, role: str) -> str:
        """The computation that it calls in a role that it has: body, calls, to_apply."""
        return re.search(rf'\b{role}=%?([\w.\-]+)', self.attributes)[1]

    @property
    def kind(self) -> str | None:
        """Which of `COLLECTIVES` it is or starts, if any."""
        kind = self.opcode.removesuffix('-start')
        return kind if kind in COLLECTIVES else None


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in the order in which they run; the last named `root` is what it returns."""

    instructions: Mapping[str, Instruction]
    root: str

    def operands(self, instruction: Instruction) -> list[Instruction]:
        """The instructions whose results are its operands."""
        return [self.instructions[name] for name in instruction.operands]


@dataclasses.dataclass(frozen=True)
class Program:
    """All computations by name, and the first one's."""

    computations: Mapping[str, Computation]
    entry: str

    def executed(self, name: str | None = None, times: int = 1) -> Iterator[tuple[Instruction, Computation, int]]:
        """Each instruction that runs on its own, with its computation and how often it runs in one call.

        Of a conditional every branch counts; fusions are not entered.
        """
        computation = self.computations[name or self.entry]
        for instruction in computation.instructions.values():
            yield instruction, computation, times
            for called in bodies(instruction):
                yield from self.executed(called, times * self.trip_count(instruction, computation))

    def trip_count(self, instruction: Instruction, computation: Computation) -> int:
        """How often the body of a loop runs; 1 for what is no loop.

        XLA mostly says it. Where it does not, the counter is followed until the condition fails: it is
        that element of the loop's tuple which the condition looks at.
        """
        if instruction.opcode != 'while':
            return 1
        if match := re.search(r'known_trip_count":\{"n":"(\d+)"', instruction.attributes):
            return int(match[1])
        condition = self.computations[instruction.called('condition')]
        body = self.computations[instruction.called('body')]
        looked_at = next(i for i in condition.instructions.values() if i.opcode == 'get-tuple-element')
        index = int(re.search(r'index=(\d+)', looked_at.attributes)[1])
        (start,) = computation.operands(instruction)
        counter = self._scalar(computation, start.operands[index], {})
        following = body.instructions[body.root].operands[index]
        for count in range(_MOST_TRIPS):
            if not self._scalar(condition, condition.root, {'loop': counter}):
                return count
            counter = self._scalar(body, following, {'loop': counter})
        raise ValueError(f'the loop {instruction.name} does not end')

    def _scalar(self, computation: Computation, name: str, given: Mapping[str, int]) -> int:
        """The value of an integer; `given` has a loop's counter, or a fusion's parameters by number."""
        instruction = computation.instructions[name]
        if instruction.opcode == 'constant':
            return int(instruction.literal)
        if instruction.opcode == 'get-tuple-element':
            return given['loop']
        if instruction.opcode == 'parameter':
            return given[instruction.literal]
        values = [self._scalar(computation, operand, given) for operand in instruction.operands]
        if instruction.opcode == 'fusion':
            fused = self.computations[instruction.called('calls')]
            return self._scalar(fused, fused.root, {str(i): value for i, value in enumerate(values)})
        if instruction.opcode == 'compare':
            return _COMPARISONS[re.search(r'direction=(\w+)', instruction.attributes)[1]](*values)
        return _ARITHMETIC[instruction.opcode](*values)


def bodies(instruction: Instruction) -> list[str]:
    """The computations that run as a part of the program when the instruction does, a fusion's left out."""
    if instruction.opcode == 'while':
        return [instruction.called('body')]
    if instruction.opcode == 'call':
        return [instruction.called('to_apply')]
    if instruction.opcode == 'async-start':
        return [instruction.called('calls')]
    if instruction.opcode == 'conditional':
        branches = re.search(r'branch_computations=\{([^}]*)\}', instruction.attributes)
        if branches:
            return [name.strip().lstrip('%') for name in branches[1].split(',')]
        return [instruction.called('true_computation'), instruction.called('false_computation')]
    return []


def parse(text: str) -> Program:
    """A program from what `compiled.as_text()` gives."""
    computations, entry, name, instructions, root = {}, '', '', {}, ''
    for line in text.splitlines():
        if header := _HEADER.match(line):
            name, instructions, root = header[2], {}, ''
            entry = name if header[1] else entry
        elif line.startswith('}') and instructions:
            computations[name] = Computation(instructions, root)
        elif match := _INSTRUCTION.match(line):
            instructions[match[2]] = _instruction(match[2], match[3])
            root = match[2] if match[1] else root
    return Program(computations, entry)


def _instruction(name: str, text: str) -> Instruction:
    """From what follows `name =`: TYPE opcode(operands), attributes."""
    end = _closing(text, 0) + 1 if text.startswith('(') else text.index(' ')
    opcode, _, _ = text[end:].strip().partition('(')
    opening = text.index('(', end)
    closing = _closing(text, opening)
    literal = text[opening + 1 : closing]
    operands = tuple(re.findall(r'%([\w.\-]+)', literal))
    return Instruction(name, opcode.strip(), arrays(text[:end]), operands, literal, text[closing + 1 :])


def _closing(text: str, opening: int) -> int:
    """Where the parenthesis that opens at `opening` closes."""
    depth = 0
    for match in re.compile(r'[()]').finditer(text, opening):
        depth += 1 if match[0] == '(' else -1
        if not depth:
            return match.start()
    raise ValueError(f'a parenthesis is not closed in {text[:200]!r}')


def arrays(text: str) -> tuple[Array, ...]:
    """The arrays of a type as XLA prints it, a tuple's one after another."""
    return tuple(Array(dtype, _numbers(shape)) for dtype, shape in _ARRAY.findall(text))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, filter(None, text.split(','))))


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange between GPUs as it stands in the program."""

    kind: str
    dtypes: tuple[str, ...]
    groups: tuple[tuple[int, ...], ...]  # devices that exchange, by their place in the mesh
    operand_bytes: int  # on each device
    shapes: tuple[tuple[int, ...], ...]  # of the operands

    @property
    def group_size(self) -> int:
        """How many devices exchange with each other."""
        return len(self.groups[0])

    @property
    def sent_bytes(self) -> float:
        """What each device sends, as rings do: an all-reduce is a reduce-scatter and an all-gather."""
        n, size = self.group_size, self.operand_bytes
        return {
            'all-gather': size * (n - 1),
            'all-reduce': 2 * size * (n - 1) / n,
            'collective-permute': size,
            'collective-broadcast': size,
        }.get(self.kind, size * (n - 1) / n)


def collective(instruction: Instruction, computation: Computation, devices: int) -> Collective | None:
    """What an instruction exchanges; None if it is no collective, or one of a single device."""
    if not instruction.kind:
        return None
    groups = _groups(instruction.attributes, devices)
    operands = [array for operand in computation.operands(instruction) for array in operand.results]
    if len(groups[0]) == 1:
        return None
    return Collective(
        instruction.kind,
        tuple(sorted({array.dtype for array in operands})),
        groups,
        sum(array.bytes for array in operands),
        tuple(array.shape for array in operands),
    )


def _groups(attributes: str, devices: int) -> tuple[tuple[int, ...], ...]:
    """The replica groups, in any of the forms in which XLA writes them."""
    if pairs := re.search(r'source_target_pairs=\{(.*?)\}\}', attributes):
        found = [_numbers(pair) for pair in re.findall(r'\{([\d,]+)', pairs[0])]
        return tuple(found)
    if match := re.search(r'replica_groups=\{((?:\{[\d,]*\},?)*)\}', attributes):
        found = [_numbers(group) for group in re.findall(r'\{([\d,]*)\}', match[1])]
        return tuple(found) or (tuple(range(devices)),)
    if match := re.search(r'replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)', attributes):
        return _rows(_iota(match[2]).reshape(_numbers(match[1])))
    match = re.search(r'replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?\)?)\))? \{([^}]*)\}', attributes)
    if not match:
        raise ValueError(f'replica groups of an unknown form: {attributes[:200]!r}')
    return _mesh_groups(match[1], match[2] or f'[{devices}]', match[3])


def _iota(text: str) -> np.ndarray:
    """[2,8]T(1,0): counted along shape [2, 8], axes then transposed."""
    shape, _, order = text.partition('T')
    ids = np.arange(math.prod(_numbers(shape.strip('[]')))).reshape(_numbers(shape.strip('[]')))
    return ids.transpose(_numbers(order.strip('()'))) if order else ids


def _mesh_groups(mesh: str, ids: str, axes: str) -> tuple[tuple[int, ...], ...]:
    """mesh['a'=2,'b'=8] {'b', 'a':(1)2}: groups along named axes; :(p)n is the part of n after the first p."""
    dims = re.findall(r"'([^']+)'=(\d+)", mesh)
    chosen = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)
    parts, names = [], []  # every axis as (before, part, after) of each axis that is chosen in part
    for name, size in dims:
        sub = next(((int(before), int(part)) for axis, before, part in chosen if axis == name and part), (1, int(size)))
        parts += [sub[0], sub[1], int(size) // (sub[0] * sub[1])]
        names += [None, name, None]
    picked = [names.index(name) for name, _, _ in chosen]
    grid = _iota(ids).reshape(parts)
    rest = [axis for axis in range(grid.ndim) if axis not in picked]
    return _rows(grid.transpose(rest + picked).reshape(-1, math.prod(parts[axis] for axis in picked)))


def _rows(grid: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(device) for device in row) for row in grid)


def mesh_axes(groups: Sequence[Sequence[int]], sizes: Mapping[str, int]) -> str:
    """The axes of a mesh along which devices exchange, as `data+fsdp`; `other` if none fits.

    `sizes` holds the axes from the slowest to the fastest, as `jax.sharding.Mesh.shape` does.
    """
    wanted = {frozenset(group) for group in groups}
    names = [name for name, size in sizes.items() if size > 1]
    for count in range(1, len(names) + 1):
        for axes in itertools.combinations(names, count):
            if _axis_groups(axes, tuple(sizes.items())) == wanted:
                return '+'.join(axes)
    return 'other'


@functools.cache
def _axis_groups(axes: tuple[str, ...], sizes: tuple[tuple[str, int], ...]) -> set[frozenset[int]]:
    names = [name for name, _ in sizes]
    grid = np.arange(math.prod(size for _, size in sizes)).reshape([size for _, size in sizes])
    moved = np.moveaxis(grid, [names.index(axis) for axis in axes], range(-len(axes), 0))
    return {frozenset(row) for row in _rows(moved.reshape(-1, math.prod(dict(sizes)[axis] for axis in axes)))}
