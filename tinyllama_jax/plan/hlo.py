"""A compiled XLA program, read from its text: instructions, how often each runs, and its collectives.

XLA does not document the format of this text: what the reader does not know raises ValueError, and the tests read
programs of both locked versions.
"""

import dataclasses
import itertools
import math
import operator
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

COLLECTIVES = ('all-gather', 'reduce-scatter', 'all-reduce', 'all-to-all', 'collective-permute', 'collective-broadcast')
# Bits of an element in memory, in which types below a byte are packed (layouts say E(4)); XLA's PrimitiveType.
_TYPES = {
    0: 'token opaque',
    1: 's1 u1',
    2: 's2 u2',
    4: 's4 u4 f4e2m1fn',
    8: 'pred s8 u8 f6e2m3fn f6e3m2fn f8e3m4 f8e4m3 f8e4m3fn f8e4m3fnuz f8e4m3b11fnuz f8e5m2 f8e5m2fnuz f8e8m0fnu',
    16: 's16 u16 f16 bf16',
    32: 's32 u32 f32',
    64: 's64 u64 f64 c64',
    128: 'c128',
}
_ELEMENT_BITS = {name: bits for bits, names in _TYPES.items() for name in names.split()}
_COMPARISONS = {'LT': operator.lt, 'LE': operator.le, 'GT': operator.gt, 'GE': operator.ge, 'NE': operator.ne}
_ARITHMETIC = {'add': operator.add, 'subtract': operator.sub, 'copy': int, 'bitcast': int}
_MOST_TRIPS = 10_000
_ARRAY = re.compile(r'\b([a-z]\w*)\[([^\]]*)\]')
_INSTRUCTION = re.compile(r'^\s+(ROOT )?%?([\w.\-]+) = (.*)$')
_HEADER = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{$')


@dataclasses.dataclass(frozen=True)
class Array:
    """Element type, as XLA writes it, and shape of one array. Raises ValueError for an unknown element type."""

    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self):
        if self.dtype not in _ELEMENT_BITS:
            raise ValueError(f'XLA element type {self.dtype} is unknown: add its size to _TYPES in plan/hlo.py')

    @property
    def bytes(self) -> int:
        """The size in memory; XLA's type `token` has none."""
        return -(-math.prod(self.shape) * _ELEMENT_BITS[self.dtype] // 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    literal: str  # the text between the parentheses: operands, a constant's value or a parameter's number
    attributes: str  # the text after the operands

    @property
    def bytes(self) -> int:
        """The size of all results."""
        return sum(array.bytes for array in self.results)

    def called(self, role: str) -> str:
        """Returns the name of the computation that it calls as `role`: body, calls or to_apply, for example."""
        return self.attribute(rf'\b{role}=%?([\w.\-]+)')

    def attribute(self, pattern: str) -> str:
        """Returns the first group of `pattern` in the attributes; raises ValueError if nothing matches."""
        if match := re.search(pattern, self.attributes):
            return match[1]
        raise ValueError(f'{self.opcode} {self.name} has no {pattern!r} in {self.attributes[:200]!r}')

    @property
    def kind(self) -> str | None:
        """The one of `COLLECTIVES` that it runs or starts, or None."""
        kind = self.opcode.removesuffix('-start')
        return kind if kind in COLLECTIVES else None


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in the order in which they run; the result of the one called `root` is returned."""

    instructions: Mapping[str, Instruction]
    root: str

    def operands(self, instruction: Instruction) -> list[Instruction]:
        """Returns the instructions whose results are the operands of `instruction`."""
        return [self.instructions[name] for name in instruction.operands]


@dataclasses.dataclass(frozen=True)
class Program:
    """All computations by name, and the name of the one that runs first."""

    computations: Mapping[str, Computation]
    entry: str

    def executed(self, name: str | None = None, times: int = 1) -> Iterator[tuple[Instruction, Computation, int]]:
        """Yields each instruction that runs on its own, its computation and how often it runs in one call.

        Every branch of a conditional counts. A fusion is one instruction.
        """
        computation = self.computations[name or self.entry]
        for instruction in computation.instructions.values():
            yield instruction, computation, times
            for called in bodies(instruction):
                yield from self.executed(called, times * self.trip_count(instruction, computation))

    def trip_count(self, instruction: Instruction, computation: Computation) -> int:
        """Returns how often the body of a loop runs; 1 for an instruction that is not a loop.

        XLA mostly states it. If not, the loop's counter is computed until the condition fails. The counter is the
        element of the loop's tuple that the condition reads.
        """
        if instruction.opcode != 'while':
            return 1
        if match := re.search(r'known_trip_count":\{"n":"(\d+)"', instruction.attributes):
            return int(match[1])
        condition = self.computations[instruction.called('condition')]
        body = self.computations[instruction.called('body')]
        counter_read = next(i for i in condition.instructions.values() if i.opcode == 'get-tuple-element')
        index = int(counter_read.attribute(r'index=(\d+)'))
        (start,) = computation.operands(instruction)
        counter = self._scalar(computation, start.operands[index], {})
        next_counter = body.instructions[body.root].operands[index]
        for count in range(_MOST_TRIPS):
            if not self._scalar(condition, condition.root, {'loop': counter}):
                return count
            counter = self._scalar(body, next_counter, {'loop': counter})
        raise ValueError(f'the loop {instruction.name} does not end')

    def _scalar(self, computation: Computation, name: str, given: Mapping[str, int]) -> int:
        """Returns an integer's value; `given` holds the loop's counter, or a fusion's parameters by number."""
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
            return _COMPARISONS[instruction.attribute(r'direction=(\w+)')](*values)
        return _ARITHMETIC[instruction.opcode](*values)


def bodies(instruction: Instruction) -> list[str]:
    """Returns the names of the computations that an instruction runs, except a fusion's."""
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
    """Returns the program in the text that `compiled.as_text()` returns."""
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
    """Parses what follows `name =`: TYPE opcode(operands), attributes."""
    end = _closing(text, 0) + 1 if text.startswith('(') else text.index(' ')
    opcode, _, _ = text[end:].strip().partition('(')
    opening = text.index('(', end)
    closing = _closing(text, opening)
    literal = text[opening + 1 : closing]
    operands = tuple(re.findall(r'%([\w.\-]+)', literal))
    return Instruction(name, opcode.strip(), arrays(text[:end]), operands, literal, text[closing + 1 :])


def _closing(text: str, opening: int) -> int:
    """Returns the index of the parenthesis that closes the one at `opening`."""
    depth = 0
    for match in re.compile(r'[()]').finditer(text, opening):
        depth += 1 if match[0] == '(' else -1
        if not depth:
            return match.start()
    raise ValueError(f'a parenthesis is not closed in {text[:200]!r}')


def arrays(text: str) -> tuple[Array, ...]:
    """Returns the arrays in a type as XLA prints it; a tuple has one for each element."""
    return tuple(Array(dtype, _numbers(shape)) for dtype, shape in _ARRAY.findall(text))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, filter(None, text.split(','))))


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange between GPUs."""

    kind: str  # of COLLECTIVES
    dtypes: tuple[str, ...]
    groups: tuple[tuple[int, ...], ...]  # devices that exchange with each other, by their index in the mesh
    operand_bytes: int  # on each device
    shapes: tuple[tuple[int, ...], ...]  # of the operands

    @property
    def sent_bytes(self) -> float:
        """The bytes that each device sends in a ring; an all-reduce is a reduce-scatter and an all-gather."""
        n, size = len(self.groups[0]), self.operand_bytes
        return {
            'all-gather': size * (n - 1),
            'all-reduce': 2 * size * (n - 1) / n,
            'collective-permute': size,
            'collective-broadcast': size,
        }.get(self.kind, size * (n - 1) / n)


def collective(instruction: Instruction, computation: Computation, devices: int) -> Collective | None:
    """Returns what an instruction exchanges; None if it is not a collective, or one of a single device."""
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
    """Parses the replica groups, in each of the four forms in which XLA writes them."""
    if pairs := re.search(r'source_target_pairs=\{(.*?)\}\}', attributes):
        return tuple(_numbers(pair) for pair in re.findall(r'\{([\d,]+)', pairs[0]))
    if match := re.search(r'replica_groups=\{((?:\{[\d,]*\},?)*)\}', attributes):
        groups = tuple(_numbers(group) for group in re.findall(r'\{([\d,]*)\}', match[1]))
        return groups or (tuple(range(devices)),)
    if match := re.search(r'replica_groups=\[(\d+,\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)', attributes):
        return _groups_along(_iota(match[2]).reshape(_numbers(match[1])), [1])
    match = re.search(r'replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?\)?)\))? \{([^}]*)\}', attributes)
    if not match:
        raise ValueError(f'replica groups in an unknown form: {attributes[:200]!r}')
    return _mesh_groups(match[1], match[2] or f'[{devices}]', match[3])


def _iota(text: str) -> np.ndarray:
    """Returns the device numbers that XLA writes as [2,8]T(1,0): counted along shape [2, 8], then transposed."""
    shape, _, order = text.partition('T')
    ids = np.arange(math.prod(_numbers(shape.strip('[]')))).reshape(_numbers(shape.strip('[]')))
    return ids.transpose(_numbers(order.strip('()'))) if order else ids


def _mesh_groups(mesh: str, ids: str, axes: str) -> tuple[tuple[int, ...], ...]:
    """Returns the groups that XLA writes as mesh['a'=2,'b'=8] {'a', 'b':(2)4}: along axes, or along parts of axes.

    'b':(2)4 views axis b, of size 8, as three axes of sizes 2, 4 and 1; the groups lie along the second.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    chosen = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)
    parts = {name: (1, size, 1) for name, size in sizes.items()}
    for name, before, part in chosen:
        if part:
            parts[name] = int(before), int(part), sizes[name] // (int(before) * int(part))
    grid = _iota(ids).reshape([size for three in parts.values() for size in three])
    return _groups_along(grid, [3 * list(parts).index(name) + 1 for name, _, _ in chosen])


def _groups_along(grid: np.ndarray, axes: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Returns the groups of devices of a grid that differ only in their positions along `axes`."""
    moved = np.moveaxis(grid, axes, range(-len(axes), 0))
    return tuple(map(tuple, moved.reshape(-1, math.prod(grid.shape[axis] for axis in axes)).tolist()))


def mesh_axes(groups: Sequence[Sequence[int]], sizes: Mapping[str, int]) -> str:
    """Returns the mesh axes along which devices exchange, such as `data+fsdp`; `other` if no axes match.

    `sizes` maps axes to sizes, the slowest axis first, as `jax.sharding.Mesh.shape` does.
    """
    wanted = {frozenset(group) for group in groups}
    names, shape = list(sizes), tuple(sizes.values())
    grid = np.arange(math.prod(shape)).reshape(shape)
    several = [axis for axis, size in enumerate(shape) if size > 1]
    for count in range(1, len(several) + 1):
        for axes in itertools.combinations(several, count):
            if set(map(frozenset, _groups_along(grid, axes))) == wanted:
                return '+'.join(names[axis] for axis in axes)
    return 'other'
