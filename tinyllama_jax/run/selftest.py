"""The self-test before the first step: each kernel against plain JAX, on the run's own mesh, shapes and dtypes.

A kernel that a compiler or a chip gets wrong trains for days before anyone notices. Values and
gradients are compared with plain JAX's in float32 at the highest precision, row by row.
"""

import functools

import jax
import jax.numpy as jnp

from kernels import dispatch
from tinyllama_jax import errors, model, sharding
from tinyllama_jax import ops as ops_lib
from tinyllama_jax.config import Config
from tinyllama_jax.ops import Ops

# Plain JAX runs here once: trying out many float32 products for the fastest would take minutes.
_GPU_OPTIONS = {'xla_gpu_enable_triton_gemm': False, 'xla_gpu_autotune_level': 0}


def check_kernels(config: Config, ops: Ops, say=print) -> dict[str, float]:
    """Returns the largest row error of each op that plain JAX does not run, and reports them through `say`.

    Raises RunError that names the op, the error and the tolerance, or why it did not run.
    """
    dtype = model.compute_dtype(config.model, ops).name
    row_errors, reports = {}, []
    for op, impl in ops.implementations:
        if impl == 'xla':
            continue
        row_error, whole_error = _errors(op, config, ops)
        row_tolerance, whole_tolerance = dispatch.TOLERANCES.get(impl, dispatch.TOLERANCES[dtype])
        for error, tolerance in ((row_error, row_tolerance), (whole_error, whole_tolerance)):
            if not error <= tolerance:
                raise _failure(op, ops, f'is off by {error:.2g} in {dtype}, and {tolerance:.2g} is the tolerance')
        row_errors[op] = row_error
        reports.append(f'{op} {row_error:.1e} (tolerance {row_tolerance:.0e})')
    if reports:
        say(f'self-test passed: largest errors in {dtype} {", ".join(reports)}')
    return row_errors


def _errors(op: str, config: Config, ops: Ops) -> tuple[float, float]:
    """Returns the largest error of a row, and of a whole result, among an op's values and gradients."""
    compared = functools.partial(_compared, op=op, config=config, ops=ops)
    try:
        errors_of = jax.jit(compared, compiler_options=_GPU_OPTIONS if ops.chip else None)
        row_error, whole_error = map(float, errors_of(jax.random.key(0)))
    except Exception as error:  # of a compiler, a driver, a launch
        raise _failure(op, ops, f'did not run: {errors.first_line(error)}') from error
    return row_error, whole_error


def _failure(op: str, ops: Ops, what: str) -> errors.RunError:
    return errors.RunError(
        f'self-test: {op} ({dict(ops.implementations)[op]}) {what}. Do not train with it: choose another with '
        f'--config.kernels.{op}=xla, or mend the drivers (this run: {ops.table()}).'
    )


def _compared(key, op: str, config: Config, ops: Ops):
    """Returns the traced errors of `_errors`, for inputs drawn with `key`."""
    plain = Ops(tuple((name, 'xla') for name in dispatch.OPS), None, ops.mesh)
    arrays, function = _case(key, op, config, ops)
    with model.matmul_precision(model.compute_dtype(config.model, ops)):
        results = _results(lambda *arrays: function(ops, *arrays), arrays)
    with jax.default_matmul_precision('highest'):
        expected = _results(lambda *arrays: function(plain, *arrays), [x.astype(jnp.float32) for x in arrays])
    each = [_row_and_whole(*pair) for pair in zip(results, expected, strict=True)]
    return tuple(jnp.max(_finite(jnp.stack(kind))) for kind in zip(*each, strict=True))


def _results(function, arrays):
    """Returns values and gradients under fixed random cotangents, in float32."""
    out, vjp = jax.vjp(function, *arrays)
    leaves, structure = jax.tree.flatten(out)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    pairs = zip(keys, leaves, strict=True)
    cotangents = [jax.random.normal(key, x.shape, jnp.bfloat16).astype(x.dtype) for key, x in pairs]
    return [x.astype(jnp.float32) for x in (*leaves, *vjp(jax.tree.unflatten(structure, cotangents)))]


