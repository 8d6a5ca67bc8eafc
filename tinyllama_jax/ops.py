"""The five ops under the mesh: each runs on its device's part of the arrays, as one table of partitions says.

XLA would gather a kernel's inputs and run it whole on every device; so every op, whichever its
implementation, is called inside `jax.shard_map`, which only this file calls.
"""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from kernels import checks, dispatch, reference, varying
from tinyllama_jax import errors, sharding
from tinyllama_jax.config import Config, KernelConfig, ModelConfig
from tinyllama_jax.sharding import BATCH, EMBEDDING, HEAD, HEADS, HIDDEN, TOKENS, VOCABULARY_AXIS, WEIGHTS_AXIS

# op: (partitions of its arrays, partition of its results)
_PARTITIONS = {
    'attention': ((HEADS, HEADS, HEADS, TOKENS), HEADS),
    'rms_norm': ((TOKENS, P(), TOKENS), TOKENS),
    'rope': ((HEADS, TOKENS), HEADS),
    'swiglu': ((HIDDEN, HIDDEN), HIDDEN),
    'cross_entropy': ((TOKENS, HEAD, TOKENS, TOKENS), P()),
    'embed': ((EMBEDDING, TOKENS), TOKENS),
}
# What evaluation and generation use: any head dim, one token at a time.
PLAIN = KernelConfig(**dict.fromkeys(dispatch.OPS, 'xla'))


