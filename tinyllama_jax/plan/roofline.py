"""Estimates the least time of a compiled step: each instruction by its bottleneck, exchanges beside other work.

- A matrix product takes its FLOPs at the rate of the fastest product measured on the chip, times the share of its waves
  of tiles that is filled; then it writes its tiles. Attention takes its FLOPs at a published rate.
- Every other instruction takes the bytes that it reads and writes, at the memory's bandwidth.
- An exchange takes the bytes that it sends over the slower of NVLink and network. It hides behind the instructions that
  XLA schedules between its start and its end; it leaves their products and attention fewer multiprocessors.

Nothing is fitted to a training run; docs/plan.md lists what is left out.
"""

import codecs
import collections
import dataclasses
import math
import re
import zlib

from tinyllama_jax.plan import hlo, targets
from tinyllama_jax.plan.hlo import Collective, Computation, Instruction, Program
from tinyllama_jax.plan.targets import Target

KINDS = ('matrix products', 'attention', 'memory', 'exchange')
_COMPUTED = KINDS[:2]  # slower with fewer multiprocessors
_FREE = {
    'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'while', 'conditional', 'call', 'after-all',
    'partition-id', 'replica-id', 'opt-barrier', 'async-start', 'async-update', 'async-done', 'add-dependency',
}  # fmt: skip
# Blocks of the output that a multiprocessor computes at once in a library (NVIDIA, Matrix Multiplication Background).
_TILES = ((256, 128), (128, 256), (128, 128))
_FUSIONS = ('fusion', 'fusion-start')
_SLICES = ('dynamic-slice', 'slice', 'gather')
# FLOPs of each attention kernel over those of a forward pass, which has two matrix products. Published rates count five
# for a backward pass; our two kernels compute three and four (kernels/attention.py).
_ATTENTION = {'attention_forward': 1.0, 'attention_dq': 2.5 * 3 / 7, 'attention_dkv': 2.5 * 4 / 7}


@dataclasses.dataclass(frozen=True)
class Machine:
    """A cluster's rates, and the sequence length of attention."""

    target: Target
    devices: int
    gpus_per_node: int
    seq_len: int

    def exchange_seconds(self, exchange: Collective) -> float:
        """Returns the time of a collective in a ring: over NVLink, and between nodes over each member's own adapter."""
        nodes, members = self._nodes(exchange)
        inside = exchange.sent_bytes / (targets.NVLINK_SHARE * self.target.nvlink_bandwidth)
        across = exchange.sent_bytes / (members * targets.NETWORK_SHARE * self.target.network_bandwidth)
        return max(inside if members > 1 else 0.0, across if nodes > 1 else 0.0)

    def left_by(self, exchange: Collective) -> float:
        """Returns the share of the multiprocessors that a collective leaves to kernels that run beside it."""
        nodes, members = self._nodes(exchange)
        links = members if nodes > 1 else self.target.nvlinks
        return 1 - min(targets.CHANNELS_PER_LINK * links, targets.MOST_CHANNELS) / self.target.multiprocessors

    def _nodes(self, exchange: Collective) -> tuple[int, int]:
        """Returns (number of nodes, members in the node with the fewest) of a collective's groups."""
        counts = collections.Counter(device // self.gpus_per_node for device in exchange.groups[0])
        return len(counts), min(counts.values())

    def memory_seconds(self, size: float) -> float:
        """Returns the time of moving this many bytes to or from the GPU's memory."""
        return size / (targets.MEMORY_SHARE * self.target.memory_bandwidth)


@dataclasses.dataclass
class Estimate:
    """The time of one step; `seconds` maps each of KINDS to its seconds, without those of exchanges that are hidden."""

    seconds: dict[str, float] = dataclasses.field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))
    hidden: float = 0.0  # seconds of exchanges that run beside other work

    @property
    def total(self) -> float:
        """The seconds of the step."""
        return sum(self.seconds.values())

    def add(self, other: 'Estimate', times: int) -> None:
        """Adds another estimate `times` times."""
        for kind, seconds in other.seconds.items():
            self.seconds[kind] += times * seconds
        self.hidden += times * other.hidden

    def wait(self, until: float) -> None:
        """Adds the time until an exchange ends, `until` seconds after the start; it counted as hidden before."""
        waited = max(until - self.total, 0.0)
        self.seconds['exchange'] += waited
        self.hidden -= waited


