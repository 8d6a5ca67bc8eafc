"""How long a compiled step takes at best: every instruction by what binds it, exchanges beside what hides them.

A matrix product takes its FLOPs at the rate of the fastest product measured on the chip, times the share
of its last wave of tiles that is filled, and then writes its tiles; attention its FLOPs at a published rate;
everything else the bytes it reads and writes at the memory's bandwidth. An exchange takes what it sends over
the slower of NVLink and network, and hides behind whatever XLA has scheduled between its start and its end,
whose products and attention it leaves fewer multiprocessors. Nothing is fitted to a training run;
docs/plan.md lists what is left out.
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
_COMPUTED = KINDS[:2]  # what fewer multiprocessors slow down
_FREE = {
    'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'while', 'conditional', 'call', 'after-all',
    'partition-id', 'replica-id', 'opt-barrier', 'async-start', 'async-update', 'async-done', 'add-dependency',
}  # fmt: skip
# Blocks of the output that a library's multiprocessor makes at once (NVIDIA, Matrix Multiplication Background).
_TILES = ((256, 128), (128, 256), (128, 128))
_FUSIONS = ('fusion', 'fusion-start')
_SLICES = ('dynamic-slice', 'slice', 'gather')
# Matrix products of each kernel over those of a forward pass, which are two (kernels/attention.py); FLOP rates
# are published for a backward pass of five, as two kernels make seven of them.
_BACKWARD = {'attention_dq': 2.5 * 3 / 7, 'attention_dkv': 2.5 * 4 / 7}


@dataclasses.dataclass(frozen=True)
class Machine:
    """The cluster's rates, and the sequence length that attention works on."""

    target: Target
    devices: int
    gpus_per_node: int
    seq_len: int

    def exchange_seconds(self, exchange: Collective) -> float:
        """A collective by rings: over NVLink, and between nodes over each member's own adapter."""
        nodes, members = self._nodes(exchange)
        inside = exchange.sent_bytes / (targets.NVLINK_SHARE * self.target.nvlink_bandwidth)
        across = exchange.sent_bytes / (members * targets.NETWORK_SHARE * self.target.network_bandwidth)
        return max(inside if members > 1 else 0.0, across if nodes > 1 else 0.0)

    def left_by(self, exchange: Collective) -> float:
        """The share of the multiprocessors that a collective leaves to others while it runs."""
        nodes, members = self._nodes(exchange)
        links = members if nodes > 1 else self.target.nvlinks
        return 1 - min(targets.CHANNELS_PER_LINK * links, targets.MOST_CHANNELS) / self.target.multiprocessors

    def _nodes(self, exchange: Collective) -> tuple[int, int]:
        """(how many nodes, how many members in the node with the fewest) of a collective's groups."""
        counts = collections.Counter(device // self.gpus_per_node for device in exchange.groups[0])
        return len(counts), min(counts.values())

    def memory_seconds(self, size: float) -> float:
        """Moving so many bytes to or from the GPU's memory."""
        return size / (targets.MEMORY_SHARE * self.target.memory_bandwidth)


@dataclasses.dataclass
class Estimate:
    """Seconds of one step; `seconds` holds those of each of KINDS, of exchanges those not hidden."""

    seconds: dict[str, float] = dataclasses.field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))
    hidden: float = 0.0  # of exchanges

    @property
    def total(self) -> float:
        """Of the whole step."""
        return sum(self.seconds.values())

    def add(self, other: 'Estimate', times: int) -> None:
        """Adds another's, so many times."""
        for kind, seconds in other.seconds.items():
            self.seconds[kind] += times * seconds
        self.hidden += times * other.hidden


