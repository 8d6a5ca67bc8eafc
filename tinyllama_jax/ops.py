"""The model's ops under a mesh: each device runs them on its part of the arrays, split as one table says.

XLA would gather a kernel's inputs and run it whole on every device. So every op but `linear`, whose
matrix products XLA partitions well, is called inside `jax.shard_map`, which only this file calls.
"""

import contextlib
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from kernels import checks, dispatch, varying
from kernels.rope_scaling import RopeScaling
from tinyllama_jax import config as config_lib
from tinyllama_jax import errors, sharding
from tinyllama_jax.config import Config, KernelConfig, ModelConfig
from tinyllama_jax.sharding import BATCH, EMBEDDING, HEAD, HEADS, HIDDEN, TOKENS, VOCABULARY_AXIS, WEIGHTS_AXIS

# op: (partitions of its arrays, partition of its results). None: plain JAX's matrix product, which XLA
# itself partitions well; its partition follows from the weight's (sharding.PARAM_RULES). A kernel needs partitions.
_PARTITIONS = {
    'attention': ((HEADS, HEADS, HEADS, TOKENS), HEADS),
    'rms_norm': ((TOKENS, P(), TOKENS), TOKENS),
    'rope': ((HEADS, TOKENS), HEADS),
    'swiglu': ((HIDDEN, HIDDEN), HIDDEN),
    'cross_entropy': ((TOKENS, HEAD, TOKENS, TOKENS), P()),
    'linear': None,
    'embed': ((EMBEDDING, TOKENS), TOKENS),
}


def every_op(impl: str) -> KernelConfig:
    """Returns the KernelConfig with `impl` for every op that has it; the others keep their default."""
    fields = (field.name for field in dataclasses.fields(KernelConfig))
    choices: dict[str, Any] = {op: impl for op in fields if impl in dispatch.OPS.get(op, ())}
    return KernelConfig(**choices)


# What evaluation and generation use: any head dim, one token at a time.
PLAIN = every_op('xla')


