"""Compiles the train step for GPUs that this machine does not have, and reads facts off the compiled program."""

import contextlib
import dataclasses
import functools
import importlib.util
import json
import os
import pathlib
import re
import tempfile
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh

from tinyllama_jax import errors, sharding
from tinyllama_jax import ops as ops_lib
from tinyllama_jax import step as step_lib
from tinyllama_jax.config import Config
from tinyllama_jax.data import store
from tinyllama_jax.plan import hlo, memory, roofline, targets
from tinyllama_jax.plan.hlo import Program
from tinyllama_jax.plan.memory import GIB
from tinyllama_jax.plan.roofline import Estimate
from tinyllama_jax.plan.targets import Target
from tinyllama_jax.process import xla

RESERVE_BYTES = 3 * GIB // 2  # of JAX's share of the memory, for what no program shows: workspaces of libraries
# XLA times its own Triton products on the device to choose among them; without one every product goes to the library.
_COMPILER_OPTIONS = {'xla_gpu_enable_triton_gemm': False}
_WHEELS = ('cuda_nvcc', 'cu13')  # folders of NVIDIA's Python packages that hold ptxas
_MEMORY_FILES = ('*-live-range.txt', '*-buffer-assignment.txt')  # of those that XLA dumps


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Nodes with equal numbers of one kind of GPU."""

    target: Target
    nodes: int
    gpus_per_node: int
    memory_fraction: float  # the share of a GPU's memory that JAX takes

    @property
    def size(self) -> int:
        """The number of GPUs."""
        return self.nodes * self.gpus_per_node

    @property
    def capacity_bytes(self) -> int:
        """The memory of a GPU that a program may use."""
        return int(self.memory_fraction * self.target.memory_bytes) - RESERVE_BYTES

    def devices(self) -> list:
        """Returns devices to compile for. Raises UsageError if ptxas or JAX's CUDA plugin is missing."""
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
    """Raises UsageError if NVIDIA's assembler is in none of `folders` (default: those that XLA searches).

    Without it jax 0.11.2 crashes.
    """
    package = importlib.util.find_spec('nvidia')
    packages = list(package.submodule_search_locations or ()) if package else []
    wheels = [f'{folder}/{name}/bin' for folder in packages for name in _WHEELS]
    folders = folders or [*os.get_exec_path(), '/usr/local/cuda/bin', *wheels]
    if not any(os.access(pathlib.Path(folder, 'ptxas'), os.X_OK) for folder in folders):
        raise errors.UsageError(
            'plan compiles for GPUs with ptxas, which is not on PATH, in /usr/local/cuda or in a Python package; '
            'install nvidia-cuda-nvcc-cu12: pip install -r requirements-dev.txt.'
        )


