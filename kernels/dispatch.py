"""The seven ops of the model, each with a choice of implementation; a name works or raises: nothing falls back.

    impl=None         the default for the op and the chip
    impl='xla'        plain JAX: reference.py on GPUs, cpu.py on CPUs; cpu.cross_entropy and embedding.py on both
    impl='triton'     the Triton kernel, on a chip of `chips.CHIPS`
    impl='interpret'  the same Triton source in Triton's interpreter, on the CPU: exact, and slow
    impl='cudnn'      attention only: cuDNN's, through jax.nn.dot_product_attention

`chip` is a GPU's compute capability such as 'sm_90', or None for a CPU; it is an argument, never asked of
a device. The ops know no mesh: under one, tinyllama_jax/ops.py calls them inside `jax.shard_map`.

Shapes: B batch, T query time, S key time (= T), D model, N query heads, K key-value heads, H head
dim, F feed-forward, V vocabulary. dtypes: float32 and bfloat16; `xla` takes any float.
"""

import importlib
import importlib.util

import jax
import jax.numpy as jnp

from kernels import checks, chips, cpu, embedding, launch, reference

_ALL = ('xla', 'triton', 'interpret')
# op: its implementations. By default an op runs Triton on a GPU and plain JAX on a CPU. An op without a kernel runs
# plain JAX everywhere: XLA calls a library for matrix products, and the embedding only moves rows.
OPS = {
    'attention': (*_ALL, 'cudnn'),
    'rms_norm': _ALL,
    'rope': _ALL,
    'swiglu': _ALL,
    'cross_entropy': _ALL,
    'linear': ('xla',),
    'embed': ('xla',),
}
# The largest error of a correct result against plain JAX in float32: (of a row, relative to its norm; of the whole). By
# dtype, or by implementation if it rounds more than its inputs' dtype does. bfloat16 rounds by up to 4e-3, several
# times on the way. A wrong tile or mask puts rows off by a tenth or more; a slightly wrong scale shows in the whole.
TOLERANCES = {'float32': (1e-4, 3e-5), 'bfloat16': (3e-2, 1e-2)}


def choose(op: str, *, impl: str | None = None, chip: str | None = None) -> str:
    """Returns the implementation that `impl` stands for on `chip`.

    Raises ValueError if it cannot run there, ImportError if a package that it needs is not installed.
    """
    known, wrong_chip = OPS[op], f"not on {chip or 'a CPU (chip=None)'}; choose 'xla'"
    impl = impl or ('triton' if chip and 'triton' in known else 'xla')
    checks.require(impl in known, op, f'impl={impl!r} is not one of {", ".join(known)}')
    if impl == 'triton':
        checks.require(chip in chips.CHIPS, op, f"impl='triton' runs on chips {', '.join(chips.CHIPS)}, {wrong_chip}")
    checks.require(impl != 'cudnn' or chip is not None, op, f"impl='cudnn' runs on GPUs, {wrong_chip}")
    for package in {'triton': ('triton', 'jax_triton'), 'interpret': ('triton',)}.get(impl, ()):
        if not importlib.util.find_spec(package):
            raise ImportError(
                f'{op}: impl={impl!r} needs {package}, which is not installed; install requirements-kernels.txt, '
                "or choose 'xla'"
            )
    return impl


def attention(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT=None, *, impl=None, chip=None):
    """Returns causal grouped-query attention, scaled by 1 / sqrt(H): [B, T, N, H] in q's dtype.

    Query head n reads key-value head n // (N / K). With `segment_ids_BT` (integers) a position
    attends to its own segment only. Triton: FlashAttention-2 (Dao, 2023). Raises ValueError for
    a shape, dtype, head dim or implementation that it does not take.
    """
    op = 'attention'
    impl = choose(op, impl=impl, chip=chip)
    dtype = checks.require_floats(op, 'BTNH', q=q_BTNH)
    dtypes = {'q': dtype, 'k': checks.require_floats(op, 'BSKH', k=k_BSKH, v=v_BSKH)}
    checks.require(len(set(dtypes.values())) == 1, op, f'dtypes differ: {dtypes}')
    checks.require_heads(op, q_BTNH, k_BSKH)
    checks.require_implementation(op, impl, dtype, head_dim=q_BTNH.shape[3], segment_ids=segment_ids_BT is not None)
    if segment_ids_BT is not None:
        checks.require_integers(op, 'segment ids', segment_ids_BT, q_BTNH.shape[:2], 'BT')
    if impl == 'xla':
        return _plain(chip).attention(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT=segment_ids_BT)
    if impl == 'cudnn':
        return jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, is_causal=True, implementation='cudnn')
    if segment_ids_BT is not None:
        segment_ids_BT = segment_ids_BT.astype(jnp.int32)
    return _kernels(op).attention(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT, _chip(impl, chip))


def rms_norm(x_BTD, scale_D, residual_BTD=None, *, eps, impl=None, chip=None):
    """Returns x / sqrt(mean(x^2) + eps) * scale: [B, T, D] in x's dtype (Zhang and Sennrich, 2019).

    The scale has x's dtype or float32. With `residual_BTD` returns (the norm of x + residual,
    x + residual), computed in one pass. Raises ValueError as `attention` does.
    """
    op = 'rms_norm'
    impl = choose(op, impl=impl, chip=chip)
    dtype = checks.require_floats(op, 'BTD', x=x_BTD, residual=residual_BTD)
    checks.require_shape(op, 'scale', scale_D, x_BTD.shape[2:], 'D')
    scale_dtype = scale_D.dtype.name
    checks.require(scale_dtype in (dtype, 'float32'), op, f'scale is {scale_dtype}, not float32 or {dtype} as x is')
    checks.require_implementation(op, impl, dtype, columns=x_BTD.shape[2])
    if impl == 'xla':
        return _plain(chip).rms_norm(x_BTD, scale_D, eps=eps, residual_BTD=residual_BTD)
    return _kernels(op).rms_norm(x_BTD, scale_D, residual_BTD, float(eps), _chip(impl, chip))


