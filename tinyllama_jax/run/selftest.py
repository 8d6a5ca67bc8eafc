"""Before the first step: each kernel against plain JAX, on the run's own mesh, shapes and dtypes.

A kernel that a compiler or a chip gets wrong trains for days before anyone notices. Values and
gradients are compared with plain JAX's in float32 at the highest precision, row by row.
"""

import functools

import jax
import jax.numpy as jnp

from kernels import dispatch
from tinyllama_jax import errors, model, sharding
from tinyllama_jax.config import Config
from tinyllama_jax.ops import Ops

# Largest error of a row, relative to its norm, and of a whole result. bfloat16 rounds by up to 4e-3, several times on
# the way; a wrong tile or mask is off by a tenth and more, a slightly wrong scale everywhere alike.
TOLERANCES = {'float32': 1e-4, 'bfloat16': 3e-2}
WHOLE_TOLERANCES = {'float32': 3e-5, 'bfloat16': 1e-2}
# Plain JAX runs here once: trying out many products of float32 for the fastest would take minutes.
_GPU_OPTIONS = {'xla_gpu_enable_triton_gemm': False, 'xla_gpu_autotune_level': 0}


def check(config: Config, ops: Ops, say=print) -> dict[str, float]:
    """The largest error of each op that a kernel runs (none where all is plain JAX); reports them through `say`.

    Raises RunError that names the op, the error and the tolerance, or why it did not run.
    """
    chosen = [op for op, name in ops.implementations if name != 'xla']
    dtype = model.compute_dtype(config.model, ops)
    found = {}
    for op in chosen:
        found[op], whole = _errors(op, config, ops)
        for error, tolerance in ((found[op], TOLERANCES[dtype.name]), (whole, WHOLE_TOLERANCES[dtype.name])):
            if not error <= tolerance:
                raise _failure(op, ops, f'is off by {error:.2g} in {dtype.name}, and {tolerance:.2g} is the tolerance')
    if chosen:
        errors_of = ', '.join(f'{op} {error:.1e}' for op, error in found.items())
        say(f'self-test passed: largest errors in {dtype.name} {errors_of} (tolerance {TOLERANCES[dtype.name]:.0e})')
    return found


def _errors(op: str, config: Config, ops: Ops) -> tuple[float, float]:
    """The largest error of a row, and of a whole result, of an op's values and gradients."""
    errors_of = jax.jit(
        functools.partial(_compared, op=op, config=config, ops=ops), compiler_options=_GPU_OPTIONS if ops.chip else None
    )
    try:
        rows, whole = map(float, errors_of(jax.random.key(0)))
    except Exception as error:  # of a compiler, a driver, a launch
        raise _failure(op, ops, f'did not run: {errors.first_line(error)}') from error
    return rows, whole


def _failure(op: str, ops: Ops, what: str) -> errors.RunError:
    return errors.RunError(
        f'self-test: {op} ({dict(ops.implementations)[op]}) {what}. Do not train with it: choose another with '
        f'--config.kernels.{op}=xla, or mend the drivers (this run: {ops.table()}).'
    )


def _compared(key, op: str, config: Config, ops: Ops):
    """As `_errors`, of inputs drawn with `key`."""
    plain = Ops(tuple((name, 'xla') for name in dispatch.OPS), None, ops.mesh)
    arrays, function = _case(key, op, config, ops)
    with model.matmul_precision(model.compute_dtype(config.model, ops)):
        results = _results(lambda *arrays: function(ops, *arrays), arrays)
    with jax.default_matmul_precision('highest'):
        wanted = _results(lambda *arrays: function(plain, *arrays), [x.astype(jnp.float32) for x in arrays])
    pairs = list(zip(results, wanted, strict=True))
    return tuple(jnp.max(jnp.stack([_finite(error(*pair)) for pair in pairs])) for error in (_worst_row, _whole))


def _results(function, arrays):
    """Values and gradients under fixed random cotangents, in float32."""
    out, vjp = jax.vjp(function, *arrays)
    leaves, structure = jax.tree.flatten(out)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    pairs = zip(keys, leaves, strict=True)
    cotangents = [jax.random.normal(key, x.shape, jnp.bfloat16).astype(x.dtype) for key, x in pairs]
    return [x.astype(jnp.float32) for x in (*leaves, *vjp(jax.tree.unflatten(structure, cotangents)))]


