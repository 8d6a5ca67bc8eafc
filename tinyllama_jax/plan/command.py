"""The train step compiled for GPUs that are not there: does it fit, what does it send, how fast may it be.

`plan` compiles the very step that `train` runs, kernels and all, for a cluster of one kind of GPU
(jax.experimental.topologies) and reads the answers off the compiled program. docs/plan.md says how to
read them and what to trust.
"""

import collections
import contextlib
import dataclasses
import functools
import importlib.util
import json as json_lib
import os
import pathlib
import re
import tempfile
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh

from tinyllama_jax import config as config_lib
from tinyllama_jax import errors, flops, sharding, train
from tinyllama_jax import ops as ops_lib
from tinyllama_jax import step as step_lib
from tinyllama_jax.config import Config
from tinyllama_jax.plan import hlo, memory, roofline, targets, variants
from tinyllama_jax.plan.hlo import Program
from tinyllama_jax.plan.roofline import Estimate
from tinyllama_jax.plan.targets import Target
from tinyllama_jax.process import xla

GIB = 2**30
RESERVE_BYTES = 3 * GIB // 2  # of JAX's share of the memory for what no program tells of: workspaces of libraries
# A100-hours per 300 B tokens (TinyLlama's paper, section 2.4).
PUBLISHED_GPU_HOURS = {'TinyLlama-1.1B': 3_456, 'Pythia-1.0B': 4_830, 'MPT-1.3B': 7_920}
# XLA would try out its own Triton products on the device, and without one cannot choose: all go to the library.
_COMPILER_OPTIONS = {'xla_gpu_enable_triton_gemm': 'false'}
_WHEELS = ('cuda_nvcc', 'cu13')  # folders of nvidia's packages with a ptxas
_MEMORY_FILES = ('*-live-range.txt', '*-buffer-assignment.txt')  # of what XLA dumps


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Nodes with equal numbers of one kind of GPU."""

    target: Target
    nodes: int
    gpus_per_node: int
    memory_fraction: float  # of a GPU's memory is JAX's

    @property
    def size(self) -> int:
        """How many GPUs there are."""
        return self.nodes * self.gpus_per_node

    @property
    def capacity_bytes(self) -> int:
        """What a program may take of a GPU's memory."""
        return int(self.memory_fraction * self.target.memory_bytes) - RESERVE_BYTES

    def devices(self) -> list:
        """Devices to compile for. Raises UsageError where JAX's CUDA plugin is missing."""
        description, shape = targets.xla_description(self.target), f'1x{self.nodes}x{self.gpus_per_node}'
        check_ptxas()
        try:
            topology = topologies.get_topology_desc('plan', platform='cuda', target_config=description, topology=shape)
        except (RuntimeError, NotImplementedError, ValueError, ImportError) as error:
            raise errors.UsageError(
                "plan compiles with JAX's CUDA plugin, which cannot be used here "
                f'({errors.first_line(error)}); install it, and ptxas: pip install -r requirements-dev.txt.'
            ) from error
        return list(topology.devices)


def check_ptxas(folders: Iterable[str | pathlib.Path] = ()) -> None:
    """Raises UsageError where XLA would not find NVIDIA's assembler; jax 0.11.2 crashes then. `folders`: look there."""
    package = importlib.util.find_spec('nvidia')
    installed = list(package.submodule_search_locations or ()) if package else []
    wheels = [f'{folder}/{name}/bin' for folder in installed for name in _WHEELS]
    folders = folders or [*os.get_exec_path(), '/usr/local/cuda/bin', *wheels]
    if not any(os.access(pathlib.Path(folder, 'ptxas'), os.X_OK) for folder in folders):
        raise errors.UsageError(
            'plan compiles for GPUs with ptxas, which is nowhere on PATH, in /usr/local/cuda or in a package of '
            "Python's; install nvidia-cuda-nvcc-cu12: pip install -r requirements-dev.txt."
        )