def make_cluster(target: str | None, topology: str | None) -> Cluster:
    """Returns the cluster that --target and --topology describe. Raises UsageError for invalid ones."""
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
    kernels: dict[str, str]  # op: implementation
    program: Program
    peak_bytes: int
    memory: dict[str, int]  # the parts of peak_bytes, by memory.PARTS

    @property
    def fits(self) -> bool:
        """Whether each GPU has the memory that the step needs."""
        return self.peak_bytes <= self.cluster.capacity_bytes

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches in an optimizer step."""
        return step_lib.accumulation_steps(self.config, sharding.batch_shards(self.mesh))

    @property
    def tokens_per_step(self) -> int:
        """Tokens in an optimizer step, on all GPUs together."""
        return self.config.train.global_batch_size * self.config.model.seq_len

    @functools.cached_property
    def estimate(self) -> Estimate:
        """The estimated time of an optimizer step."""
        cluster = self.cluster
        machine = roofline.Machine(cluster.target, cluster.size, cluster.gpus_per_node, self.config.model.seq_len)
        return roofline.estimate(self.program, machine)

    @property
    def tokens_per_second(self) -> float:
        """The estimated speed of all GPUs together."""
        return self.tokens_per_step / self.estimate.total

    def gpu_hours(self, tokens: float) -> float:
        """Returns the estimated GPU-hours of training on this many tokens."""
        return tokens / self.tokens_per_second * self.cluster.size / 3_600

    def collectives(self) -> list[dict[str, Any]]:
        """Returns what each GPU sends in a step (in a ring), by kind, mesh axes and type; most bytes first."""
        totals: dict[tuple[str, str, str], tuple[int, float]] = {}
        for instruction, computation, times in self.program.executed():
            if exchange := hlo.collective(instruction, computation, self.mesh.size):
                key = exchange.kind, hlo.mesh_axes(exchange.groups, self.mesh.shape), '+'.join(exchange.dtypes)
                count, sent = totals.get(key, (0, 0.0))
                totals[key] = count + times, sent + times * exchange.sent_bytes
        return [
            {'kind': kind, 'axis': axis, 'dtype': dtype, 'count_per_step': count, 'bytes_per_step': round(sent)}
            for (kind, axis, dtype), (count, sent) in sorted(totals.items(), key=lambda item: -item[1][1])
        ]


def compile_step(config: Config, cluster: Cluster) -> Compiled:
    """Compiles the step of `train` for a cluster. Raises UsageError for a `config` that `train` would refuse there."""
    mesh = sharding.make_mesh(config.mesh, cluster.devices())
    ops = ops_lib.for_run(config, mesh)
    state = step_lib.abstract_state(config, mesh)
    rows, segment_ids = _abstract_batch(config, mesh)
    try:
        lowered = step_lib.jit_train_step(config, mesh, ops).lower(state, rows, segment_ids)
    except RuntimeError as error:  # tracing cuDNN's attention looks for the library
        if 'cuDNN' not in str(error):
            raise
        problem = f'cudnn cannot be planned with here ({str(error).rstrip(".")})'
        remedy = 'choose triton, or install nvidia-cudnn-cu12'
        raise errors.usage('config.kernels.attention', f'{problem}; {remedy}') from error
    flags = xla.gpu_xla_flags(deterministic=config.train.deterministic)
    options = {name: json.loads(value) for name, value in flags.items()} | _COMPILER_OPTIONS
    with tempfile.TemporaryDirectory(prefix='plan-') as folder, _without_compilation_cache():
        dump = {'xla_dump_to': folder, 'xla_dump_hlo_pass_re': 'NONE'}
        compiled = lowered.compile(compiler_options=options | dump)
        memory_files = [next(pathlib.Path(folder).glob(name)).read_text() for name in _MEMORY_FILES]
    text, analysis = compiled.as_text(), compiled.memory_analysis()
    assert text and analysis  # other backends than XLA's have none
    program, peak = hlo.parse(text), analysis.peak_memory_in_bytes
    params = jax.tree.leaves(state.params)
    parameters = [shape for leaf in params for shape in (leaf.shape, leaf.sharding.shard_shape(leaf.shape))]
    shapes = memory.Shapes(parameters, config.model.num_layers, config.model.vocab_size)
    parts = memory.parts(memory.at_peak(*memory_files), program, shapes, peak)
    return Compiled(config, cluster, mesh, dict(ops.implementations), program, peak, parts)


@contextlib.contextmanager
def _without_compilation_cache():
    """A context that does not use the compilation cache: programs for other machines cannot be read back from it."""
    before = jax.config.jax_enable_compilation_cache  # pyrefly: ignore[missing-attribute]  # JAX adds it when imported
    jax.config.update('jax_enable_compilation_cache', False)
    try:
        yield
    finally:
        jax.config.update('jax_enable_compilation_cache', before)


def _abstract_batch(config: Config, mesh: Mesh):
    """Returns the shapes of rows and segment ids of a step as `train` reads them; ids None without document masks."""
    shards = sharding.batch_shards(mesh)
    A, B = step_lib.accumulation_steps(config, shards), config.train.micro_batch_size * shards
    dtypes = jnp.uint16 if config.model.vocab_size <= 2**16 else jnp.uint32, store.segment_dtype(config.model.seq_len)
    shape, split = (A, B, config.model.seq_len + 1), sharding.batch_sharding(mesh, leading=1)
    rows, ids = (jax.ShapeDtypeStruct(shape, kind, sharding=split) for kind in dtypes)
    return rows, ids if config.data.document_mask else None