def estimate(program: Program, machine: Machine, name: str | None = None) -> Estimate:
    """A step's time: its instructions one after another as scheduled, exchanges on a line of their own."""
    computation = program.computations[name or program.entry]
    found, ends, line_free, left = Estimate(), {}, 0.0, 1.0
    for instruction in computation.instructions.values():
        exchanges = _exchanges(instruction, computation, program, machine)
        if exchanges:
            seconds = sum(map(machine.exchange_seconds, exchanges))
            left = min(map(machine.left_by, exchanges))
            line_free = max(line_free, found.total) + seconds
            ends[instruction.name] = line_free
            found.hidden += seconds
            if not instruction.opcode.endswith('-start'):
                _wait(found, line_free)
        elif instruction.opcode.endswith('-done') and instruction.operands[0] in ends:
            _wait(found, ends[instruction.operands[0]])
        elif bodies := hlo.bodies(instruction):
            for body in bodies:
                found.add(estimate(program, machine, body), program.trip_count(instruction, computation))
        else:
            kind, seconds = _work(instruction, computation, program, machine)
            shared = max(min(line_free - found.total, seconds / left), 0.0) if kind in _COMPUTED else 0.0
            found.seconds[kind] += seconds + shared * (1 - left)
    _wait(found, line_free)
    return found


def _wait(found: Estimate, until: float) -> None:
    """Lets the compute line wait for an exchange; what it waits for was not hidden."""
    waited = max(until - found.total, 0.0)
    found.seconds['exchange'] += waited
    found.hidden -= waited


def _exchanges(instruction, computation, program, machine) -> list[Collective]:
    """The exchanges that an instruction starts."""
    if instruction.opcode == 'async-start':
        inner = program.computations[instruction.called('calls')]
        parts = [hlo.collective(each, inner, machine.devices) for each in inner.instructions.values()]
    else:
        parts = [hlo.collective(instruction, computation, machine.devices)]
    return [part for part in parts if part]


def _work(instruction, computation, program, machine) -> tuple[str, float]:
    """(one of KINDS, seconds) of an instruction that computes."""
    if instruction.opcode in _FREE or instruction.opcode.endswith('-done') or instruction.kind:
        return 'memory', 0.0
    size = machine.memory_seconds(_bytes(instruction, computation, program))
    inside, computation = _inside(instruction, computation, program)
    products = [each for each in inside if _is_product(each)]
    multiplied = sum(_product_seconds(each, computation, machine.target) for each in products)
    multiplied += machine.memory_seconds(sum(each.results[0].bytes for each in products))  # written when a tile is done
    attention = sum(_attention_seconds(each, computation, machine) for each in inside)
    kind = 'matrix products' if products else 'attention' if attention else 'memory'
    return kind, targets.KERNEL_GAP + max(size, multiplied + attention)


def _inside(instruction, computation, program) -> tuple[list[Instruction], Computation]:
    """The instructions that one stands for: a fusion may hold a library's product and the slices about it."""
    if instruction.opcode not in _FUSIONS:
        return [instruction], computation
    fused = program.computations[instruction.called('calls')]
    return list(fused.instructions.values()), fused


def product_flops(program: Program) -> float:
    """FLOPs of all matrix products that a step computes, recomputed ones too; attention's are not among them."""
    total = 0.0
    for instruction, computation, times in program.executed():
        inside, computation = _inside(instruction, computation, program)
        total += times * sum(2 * math.prod(_product_sizes(each, computation)) for each in inside if _is_product(each))
    return total


def _is_product(instruction: Instruction) -> bool:
    return instruction.opcode == 'dot' or any(name in _called_library(instruction) for name in ('matmul', 'gemm'))


def _called_library(instruction: Instruction) -> str:
    """What a custom call calls; nothing for other instructions."""
    target = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
    return target[1] if target else ''


def _product_seconds(instruction: Instruction, computation: Computation, target: Target) -> float:
    """A matrix product's FLOPs, of bf16 on the tensor cores and of float32 without them."""
    M, N, K, count = _product_sizes(instruction, computation)
    if computation.operands(instruction)[0].results[0].dtype == 'f32':
        units = target.description['core_count'] * target.description['fpus_per_core']
        return 2 * count * M * N * K / (2 * units * target.description['clock_rate_ghz'] * 1e9)
    return 2 * count * M * N * K / (target.matmul_flops * _filled(M, N, count, target.multiprocessors))