@dataclasses.dataclass(frozen=True)
class Ops:
    """The ops as a run chose them, made by `for_run` or `make_ops`; arguments and results as in `kernels.dispatch`."""

    implementations: tuple[tuple[str, str], ...]  # (op, its implementation); a tuple, so that Ops is a static argument
    chip: str | None  # the GPU's compute capability, such as sm_90; None for a CPU
    mesh: Mesh | None  # None: one device
    whole_weights: bool = False  # ZeRO-1: each device holds whole weights, which need no all-gather
    gradient_dtype: str | None = None  # of weights, out of the matmul and in the reduction; none: the compute dtype

    def attention(self, q_BTNH, k_BTKH, v_BTKH, *, segment_ids_BT=None):
        """Returns causal grouped-query attention over whole sequences, [B, T, N, H]."""
        return self._run('attention', q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)

    def rms_norm(self, x_BTD, scale_D, *, eps, residual_BTD=None):
        """Returns the normed [B, T, D]; with a residual (normed sum, sum)."""
        return self._run('rms_norm', x_BTD, scale_D, residual_BTD, eps=eps)

    def rope(self, x_BTNH, positions_BT, *, base, scaling=1.0):
        """Returns queries or keys [B, T, N, H], turned by their positions."""
        return self._run('rope', x_BTNH, positions_BT, base=base, scaling=scaling)

    def swiglu(self, gate_BTF, up_BTF):
        """Returns silu(gate) * up, [B, T, F]."""
        return self._run('swiglu', gate_BTF, up_BTF)

    def linear(self, x, w):
        """Returns x [B, T, *inputs] times w [*inputs, *outputs]: [B, T, *outputs]."""
        return self._run('linear', x, w, gradient_dtype=self.gradient_dtype)

    def embed(self, table_VD, tokens_BT, dtype):
        """Returns rows of the table, [B, T, D] in `dtype`."""
        embed = self._bound('embed')
        if not self._sharded():
            return embed(table_VD, tokens_BT).astype(dtype)

        def local(table, tokens):
            table = self._gathered(table, dtype, 1)
            if not vocab_axis:
                return embed(table, tokens)
            tokens = tokens - jax.lax.axis_index(vocab_axis) * table.shape[0]
            return jax.lax.psum(embed(table, tokens), vocab_axis)

        vocab_axis = self._vocab_axis()
        return self._on_each_device('embed', local, table_VD, tokens_BT)

    def cross_entropy(self, x_BTD, head_DV, targets_BT, *, weights_BT=None, z_loss=0.0):
        """Returns (mean loss over all devices, its parts), scalars; the head is rounded to x's dtype."""
        cross_entropy = self._bound('cross_entropy', z_loss=z_loss)
        if not self._sharded():
            return cross_entropy(x_BTD, head_DV.astype(x_BTD.dtype), targets_BT, weights_BT=weights_BT)

        def local(x, head, targets, weights):
            head = self._gathered(head, x.dtype, 0)
            losses = cross_entropy(x, head, targets, weights_BT=weights, vocab_axis=vocab_axis)
            # A device's mean over its own tokens counts by their share of the weight of all tokens.
            share = jnp.sum(weights) / jnp.maximum(jax.lax.psum(jnp.sum(weights), batch), 1e-9)
            return jax.tree.map(lambda loss: jax.lax.psum(loss * share, batch), losses)

        batch, vocab_axis = self._batch_axes(), self._vocab_axis()
        weights_BT = jnp.ones(targets_BT.shape, jnp.float32) if weights_BT is None else weights_BT
        return self._on_each_device('cross_entropy', local, x_BTD, head_DV, targets_BT, weights_BT)

    def table(self) -> str:
        """Returns one line that says which implementation runs each op, and on which chip."""
        names = ', '.join(f'{op} {name}' for op, name in self.implementations)
        return f'ops on {self.chip or "CPU"}: {names}'

    def padded_batch(self, count: int) -> int:
        """Returns `count` rounded up to a multiple of the batch shards."""
        shards = sharding.batch_shards(self.mesh) if self.mesh else 1
        return -(-count // shards) * shards

    def _bound(self, op: str, **options):
        """Returns the op's function with its implementation, the chip and `options` bound."""
        impl = dict(self.implementations)[op]
        return functools.partial(getattr(dispatch, op), impl=impl, chip=self.chip, **options)

    def _run(self, op: str, *arrays, **options):
        return self._on_each_device(op, self._bound(op, **options), *arrays)

    def _on_each_device(self, op: str, local, *arrays):
        """Runs `local` on each device's part of the arrays, which `_PARTITIONS` splits."""
        mesh, partitions = self.mesh, _PARTITIONS[op]
        if mesh is None or mesh.size == 1 or partitions is None:
            return local(*arrays)
        specs, results = partitions
        inputs, in_specs = [], []
        for x, spec in zip(arrays, specs, strict=True):
            copied = spec in (EMBEDDING, HEAD) and self._copied()  # ZeRO-1: a whole weight, a copy for each device
            inputs.append(_copies(x, mesh, spec) if copied else x)
            in_specs.append(_copies_spec(mesh, spec) if copied else sharding.split_axes(spec, mesh))
        out_specs = sharding.split_axes(results, mesh)
        return jax.shard_map(local, mesh=mesh, in_specs=tuple(in_specs), out_specs=out_specs)(*inputs)

    def _gathered(self, w, dtype, dim: int):
        """All-gathers a weight over `fsdp` along `dim` in `dtype`; tensor-parallel splits stay."""
        if self._copied():
            return w[0].astype(dtype)
        return _gather(
            w, dim if self._size(WEIGHTS_AXIS) > 1 else None, self._batch_axes(), dtype, self.gradient_dtype or dtype
        )

    def _sharded(self) -> bool:
        return self.mesh is not None and self.mesh.size > 1

    def _size(self, axis: str) -> int:
        return self.mesh.shape[axis] if self.mesh else 1

    def _copied(self) -> bool:
        return self.whole_weights and self._size(WEIGHTS_AXIS) > 1

    def _batch_axes(self) -> tuple[str, ...]:
        return tuple(axis for axis in BATCH if self._size(axis) > 1)

    def _vocab_axis(self) -> str | None:
        return VOCABULARY_AXIS if self._size(VOCABULARY_AXIS) > 1 else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _copies(w, mesh: Mesh, spec: P):
    """Returns [batch shards, *w]: one copy of a whole weight for each device that has its own part of the batch.

    With copies the devices' gradients stay apart until `_copies_bwd` reduce-scatters them as `spec` says. The
    gradient of a weight that enters `jax.shard_map` whole would be all-reduced whole.
    """
    return jnp.broadcast_to(w, (sharding.batch_shards(mesh), *w.shape))


def _copies_spec(mesh: Mesh, spec: P) -> P:
    return P(*sharding.split_axes(P(BATCH), mesh), *sharding.split_axes(spec, mesh, (WEIGHTS_AXIS,)))


def _copies_fwd(w, mesh, spec):
    return _copies(w, mesh, spec), None


def _copies_bwd(mesh, spec, _, dw):
    def local(dw):
        return _scatter(dw[0], spec.index(WEIGHTS_AXIS), batch_axes)

    batch_axes = tuple(axis for axis in BATCH if mesh.shape[axis] > 1)
    out_specs = sharding.split_axes(spec, mesh)
    return (jax.shard_map(local, mesh=mesh, in_specs=_copies_spec(mesh, spec), out_specs=out_specs)(dw),)


_copies.defvjp(_copies_fwd, _copies_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _gather(w, dim: int | None, batch_axes: tuple[str, ...], dtype, gradient_dtype):
    """All-gathers w along `dim` (None: not split) in `dtype`; its gradient is reduce-scattered in `gradient_dtype`."""
    return _gather_fwd(w, dim, batch_axes, dtype, gradient_dtype)[0]


def _gather_fwd(w, dim, batch_axes, dtype, _):
    like, w = jnp.zeros_like(w, shape=()), w.astype(dtype)
    if dim is not None:
        w = jax.lax.all_gather(w, WEIGHTS_AXIS, axis=dim, tiled=True)
    return varying.along(batch_axes, w), like  # a scalar of w's dtype


def _gather_bwd(dim, batch_axes, _, gradient_dtype, like, dw):
    return (_scatter(dw.astype(gradient_dtype), dim, batch_axes).astype(like.dtype),)


_gather.defvjp(_gather_fwd, _gather_bwd)


def _scatter(dw, dim: int | None, batch_axes: tuple[str, ...]):
    """Sums dw over the batch axes and returns this device's part along `dim` (None: the whole sum).

    The reduce-scatter over `fsdp` comes first, so that the other axes reduce a part only.
    """
    if dim is not None:
        dw = jax.lax.psum_scatter(dw, WEIGHTS_AXIS, scatter_dimension=dim, tiled=True)
        batch_axes = tuple(axis for axis in batch_axes if axis != WEIGHTS_AXIS)
    return jax.lax.psum(dw, batch_axes) if batch_axes else dw


def chip_of(device) -> str | None:
    """Returns the compute capability of an NVIDIA GPU, such as sm_90; None for a CPU."""
    return f'sm_{device.compute_capability.replace(".", "")}' if device.platform in ('gpu', 'cuda') else None


def compute_dtype(model: ModelConfig, chip: str | None):
    """Returns the dtype of activations: as configured, else bfloat16 on GPUs and float32 on CPUs."""
    return jnp.dtype(model.compute_dtype or ('bfloat16' if chip else 'float32'))


def rope_options(model: ModelConfig) -> dict[str, Any]:
    """Returns the arguments `base` and `scaling` of `Ops.rope`."""
    scaling: float | RopeScaling = model.rope_scaling
    if model.rope_kind != 'linear':
        scaling = RopeScaling(
            kind=model.rope_kind,
            factor=model.rope_scaling,
            original_length=model.rope_original_seq_len or model.seq_len,
            slow_turns=model.rope_slow_turns,
            fast_turns=model.rope_fast_turns,
            truncate=model.rope_truncate,
            attention_factor=model.rope_attention_factor,
        )
    return {'base': model.rope_base, 'scaling': scaling}


def make_ops(
    kernels: KernelConfig = KernelConfig(),  # noqa: B008 (frozen)
    mesh: Mesh | None = None,
    *,
    chip: str | None = None,
) -> Ops:
    """Returns the ops that `kernels` names; for others the default of the chip (the mesh's, else the first device's).

    `chip` overrides it, to lower a program for a GPU that this machine does not have.
    Raises UsageError if an implementation cannot run there.
    """
    chip = chip or chip_of(mesh.devices.flat[0] if mesh else jax.devices()[0])
    chosen = []
    for op in dispatch.OPS:
        with _naming_the_field(op):
            chosen.append((op, dispatch.choose(op, impl=getattr(kernels, op, None), chip=chip)))
    return Ops(tuple(chosen), chip, mesh)


def for_run(config: Config, mesh: Mesh, *, chip: str | None = None) -> Ops:
    """Returns the ops of a run, as `make_ops`. Raises UsageError also if one cannot do what the run needs of it."""
    ops, model = make_ops(config.kernels, mesh, chip=chip), config.model
    whole_weights = config.mesh.zero == 1
    ops = dataclasses.replace(ops, whole_weights=whole_weights, gradient_dtype=config.train.gradient_dtype)
    needs = {'head_dim': model.head_dim, 'columns': model.embed_dim, 'segment_ids': config.data.document_mask}
    for op, impl in ops.implementations:
        with _naming_the_field(op):
            checks.require_implementation(op, impl, compute_dtype(model, ops.chip).name, **needs)
    attention = dict(ops.implementations)['attention']
    # On GPUs only our kernels name their output and log-sum-exp; on CPUs plain JAX does, too.
    saved = config_lib.REMAT[config.train.remat] or ()
    if 'attention_out' in saved and attention not in ('triton', 'interpret') and ops.chip:
        raise errors.UsageError(
            f'config.train.remat={config.train.remat} saves residuals that only the triton attention names, but '
            f'attention is {attention} and would be recomputed. Choose full or none.'
        )
    return ops


@contextlib.contextmanager
def _naming_the_field(op: str):
    try:
        yield
    except (ValueError, ImportError) as error:
        raise errors.UsageError(f'config.kernels.{op}: {str(error).removeprefix(op + ": ")}.') from None