def _worst_row(found, wanted):
    """The largest norm of a row's error, relative to the row's norm, or to the rows' usual one if that is larger."""
    found, wanted = (x.reshape(-1, x.shape[-1] if x.ndim else 1) for x in (found, wanted))
    norms, error_norms = jnp.linalg.norm(wanted, axis=1), jnp.linalg.norm(found - wanted, axis=1)
    usual = jnp.sqrt(jnp.mean(jnp.square(norms)))
    return jnp.max(_finite(error_norms / jnp.maximum(jnp.maximum(norms, usual), 1e-30)))


def _whole(found, wanted):
    """The norm of the error, relative to the norm."""
    return jnp.linalg.norm((found - wanted).ravel()) / jnp.maximum(jnp.linalg.norm(wanted.ravel()), 1e-30)


def _finite(error):
    """Infinity for what is not a number, which a maximum over devices would pass over."""
    return jnp.where(jnp.isnan(error), jnp.inf, error)


def _growth(ids_BT):
    """About the root of how many tokens each sees: attention times it, and its gradients, have rows of one size.

    A row is an average over what it sees. Without this the rounding of rows that see little is larger than the
    gradients of those that see much. Powers of two, which round nothing.
    """
    seen_BT = jnp.sum(jnp.tril(ids_BT[:, :, None] == ids_BT[:, None, :]), axis=2)
    return jnp.exp2(jnp.log2(seen_BT.astype(jnp.float32)) // 2)


def _case(key, op: str, config: Config, ops: Ops):
    """Random arrays of the run's shapes, one micro-batch on each device, and the op as a function of (ops, *arrays)."""
    model_config, dtype = config.model, model.compute_dtype(config.model, ops)
    B = config.train.micro_batch_size * (sharding.batch_shards(ops.mesh) if ops.mesh else 1)
    T, D, N, K = (getattr(model_config, name) for name in ('seq_len', 'embed_dim', 'num_heads', 'num_kv_heads'))
    H, F, V = (getattr(model_config, name) for name in ('head_dim', 'hidden_dim', 'vocab_size'))
    keys = iter(jax.random.split(key, 4))

    def normal(*shape, of=dtype):
        return jax.random.normal(next(keys), shape, of)

    def integers(below: int):
        return jax.random.randint(next(keys), (B, T), 0, below)

    if op == 'attention':
        ids_BT = jnp.sort(integers(4), axis=1) if config.data.document_mask else None
        growth_BT = _growth(jnp.zeros((1, T), jnp.int32) if ids_BT is None else ids_BT).astype(dtype)
        arrays = normal(B, T, N, H), normal(B, T, K, H), normal(B, T, K, H)
        return arrays, lambda ops, *arrays: growth_BT[:, :, None, None] * ops.attention(*arrays, segment_ids_BT=ids_BT)
    if op == 'rms_norm':
        arrays = normal(B, T, D), 1 + 0.1 * normal(D, of=jnp.float32), normal(B, T, D)
        return arrays, lambda ops, x, scale, residual: (
            ops.rms_norm(x, scale, eps=model_config.norm_eps),
            ops.rms_norm(x, scale, eps=model_config.norm_eps, residual_BTD=residual),
        )
    if op == 'rope':
        positions_BT = jnp.broadcast_to(jnp.arange(T)[None, :], (B, T))
        options = {'base': model_config.rope_base, 'scaling': model_config.rope_scaling}
        return (normal(B, T, N, H), normal(B, T, K, H)), lambda ops, *arrays: [
            ops.rope(x, positions_BT, **options) for x in arrays
        ]
    if op == 'swiglu':
        return (normal(B, T, F), normal(B, T, F)), lambda ops, *arrays: ops.swiglu(*arrays)
    targets_BT = integers(V)
    arrays = normal(B, T, D), (D**-0.5 * normal(D, V, of=jnp.float32)).astype(dtype)
    return arrays, lambda ops, *arrays: ops.cross_entropy(*arrays, targets_BT, z_loss=config.train.z_loss)[0]