def estimate(program: Program, machine: Machine, name: str | None = None) -> Estimate:
    """Estimates a step's time: instructions run one after another as scheduled; so do exchanges, beside them.

    `name`: the computation to estimate; default: the program's entry.
    """
    computation = program.computations[name or program.entry]
    spent, ends, line_free, left = Estimate(), {}, 0.0, 1.0
    for instruction in computation.instructions.values():
        exchanges = _exchanges(instruction, computation, program, machine)
        if exchanges:
            seconds = sum(map(machine.exchange_seconds, exchanges))
            left = min(map(machine.left_by, exchanges))
            line_free = max(line_free, spent.total) + seconds
            ends[instruction.name] = line_free
            spent.hidden += seconds
            if not instruction.opcode.endswith('-start'):
                spent.wait(line_free)
        elif instruction.opcode.endswith('-done') and instruction.operands[0] in ends:
            spent.wait(ends[instruction.operands[0]])
        elif bodies := hlo.bodies(instruction):
            for body in bodies:
                spent.add(estimate(program, machine, body), program.trip_count(instruction, computation))
        else:
            kind, seconds = _work(instruction, computation, program, machine)
            # While an exchange runs beside it, the instruction has only `left` of the multiprocessors.
            shared = max(min(line_free - spent.total, seconds / left), 0.0) if kind in _COMPUTED else 0.0
            spent.seconds[kind] += seconds + shared * (1 - left)
    spent.wait(line_free)
    return spent


def _exchanges(
    instruction: Instruction, computation: Computation, program: Program, machine: Machine
) -> list[Collective]:
    """Returns the exchanges that an instruction starts."""
    if instruction.opcode == 'async-start':
        inner = program.computations[instruction.called('calls')]
        parts = [hlo.collective(each, inner, machine.devices) for each in inner.instructions.values()]
    else:
        parts = [hlo.collective(instruction, computation, machine.devices)]
    return [part for part in parts if part]


def _work(instruction: Instruction, computation: Computation, program: Program, machine: Machine) -> tuple[str, float]:
    """Returns (kind, seconds) of an instruction that is not an exchange; kind is one of KINDS."""
    if instruction.opcode in _FREE or instruction.opcode.endswith('-done') or instruction.kind:
        return 'memory', 0.0
    size = machine.memory_seconds(_bytes(instruction, computation, program))
    inside, computation = _inside(instruction, computation, program)
    products = [each for each in inside if _is_product(each)]
    multiplied = sum(_product_seconds(each, computation, machine.target) for each in products)
    multiplied += machine.memory_seconds(sum(each.results[0].bytes for each in products))  # tiles are written last
    attention = sum(_attention_seconds(each, computation, machine) for each in inside)
    kind = 'matrix products' if products else 'attention' if attention else 'memory'
    return kind, targets.KERNEL_GAP + max(size, multiplied + attention)


def _inside(
    instruction: Instruction, computation: Computation, program: Program
) -> tuple[list[Instruction], Computation]:
    """Returns the instructions of a fusion, such as a product and the slices around it, or `instruction` alone."""
    if instruction.opcode not in _FUSIONS:
        return [instruction], computation
    fused = program.computations[instruction.called('calls')]
    return list(fused.instructions.values()), fused


def product_flops(program: Program) -> float:
    """Returns the FLOPs of a step's matrix products on each GPU: with recomputed ones, without attention's."""
    total = 0.0
    for instruction, computation, times in program.executed():
        inside, computation = _inside(instruction, computation, program)
        total += times * sum(2 * math.prod(_product_sizes(each, computation)) for each in inside if _is_product(each))
    return total


def _is_product(instruction: Instruction) -> bool:
    return instruction.opcode == 'dot' or any(name in _called_library(instruction) for name in ('matmul', 'gemm'))


def _called_library(instruction: Instruction) -> str:
    """Returns the target of a custom call; '' for another instruction."""
    match = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
    return match[1] if match else ''


def _product_seconds(instruction: Instruction, computation: Computation, target: Target) -> float:
    """Returns the time of a product's FLOPs: float32 without tensor cores, every other type at the rate of bf16."""
    M, N, K, count = _product_sizes(instruction, computation)
    if computation.operands(instruction)[0].results[0].dtype == 'f32':
        units = target.description['core_count'] * target.description['fpus_per_core']
        return 2 * count * M * N * K / (2 * units * target.description['clock_rate_ghz'] * 1e9)
    filled = 0.0  # the share of the tiles in the product's waves that holds results, with the best of _TILES
    for rows, columns in _TILES:
        waves = math.ceil(count * math.ceil(M / rows) * math.ceil(N / columns) / target.multiprocessors)
        filled = max(filled, count * M * N / (waves * target.multiprocessors * rows * columns))
    return 2 * count * M * N * K / (target.matmul_flops * filled)