def make_cluster(target: str | None, topology: str | None) -> Cluster:
    """The cluster of --target and --topology; raises UsageError."""
    match = re.fullmatch(r'([1-9]\d*)x([1-9]\d*)', topology or '')
    if not match:
        raise errors.usage(f'--topology={topology or ""}', 'write NODESxGPUS, as 2x8 for two nodes of eight GPUs')
    return Cluster(targets.find(target), int(match[1]), int(match[2]), xla.memory_fraction())


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A step compiled for a cluster."""

    config: Config
    cluster: Cluster
    mesh: Mesh
    kernels: dict[str, str]
    program: Program
    peak_bytes: int
    memory: dict[str, int]  # its parts

    @property
    def fits(self) -> bool:
        """Whether the cluster's GPUs hold it."""
        return self.peak_bytes <= self.cluster.capacity_bytes

    @property
    def accumulation(self) -> int:
        """Forward passes per optimiser step."""
        return train.accumulation_steps(self.config, sharding.batch_shards(self.mesh))

    @property
    def tokens_per_step(self) -> int:
        """Of all GPUs together."""
        return self.config.train.global_batch_size * self.config.model.seq_len

    @functools.cached_property
    def estimate(self) -> Estimate:
        """The time of a step."""
        cluster, seq_len = self.cluster, self.config.model.seq_len
        return roofline.estimate(
            self.program, roofline.Machine(cluster.target, cluster.size, cluster.gpus_per_node, seq_len)
        )  # fmt: skip

    @property
    def tokens_per_second(self) -> float:
        """Of all GPUs together, estimated."""
        return self.tokens_per_step / self.estimate.total


def compile_step(config: Config, cluster: Cluster) -> Compiled:
    """The step of `train` for a cluster. Raises UsageError for what `train` would refuse there."""
    mesh = sharding.make_mesh(config.mesh, cluster.devices())
    ops = ops_lib.for_run(config, mesh)
    state = step_lib.abstract_state(config, mesh)
    rows, segment_ids = _abstract_batch(config, mesh)
    with _needing_cudnn():
        lowered = step_lib.jit_train_step(config, mesh, ops).lower(state, rows, segment_ids)
    with tempfile.TemporaryDirectory(prefix='plan-') as folder, _without_compilation_cache():
        flags = xla.gpu_xla_flags(deterministic=config.train.deterministic)
        options = flags | _COMPILER_OPTIONS | {'xla_dump_to': folder, 'xla_dump_hlo_pass_re': 'NONE'}
        compiled = lowered.compile(compiler_options={name: _parsed(value) for name, value in options.items()})
        dumped = [next(pathlib.Path(folder).glob(name)).read_text() for name in _MEMORY_FILES]
    program, peak = hlo.parse(compiled.as_text()), compiled.memory_analysis().peak_memory_in_bytes
    params = jax.tree.leaves(state.params)
    parameters = [shape for leaf in params for shape in (leaf.shape, leaf.sharding.shard_shape(leaf.shape))]
    shapes = memory.Shapes(parameters, config.model.num_layers, config.model.vocab_size)
    parts = memory.parts(memory.at_peak(*dumped), program, shapes, peak)
    return Compiled(config, cluster, mesh, dict(ops.implementations), program, peak, parts)


@contextlib.contextmanager
def _needing_cudnn():
    """A context in which JAX looks for cuDNN, if attention is cuDNN's; UsageError if it is missing or too old."""
    try:
        yield
    except RuntimeError as error:
        if 'cuDNN' not in str(error):
            raise
        message = (
            f'cudnn cannot be planned with here ({str(error).rstrip(".")}); choose triton, or install nvidia-cudnn-cu12'
        )
        raise errors.usage('config.kernels.attention', message) from error


def _parsed(value: str) -> Any:
    """A flag's text as what JAX takes for an option."""
    return {'true': True, 'false': False}.get(value, int(value) if value.isdigit() else value)