@dataclasses.dataclass(frozen=True)
class Ops:
    """The ops as a run has chosen them; made by `for_run` or `make_ops`; arguments and results: `kernels.dispatch`."""

    implementations: tuple[tuple[str, str], ...]  # (op, its implementation's name), hashable as a static argument is
    chip: str | None  # the GPU's compute capability, as sm_90; None for a CPU
    mesh: Mesh | None  # None: one device
    whole_weights: bool = False  # weights come whole to each device (ZeRO-1), and need not be gathered
    gradient_dtype: str | None = None  # of weights' gradients as they are added up between devices; none: the weights'

    def attention(self, q_BTNH, k_BTKH, v_BTKH, *, segment_ids_BT=None):
        """Causal grouped-query attention over whole sequences [B, T, N, H]."""

        def local(q, k, v, ids):
            return dispatch.attention(q, k, v, segment_ids_BT=ids, **self._how('attention'))

        return self._on_each_device('attention', local, q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)

    def rms_norm(self, x_BTD, scale_D, *, eps, residual_BTD=None):
        """Normed [B, T, D]; with a residual (normed sum, sum)."""

        def local(x, scale, residual):
            return dispatch.rms_norm(x, scale, eps=eps, residual_BTD=residual, **self._how('rms_norm'))

        return self._on_each_device('rms_norm', local, x_BTD, scale_D, residual_BTD)

    def rope(self, x_BTNH, positions_BT, *, base, scaling=1.0):
        """Queries or keys [B, T, N, H] turned by their positions."""

        def local(x, positions):
            return dispatch.rope(x, positions, base=base, scaling=scaling, **self._how('rope'))

        return self._on_each_device('rope', local, x_BTNH, positions_BT)

    def swiglu(self, gate_BTF, up_BTF):
        """silu(gate) * up, [B, T, F]."""

        def local(gate, up):
            return dispatch.swiglu(gate, up, **self._how('swiglu'))

        return self._on_each_device('swiglu', local, gate_BTF, up_BTF)

    def cross_entropy(self, x_BTD, head_DV, targets_BT, *, weights_BT=None, z_loss=0.0):
        """(mean loss over all devices, its parts), scalars; the head is rounded to x's dtype."""
        options = {'z_loss': z_loss, **self._how('cross_entropy')}
        if not self._sharded():
            head_DV = head_DV.astype(x_BTD.dtype)
            return dispatch.cross_entropy(x_BTD, head_DV, targets_BT, weights_BT=weights_BT, **options)

        def local(x, head, targets, weights):
            head = self._gathered(head, x.dtype, 0)
            losses = dispatch.cross_entropy(
                x, head, targets, weights_BT=weights, vocab_axis=vocab_axis, **options
            )  # fmt: skip
            share = jnp.sum(weights) / jnp.maximum(jax.lax.psum(jnp.sum(weights), batch), 1e-9)
            return jax.tree.map(lambda loss: jax.lax.psum(loss * share, batch), losses)

        batch, vocab_axis = self._batch_axes(), self._vocab_axis()
        weights_BT = jnp.ones(targets_BT.shape, jnp.float32) if weights_BT is None else weights_BT
        return self._on_each_device('cross_entropy', local, x_BTD, head_DV, targets_BT, weights_BT)

    def table(self) -> str:
        """One line that says what runs each op, and on what."""
        names = ', '.join(f'{op} {name}' for op, name in self.implementations)
        return f'ops on {self.chip or "CPU"}: {names}'

    def embed(self, table_VD, tokens_BT, dtype):
        """Rows of the table, [B, T, D] in `dtype`."""
        if not self._sharded():
            return dispatch.embed(table_VD, tokens_BT, chip=self.chip).astype(dtype)

        def local(table, tokens):
            table = self._gathered(table, dtype, 1)
            if not vocab_axis:
                return dispatch.embed(table, tokens, chip=self.chip)
            tokens = tokens - jax.lax.axis_index(vocab_axis) * table.shape[0]
            return jax.lax.psum(dispatch.embed(table, tokens, chip=self.chip), vocab_axis)

        vocab_axis = self._vocab_axis()
        return self._on_each_device('embed', local, table_VD, tokens_BT)

    def linear(self, x, w):
        """x [B, T, *inputs] times w [*inputs, *outputs]; a library's matrix product, which XLA partitions."""
        return dispatch.linear(x, w, gradient_dtype=self.gradient_dtype, chip=self.chip)

    def cached_attention(self, q_BTNH, k_BKSH, v_BKSH, visible_BS):
        """Attention over the visible slots of a key-value cache."""
        return reference.cached_attention(q_BTNH, k_BKSH, v_BKSH, visible_BS)

    def rows_of(self, count: int) -> int:
        """`count` rounded up to what the mesh divides a batch by."""
        shards = sharding.batch_shards(self.mesh) if self.mesh else 1
        return -(-count // shards) * shards

    def _how(self, op: str) -> dict:
        return {'impl': dict(self.implementations)[op], 'chip': self.chip}

    def _sharded(self) -> bool:
        return self.mesh is not None and self.mesh.size > 1

    def _batch_axes(self) -> tuple[str, ...]:
        return tuple(axis for axis in BATCH if self.mesh.shape[axis] > 1)

    def _vocab_axis(self) -> str | None:
        return VOCABULARY_AXIS if self.mesh.shape[VOCABULARY_AXIS] > 1 else None

    def _gathered(self, w, dtype, dim: int):
        """A device's part of a weight, or its copy, as the whole of it in `dtype`, but for what other axes split."""
        if self._copied():
            return w[0].astype(dtype)
        split = self.mesh.shape[WEIGHTS_AXIS] > 1
        return _gather(w, dim if split else None, self._batch_axes(), dtype, self.gradient_dtype or dtype)

    def _on_each_device(self, op: str, local, *arrays):
        if not self._sharded():
            return local(*arrays)
        partitions, results = _PARTITIONS[op]
        arrays, in_specs = zip(*map(self._laid_out, arrays, partitions), strict=True)
        out_specs = sharding.split_axes(results, self.mesh)
        return jax.shard_map(local, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs)(*arrays)

    def _laid_out(self, x, spec: P):
        """(an argument of an op, its partition); a weight that comes whole as one copy for each part of the batch."""
        if spec in (EMBEDDING, HEAD) and self._copied():
            return _copies(x, self.mesh, spec), _copies_spec(self.mesh, spec)
        return x, sharding.split_axes(spec, self.mesh)

    def _copied(self) -> bool:
        return self.whole_weights and self.mesh.shape[WEIGHTS_AXIS] > 1


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _copies(w, mesh: Mesh, spec: P):
    """A whole weight as [devices that split the batch, *w], one for each, so that its gradients stay apart.

    They are then scattered as `spec` says, and only parts of them cross the other axes: of a weight that comes into
    `jax.shard_map` whole the gradients would be added up whole.
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
    """w in `dtype`, whole along `dim` (None: as it is); its gradient is scattered first, and then added up."""
    return _gather_fwd(w, dim, batch_axes, dtype, gradient_dtype)[0]


def _gather_fwd(w, dim, batch_axes, dtype, _):
    like, w = jnp.zeros_like(w, shape=()), w.astype(dtype)
    if dim is not None:
        w = jax.lax.all_gather(w, WEIGHTS_AXIS, axis=dim, tiled=True)
    return varying.along(batch_axes, w), like  # of w's dtype


def _gather_bwd(dim, batch_axes, _, gradient_dtype, like, dw):
    return (_scatter(dw.astype(gradient_dtype), dim, batch_axes).astype(like.dtype),)


_gather.defvjp(_gather_fwd, _gather_bwd)


def _scatter(dw, dim: int | None, batch_axes: tuple[str, ...]):
    """A device's part along `dim` (None: the whole) of the sum over the batch's axes; only parts cross others."""
    if dim is not None:
        dw = jax.lax.psum_scatter(dw, WEIGHTS_AXIS, scatter_dimension=dim, tiled=True)
        batch_axes = tuple(axis for axis in batch_axes if axis != WEIGHTS_AXIS)
    return jax.lax.psum(dw, batch_axes) if batch_axes else dw


def chip_of(device) -> str | None:
    """sm_90 and the like for an NVIDIA GPU, None for a CPU."""
    return f'sm_{device.compute_capability.replace(".", "")}' if device.platform in ('gpu', 'cuda') else None


def compute_dtype(model: ModelConfig, chip: str | None):
    """The dtype of activations: as configured, else bfloat16 on GPUs and float32 on CPUs."""
    return jnp.dtype(model.compute_dtype or ('bfloat16' if chip else 'float32'))


def make_ops(
    kernels: KernelConfig = KernelConfig(),  # noqa: B008 (frozen)
    mesh: Mesh | None = None,
    *,
    chip: str | None = None,
) -> Ops:
    """The ops that `kernels` names, or the defaults of the mesh's chip; without a mesh, for the default device.

    `chip` stands in for that of the devices, to lower a program for a GPU that is not there.
    Raises UsageError for an implementation that cannot run there.
    """
    chip = chip or chip_of(mesh.devices.flat[0] if mesh else jax.devices()[0])
    chosen = []
    for op in dispatch.OPS:
        with _naming_the_field(op):
            chosen.append((op, dispatch.implementation(op, impl=getattr(kernels, op), chip=chip)))
    return Ops(tuple(chosen), chip, mesh)


def for_run(config: Config, mesh: Mesh, *, chip: str | None = None) -> Ops:
    """`make_ops` of a run. Raises UsageError, too, for an implementation that cannot do what the run asks of it."""
    ops, model = make_ops(config.kernels, mesh, chip=chip), config.model
    ops = dataclasses.replace(
        ops, whole_weights=config.mesh.zero == 1, gradient_dtype=config.train.gradient_dtype
    )  # fmt: skip
    what = {'head_dim': model.head_dim, 'columns': model.embed_dim, 'segment_ids': config.data.document_mask}
    for op, impl in ops.implementations:
        with _naming_the_field(op):
            checks.implementation(op, impl, compute_dtype(model, ops.chip).name, **what)
    attention = dict(ops.implementations)['attention']
    if config.train.remat == 'attention' and attention not in ('triton', 'interpret') and ops.chip:
        raise errors.UsageError(
            f'config.train.remat=attention keeps what the triton attention names, and attention is {attention}: it '
            'would be recomputed all the same. Choose full or none.'
        )
    return ops


@contextlib.contextmanager
def _naming_the_field(op: str):
    try:
        yield
    except (ValueError, ImportError) as error:
        raise errors.UsageError(f'config.kernels.{op}: {str(error).removeprefix(op + ": ")}.') from None