def _row_and_whole(result, expected):
    """Returns the largest error of a row and the error of the whole, relative to the norms of what is expected.

    A row whose norm is below the rows' root mean square norm is measured against that instead.
    """
    result, expected = (x.reshape(-1, x.shape[-1] if x.ndim else 1) for x in (result, expected))
    norms, error_norms = jnp.linalg.norm(expected, axis=1), jnp.linalg.norm(result - expected, axis=1)
    usual = jnp.sqrt(jnp.mean(jnp.square(norms)))
    row_error = jnp.max(_finite(error_norms / jnp.maximum(jnp.maximum(norms, usual), 1e-30)))
    return row_error, jnp.linalg.norm(error_norms) / jnp.maximum(jnp.linalg.norm(norms), 1e-30)


def _finite(error):
    """Replaces NaN by infinity, since a maximum over devices would pass over a NaN."""
    return jnp.where(jnp.isnan(error), jnp.inf, error)


def _growth(ids_BT):
    """Returns about the root of the number of tokens that each position sees.

    An attention row is an average over what it sees. Multiplied by this factor, all rows have about the same norm, and
    so have their gradients; without it the rounding of rows that see few tokens exceeds the gradients of those that
    see many. The factors are powers of two, which round nothing.
    """
    seen_BT = jnp.sum(jnp.tril(ids_BT[:, :, None] == ids_BT[:, None, :]), axis=2)
    return jnp.exp2(jnp.log2(seen_BT.astype(jnp.float32)) // 2)


def _case(key, op: str, config: Config, ops: Ops):
    """Returns random arrays of the run's shapes, a micro-batch per device, and a function of (ops, *arrays)."""
    model_config, dtype = config.model, model.compute_dtype(config.model, ops)
    B = config.train.micro_batch_size * (sharding.batch_shards(ops.mesh) if ops.mesh else 1)
    T, D, N, K = (getattr(model_config, name) for name in ('seq_len', 'embed_dim', 'num_heads', 'num_kv_heads'))
    H, F, V = (getattr(model_config, name) for name in ('head_dim', 'hidden_dim', 'vocab_size'))
    keys = iter(jax.random.split(key, 4))

    def normal(*shape, dtype=dtype):
        return jax.random.normal(next(keys), shape, dtype)

    def weight(inputs: int, *shape):
        return (inputs**-0.5 * normal(*shape, dtype=jnp.float32)).astype(dtype)

    def integers(below: int):
        return jax.random.randint(next(keys), (B, T), 0, below)

    match op:
        case 'attention':
            ids_BT = jnp.sort(integers(4), axis=1) if config.data.document_mask else None
            growth_BTNH = _growth(jnp.zeros((1, T), jnp.int32) if ids_BT is None else ids_BT)[:, :, None, None]
            arrays = normal(B, T, N, H), normal(B, T, K, H), normal(B, T, K, H)
            return (
                arrays,
                lambda ops, *qkv: growth_BTNH.astype(qkv[0].dtype) * ops.attention(*qkv, segment_ids_BT=ids_BT),
            )
        case 'rms_norm':
            arrays = normal(B, T, D), 1 + 0.1 * normal(D, dtype=jnp.float32), normal(B, T, D)
            return arrays, lambda ops, x, scale, residual: (
                ops.rms_norm(x, scale, eps=model_config.norm_eps),
                ops.rms_norm(x, scale, eps=model_config.norm_eps, residual_BTD=residual),
            )
        case 'rope':
            positions_BT = jnp.broadcast_to(jnp.arange(T)[None, :], (B, T))
            options = ops_lib.rope_options(model_config)
            arrays = normal(B, T, N, H), normal(B, T, K, H)
            return arrays, lambda ops, *arrays: [ops.rope(x, positions_BT, **options) for x in arrays]
        case 'swiglu':
            return (normal(B, T, F), normal(B, T, F)), lambda ops, *arrays: ops.swiglu(*arrays)
        case 'cross_entropy':
            targets_BT = integers(V)
            arrays = normal(B, T, D), weight(D, D, V)
            return arrays, lambda ops, *arrays: ops.cross_entropy(*arrays, targets_BT, z_loss=config.train.z_loss)[0]
        case 'linear':  # one of the MLP's products, and attention's over two input axes
            arrays = normal(B, T, D), weight(D, D, F), normal(B, T, N, H), weight(N * H, N, H, D)
            return arrays, lambda ops, x, up, out, o: (ops.linear(x, up), ops.linear(out, o))
        case 'embed':
            tokens_BT = integers(V)
            return (normal(V, D),), lambda ops, table: ops.embed(table, tokens_BT, table.dtype)
        case _:
            raise ValueError(f'the self-test has no case for {op}')