def rope(x_BTNH, positions_BT, *, base, scaling=1.0, impl=None, chip=None):
    """Returns queries or keys [B, T, N, H] turned by rotary position embedding, half rotation (Su et al., 2021).

    The pair (x[i], x[i + H/2]) turns by position / scaling * base^(-2i / H); a RopeScaling as `scaling` changes the
    frequencies instead. Raises ValueError as `attention` does.
    """
    op = 'rope'
    impl = choose(op, impl=impl, chip=chip)
    dtype = checks.require_floats(op, 'BTNH', x=x_BTNH)
    checks.require_shape(op, 'positions', positions_BT, x_BTNH.shape[:2], 'BT')
    checks.require_implementation(op, impl, dtype, head_dim=x_BTNH.shape[3])
    if impl == 'xla':
        return _plain(chip).rope(x_BTNH, positions_BT, base=base, scaling=scaling)
    return _kernels(op).rope(x_BTNH, positions_BT, float(base), scaling, _chip(impl, chip))


def swiglu(gate_BTF, up_BTF, *, impl=None, chip=None):
    """Returns silu(gate) * up, [B, T, F] in their dtype (Shazeer, 2020). Raises ValueError as `attention` does."""
    op = 'swiglu'
    impl = choose(op, impl=impl, chip=chip)
    checks.require_implementation(op, impl, checks.require_floats(op, 'BTF', gate=gate_BTF, up=up_BTF))
    if impl == 'xla':
        return _plain(chip).swiglu(gate_BTF, up_BTF)
    return _kernels(op).swiglu(gate_BTF, up_BTF, _chip(impl, chip))


def cross_entropy(x_BTD, head_DV, targets_BT, *, weights_BT=None, z_loss=0.0, vocab_axis=None, impl=None, chip=None):
    """Returns (mean loss, {'nll', 'z_loss'}) of a linear head, float32 scalars; by chunks: whole logits never exist.

    The loss is the sum of its parts: nll, the mean negative log-likelihood of `targets_BT` (integers)
    in nats, and `z_loss` times the mean squared log-sum-exp (PaLM, section 5). Only the loss has a
    gradient, which the forward pass computes. `weights_BT` (constants) weight the means. Targets must lie
    in [0, V). `vocab_axis` names the mesh axis that splits V, inside `jax.shard_map`. Raises ValueError as
    `attention` does.
    """
    op = 'cross_entropy'
    impl = choose(op, impl=impl, chip=chip)
    dtypes = {'x': checks.require_floats(op, 'BTD', x=x_BTD), 'head': checks.require_floats(op, 'DV', head=head_DV)}
    checks.require(len(set(dtypes.values())) == 1, op, f'dtypes differ: {dtypes}')
    checks.require(head_DV.shape[0] == x_BTD.shape[2], op, f'x {x_BTD.shape} and head {head_DV.shape} differ in D')
    checks.require_integers(op, 'targets', targets_BT, x_BTD.shape[:2], 'BT')
    if weights_BT is not None:
        checks.require_shape(op, 'weights', weights_BT, x_BTD.shape[:2], 'BT')
    checks.require_implementation(op, impl, dtypes['x'])
    options = {'weights_BT': weights_BT, 'z_loss': float(z_loss), 'vocab_axis': vocab_axis}
    if impl == 'xla':
        return cpu.cross_entropy(x_BTD, head_DV, targets_BT, **options)
    return _kernels(op).cross_entropy(x_BTD, head_DV, targets_BT.astype(jnp.int32), **options, chip=_chip(impl, chip))


def linear(x, w, *, gradient_dtype=None, impl=None, chip=None):
    """Returns x [B, T, *inputs] times w [*inputs, *outputs], which is rounded to x's dtype: [B, T, *outputs].

    w's gradient leaves its matrix product in `gradient_dtype` (x's dtype by default). Raises ValueError as
    `attention` does.
    """
    op = 'linear'
    impl = choose(op, impl=impl, chip=chip)
    checks.require(w.shape[: x.ndim - 2] == x.shape[2:], op, f'x {x.shape} and w {w.shape} differ in their inputs')
    checks.require_implementation(op, impl, x.dtype.name)
    return _plain(chip).linear(x, w, gradient_dtype)


def embed(table_VD, tokens_BT, *, impl=None, chip=None):
    """Returns rows [B, T, D] of the table, zeros for tokens outside it; its gradient is added up in one order.

    Raises ValueError as `attention` does.
    """
    op = 'embed'
    impl = choose(op, impl=impl, chip=chip)
    checks.require_implementation(op, impl, checks.require_floats(op, 'VD', table=table_VD))
    checks.require_integers(op, 'tokens', tokens_BT, tokens_BT.shape[:2], 'BT')
    return embedding.embed(table_VD, tokens_BT, by_sorting=chip is not None)


def _plain(chip):
    return cpu if chip is None else reference


def _chip(impl: str, chip: str | None) -> chips.Chip:
    return launch.INTERPRETER if impl == 'interpret' else chips.CHIPS[str(chip)]


def _kernels(op: str):
    """Imports the module of an op's kernels, and with it Triton, which the other implementations do without."""
    return importlib.import_module(f'kernels.{op}')