@contextlib.contextmanager
def _without_compilation_cache():
    """A context in which programs are compiled afresh: those for other machines cannot be read back from the cache."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update('jax_enable_compilation_cache', False)
    try:
        yield
    finally:
        jax.config.update('jax_enable_compilation_cache', before)


def _abstract_batch(config: Config, mesh: Mesh):
    """Rows and segment ids as `train` reads them."""
    shards = sharding.batch_shards(mesh)
    A, B = train.accumulation_steps(config, shards), config.train.micro_batch_size * shards
    dtype = jnp.uint16 if config.model.vocab_size <= 2**16 else jnp.uint32
    shape, where = (A, B, config.model.seq_len + 1), sharding.batch_sharding(mesh, leading=1)
    rows, ids = (jax.ShapeDtypeStruct(shape, kind, sharding=where) for kind in (dtype, jnp.uint16))
    return rows, ids if config.data.document_mask else None


def plan_run(
    workdir: pathlib.Path | None, config: Config, *, target: str | None, topology: str | None, search: bool = False,
    json: bool = False, output: str | None = None,
) -> None:  # fmt: skip
    """`main.py plan`: prints the plan. Raises UsageError, or DoesNotFit with what would make it fit."""
    cluster = make_cluster(target, topology)
    tried = search_steps(config, cluster) if search else []
    compiled = tried[0] if tried else compile_step(config, cluster)
    plan = report(compiled) | ({'search': [_summary(each) for each in tried if each.fits]} if search else {})
    print(json_lib.dumps(plan, indent=2) if json else text(plan))
    if output:
        from tinyllama_jax.plan import page

        written = page.write(plan, pathlib.Path(output))
        print('' if json else f'\nthe same with a chart: {written}', end='' if json else '\n')
    if not compiled.fits:
        raise errors.DoesNotFit(
            f'{compiled.peak_bytes / GIB:.1f} GiB do not fit into {cluster.capacity_bytes / GIB:.1f} GiB a GPU; '
            f'{remedy(config, compiled)}.'
        )


def search_steps(config: Config, cluster: Cluster) -> list[Compiled]:
    """Steps with every remat policy and the micro-batches of `variants.sizes_to_search`, up to one that does not fit.

    Those that fit come first, the fastest first.
    """
    tried, shards = [], sharding.batch_shards(sharding.make_mesh(config.mesh, cluster.devices()))
    for policy in config_lib.REMAT:
        for size in variants.sizes_to_search(config, shards):
            compiled = _compiled_or_none(variants.variant(config, remat=policy, micro_batch_size=size), cluster)
            tried += [compiled] if compiled else []
            if compiled and not compiled.fits:
                break
    return sorted(tried, key=lambda step: (not step.fits, -step.tokens_per_second))


def _compiled_or_none(config: Config, cluster: Cluster) -> Compiled | None:
    """The step, or None for a variant that `train` would refuse: a mesh that does not divide, a policy of no use."""
    try:
        return compile_step(config, cluster)
    except errors.UsageError:
        return None


def _summary(compiled: Compiled) -> dict[str, Any]:
    """A line of the table of a search."""
    return {
        'micro_batch_size': compiled.config.train.micro_batch_size,
        'accumulation_steps': compiled.accumulation,
        'remat': compiled.config.train.remat,
        'peak_bytes_per_gpu': compiled.peak_bytes,
        'estimated_tokens_per_second': compiled.tokens_per_second,
    }


def report(compiled: Compiled) -> dict[str, Any]:
    """The plan as `--json` prints it."""
    config, model = compiled.config, compiled.config.model
    return {
        'fits': compiled.fits,
        'peak_bytes_per_gpu': compiled.peak_bytes,
        'capacity_bytes': compiled.cluster.capacity_bytes,
        'memory_fraction': compiled.cluster.memory_fraction,
        'xla_flags': os.environ.get('XLA_FLAGS', ''),
        'memory': compiled.memory,
        'target': compiled.cluster.target.device_name,
        'nodes': compiled.cluster.nodes,
        'devices': compiled.cluster.size,
        'mesh': dict(compiled.mesh.shape),
        'parameters': sum(flops.parameter_counts(model).values()),
        'tokens_per_step': compiled.tokens_per_step,
        'micro_batch_size': config.train.micro_batch_size,
        'accumulation_steps': compiled.accumulation,
        'remat': config.train.remat,
        'kernels': compiled.kernels,
        'flops_per_token': {name: flops.flops_per_token(model, name) for name in 'CFN'},
        'product_flops_per_token': roofline.product_flops(compiled.program)
        * compiled.cluster.size
        / compiled.tokens_per_step,
        'collectives': collectives(compiled),
        'bytes_per_second_per_axis': _needed(compiled),
        'seconds_per_step': compiled.estimate.seconds | {'hidden exchange': compiled.estimate.hidden},
        'estimated_tokens_per_second': compiled.tokens_per_second,
        'estimated_tokens_per_second_per_gpu': compiled.tokens_per_second / compiled.cluster.size,
        'estimated_days': config.train.num_steps * compiled.estimate.total / 86_400,
        'estimated_gpu_hours': config.train.num_steps * compiled.estimate.total * compiled.cluster.size / 3_600,
        'gpu_hours_per_300b_tokens': {'this plan': gpu_hours(compiled, 300e9), **PUBLISHED_GPU_HOURS},
    }


def gpu_hours(compiled: Compiled, tokens: float) -> float:
    """What so many tokens cost, estimated."""
    return tokens / compiled.tokens_per_second * compiled.cluster.size / 3_600


def collectives(compiled: Compiled) -> list[dict[str, Any]]:
    """What each GPU sends in a step, by kind, mesh axes and type; bytes as rings send them (hlo.Collective)."""
    found = {}
    for instruction, computation, times in compiled.program.executed():
        exchange = hlo.collective(instruction, computation, compiled.mesh.size)
        if exchange:
            key = exchange.kind, hlo.mesh_axes(exchange.groups, compiled.mesh.shape), '+'.join(exchange.dtypes)
            count, sent = found.get(key, (0, 0.0))
            found[key] = count + times, sent + times * exchange.sent_bytes
    return [
        {'kind': kind, 'axis': axis, 'dtype': dtype, 'count_per_step': count, 'bytes_per_step': round(sent)}
        for (kind, axis, dtype), (count, sent) in sorted(found.items(), key=lambda item: -item[1][1])
    ]


def _needed(compiled: Compiled) -> dict[str, float]:
    """What each GPU sends a second over each mesh axis at the estimated speed: what the links must carry."""
    found = collections.Counter()
    for row in collectives(compiled):
        found[row['axis']] += row['bytes_per_step'] / compiled.estimate.total
    return dict(found)


def remedy(config: Config, compiled: Compiled) -> str:
    """The least change of `config` with which its step fits, unlike `compiled`; found by compiling."""
    cluster, known = compiled.cluster, {(compiled.config.mesh, compiled.config.train): compiled}

    def fitting(other: Config) -> Compiled | None:
        key = other.mesh, other.train
        known[key] = step = known[key] if key in known else _compiled_or_none(other, cluster)
        return step if step and step.fits else None

    if found := variants.least_change(config, fitting):
        return f'it fits ({found.peak_bytes / GIB:.1f} GiB) with {variants.flags(config, found.config)}'
    return (
        f'no remat policy, micro-batch or mesh makes it fit {cluster.size} of these GPUs; take more of them '
        '(--topology), or larger ones (--target)'
    )


def text(plan: Mapping[str, Any]) -> str:
    """The plan for a terminal."""
    mesh = ' x '.join(f'{axis} {size}' for axis, size in plan['mesh'].items())
    verdict = 'fits' if plan['fits'] else 'DOES NOT FIT'
    searched = [
        f'  {row["micro_batch_size"]:3} sequences, remat {row["remat"]:10} {row["peak_bytes_per_gpu"] / GIB:6.2f} GiB  '
        f'{row["estimated_tokens_per_second"]:10,.0f} tokens/s'
        for row in plan.get('search', ())
    ]
    lines = [
        *(['these fit, the fastest first:', *searched, '', 'the first of them:'] if searched else []),
        f'{plan["devices"]} x {plan["target"]} on {plan["nodes"]} nodes: {mesh}',
        f'{plan["parameters"]:,} parameters; {plan["tokens_per_step"]:,} tokens a step in '
        f'{plan["accumulation_steps"]} x {plan["micro_batch_size"]} sequences a GPU; remat {plan["remat"]}',
        'kernels: ' + ', '.join(f'{op} {impl}' for op, impl in plan['kernels'].items()),
        'GFLOP a token: ' + ', '.join(f'{value / 1e9:.3f} ({name})' for name, value in plan['flops_per_token'].items()),
        f'GFLOP a token in the matrix products of the program: {plan["product_flops_per_token"] / 1e9:.3f}',
        *([f'from the environment: XLA_FLAGS={plan["xla_flags"]}'] if plan['xla_flags'] else []),
        '',
        f'memory a GPU: {plan["peak_bytes_per_gpu"] / GIB:.2f} GiB of {plan["capacity_bytes"] / GIB:.2f} '
        f'({plan["memory_fraction"]:g} of the device, less {RESERVE_BYTES / GIB:g} GiB): {verdict}',
        *(f'  {size / GIB:8.2f} GiB  {part}' for part, size in plan['memory'].items() if size >= GIB / 200),
        '',
        'a GPU sends in a step:',
        *(
            f'  {row["bytes_per_step"] / 1e9:8.3f} GB  {row["count_per_step"]:6,} x {row["kind"]} {row["dtype"]} '
            f'over {row["axis"]}'
            for row in plan['collectives']
        ),
        *(
            f'  {rate / 1e9:8.3f} GB/s over {axis} on average'
            for axis, rate in plan['bytes_per_second_per_axis'].items()
        ),
        '',
        f'estimated: {plan["estimated_tokens_per_second"]:,.0f} tokens/s, '
        f'{plan["estimated_tokens_per_second_per_gpu"]:,.0f} a GPU; {plan["estimated_days"]:,.1f} days, '
        f'{plan["estimated_gpu_hours"]:,.0f} GPU-hours',
        *(f'  {seconds:8.3f} s a step  {kind}' for kind, seconds in plan['seconds_per_step'].items()),
        '',
        'GPU-hours per 300 B tokens (the others on A100, as published):',
        *(f'  {hours:8,.0f}  {name}' for name, hours in plan['gpu_hours_per_300b_tokens'].items()),
    ]
    return '\n'.join(lines)