def _product_sizes(instruction: Instruction, computation: Computation) -> tuple[int, int, int, int]:
    """(M, N, K, how many) of products [M, K] x [K, N]."""
    left, right = (operand.results[0] for operand in computation.operands(instruction)[:2])
    K = math.prod(left.shape[i] for i in _dimensions(instruction, 'lhs_contracting'))
    count = math.prod(left.shape[i] for i in _dimensions(instruction, 'lhs_batch'))
    return math.prod(left.shape) // (K * count), math.prod(right.shape) // (K * count), K, count


def _dimensions(instruction: Instruction, role: str) -> tuple[int, ...]:
    """lhs_contracting and the like, of a dot or in a library call's JSON."""
    text = re.search(rf'{role}_dim(?:ension)?s"?[=:][\[{{]([^\]}}]*)', instruction.attributes)
    return tuple(map(int, re.findall(r'\d+', text[1]))) if text else ()


def _filled(M: int, N: int, count: int, multiprocessors: int) -> float:
    """The share of the multiprocessors' tiles that hold results, with the best of _TILES."""

    def share(rows: int, columns: int) -> float:
        tiles = count * math.ceil(M / rows) * math.ceil(N / columns)
        return count * M * N / (math.ceil(tiles / multiprocessors) * multiprocessors * rows * columns)

    return max(share(*tile) for tile in _TILES)


def _attention_share(instruction: Instruction) -> float:
    """FLOPs of an attention kernel over those of a forward pass; 0 for another instruction."""
    target = _called_library(instruction)
    if 'cudnn' in target and 'fmha' in target:
        return 2.5 if 'Backward' in target else 1.0
    name = triton_kernel(instruction) if target == 'triton_kernel_call' else ''
    return 1.0 if name == 'attention_forward' else _BACKWARD.get(name, 0.0)


def triton_kernel(instruction: Instruction) -> str:
    """The name of the kernel that a call of jax-triton's launches, without its _kernel."""
    packed = re.search(r'backend_config="((?:[^"\\]|\\.)*)"', instruction.attributes)[1]
    text = zlib.decompress(codecs.escape_decode(packed.encode())[0])
    return re.search(rb'([a-z_]+)_kernel', text)[1].decode()


def _attention_seconds(instruction: Instruction, computation: Computation, machine: Machine) -> float:
    """Causal: a forward pass is 2 T FLOPs for each element of the queries, the largest array there is."""
    share = _attention_share(instruction)
    if not share:
        return 0.0
    arrays = [array for operand in computation.operands(instruction) for array in operand.results]
    forward, backward = machine.target.attention_flops
    flops = 2 * machine.seq_len * max(math.prod(array.shape) for array in arrays)
    return share * flops / (forward if share == 1.0 else backward)


def _bytes(instruction: Instruction, computation: Computation, program: Program) -> float:
    """What an instruction reads and writes; of an array that is sliced or updated in place, only that part."""
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
    total, updated = 0.0, set()
    for result in _results(fused):
        if result.opcode == 'dynamic-update-slice':
            target, update = fused.operands(result)[:2]
            total += update.bytes
            updated.add(_source(fused, target).name)
        else:
            total += result.bytes
    for parameter in fused.instructions.values():
        if parameter.opcode == 'parameter' and parameter.name not in updated:
            users = [user for user in fused.instructions.values() if parameter.name in user.operands]
            sliced = all(user.opcode in _SLICES and user.operands[0] == parameter.name for user in users)
            total += sum(user.bytes for user in users) if sliced else parameter.bytes
    return total


def _results(fused: Computation) -> list[Instruction]:
    """What a fusion returns, one instruction for each array."""
    root = fused.instructions[fused.root]
    return [_source(fused, each) for each in (fused.operands(root) if root.opcode == 'tuple' else [root])]


def _source(fused: Computation, instruction: Instruction) -> Instruction:
    """The instruction behind bitcasts."""
    while instruction.opcode == 'bitcast':
        (instruction,) = fused.operands(instruction)
    return instruction