def _product_sizes(instruction: Instruction, computation: Computation) -> tuple[int, int, int, int]:
    """Returns (M, N, K, count) of `count` products [M, K] x [K, N]."""
    left, right = (operand.results[0] for operand in computation.operands(instruction)[:2])
    K = math.prod(left.shape[i] for i in _dimensions(instruction, 'lhs_contracting'))
    count = math.prod(left.shape[i] for i in _dimensions(instruction, 'lhs_batch'))
    return math.prod(left.shape) // (K * count), math.prod(right.shape) // (K * count), K, count


def _dimensions(instruction: Instruction, role: str) -> tuple[int, ...]:
    """Returns the axes in a `role` such as lhs_contracting, of a dot or in a library call's JSON."""
    text = re.search(rf'{role}_dim(?:ension)?s"?[=:][\[{{]([^\]}}]*)', instruction.attributes)
    return tuple(map(int, re.findall(r'\d+', text[1]))) if text else ()


def triton_kernel(instruction: Instruction) -> str:
    """Returns the name of the kernel that a jax-triton call launches, without its suffix _kernel.

    Raises ValueError if there is none.
    """
    packed = instruction.attribute(r'backend_config="((?:[^"\\]|\\.)*)"')
    text = zlib.decompress(codecs.escape_decode(packed.encode())[0])
    if name := re.search(rb'([a-z_]+)_kernel', text):
        return name[1].decode()
    raise ValueError(f'the call {instruction.name} of jax-triton names no kernel')


def _attention_seconds(instruction: Instruction, computation: Computation, machine: Machine) -> float:
    """Returns the time of causal attention; forward it is 2 T FLOPs for each element of the queries.

    The queries are the largest operand. Other instructions take 0 seconds.
    """
    called, share = _called_library(instruction), 0.0
    if 'cudnn' in called and 'fmha' in called:
        share = 2.5 if 'Backward' in called else 1.0
    elif called == 'triton_kernel_call':
        share = _ATTENTION.get(triton_kernel(instruction), 0.0)
    if not share:
        return 0.0
    arrays = [array for operand in computation.operands(instruction) for array in operand.results]
    forward, backward = machine.target.attention_flops
    flops = 2 * machine.seq_len * max(math.prod(array.shape) for array in arrays)
    return share * flops / (forward if share == 1.0 else backward)


def _bytes(instruction: Instruction, computation: Computation, program: Program) -> float:
    """Returns the bytes that an instruction reads and writes; slices and updates in place count their own part only."""
    operands = computation.operands(instruction)
    if instruction.opcode in _FUSIONS:
        return _fusion_bytes(program.computations[instruction.called('calls')])
    if instruction.opcode == 'copy-start':
        return 2 * sum(operand.bytes for operand in operands)
    if instruction.opcode in _SLICES:
        return 2 * instruction.bytes
    if instruction.opcode == 'dynamic-update-slice':
        return 2 * operands[1].bytes
    return instruction.bytes + sum(operand.bytes for operand in operands)


def _fusion_bytes(fused: Computation) -> float:
    """Returns the bytes that a fusion reads and writes: of a sliced or updated array, only the slices or the update."""
    root = fused.instructions[fused.root]
    total, updated = 0.0, set()
    for each in fused.operands(root) if root.opcode == 'tuple' else [root]:
        result = _source(fused, each)
        if result.opcode == 'dynamic-update-slice':
            array, update = fused.operands(result)[:2]
            total += update.bytes
            updated.add(_source(fused, array).name)
        else:
            total += result.bytes
    for parameter in fused.instructions.values():
        if parameter.opcode == 'parameter' and parameter.name not in updated:
            users = [user for user in fused.instructions.values() if parameter.name in user.operands]
            sliced = all(user.opcode in _SLICES and user.operands[0] == parameter.name for user in users)
            total += sum(user.bytes for user in users) if sliced else parameter.bytes
    return total


def _source(fused: Computation, instruction: Instruction) -> Instruction:
    """Returns the instruction that computes an array, behind bitcasts."""
    while instruction.opcode == 'bitcast':
        (instruction,) = fused.operands(instruction)
    return instruction
