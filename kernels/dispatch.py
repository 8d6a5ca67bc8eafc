"""The five ops, each with a choice of implementation; a name works or raises, and nothing falls back.

    impl=None         the default for the op and the chip
    impl='xla'        plain JAX: reference.py on GPUs, cpu.py on CPUs
    impl='triton'     the Triton kernel, on a chip of `CHIPS`
    impl='interpret'  the same Triton source in Triton's interpreter, on the CPU: exact, and slow
    impl='cudnn'      attention only: cuDNN's, through jax.nn.dot_product_attention

`chip` is a GPU's compute capability such as 'sm_90', or None for a CPU; it is never asked of a
device. The ops know no mesh: under one they are called inside `jax.shard_map`.

Shapes: B batch, T query time, S key time (= T), D model, N query heads, K key-value heads, H head
dim, F feed-forward, V vocabulary. dtypes: float32 and bfloat16; `xla` takes any float.
"""

import importlib

import jax
import jax.numpy as jnp

from kernels import cpu, launch, reference

OPS = ('attention', 'rms_norm', 'rope', 'swiglu', 'cross_entropy')
CHIPS = launch.CHIPS
HEAD_DIMS = (64, 128)
_MOST_COLUMNS = 16_384  # of a row that a program holds in registers
_DTYPES = ('float32', 'bfloat16')
# {(chip, op): implementation} where a committed measurement (bench/results/) found another one faster than Triton.
_MEASURED: dict[tuple[str, str], str] = {}


def implementations(op: str) -> tuple[str, ...]:
    """The names that `impl` may have for an op."""
    return ('xla', 'triton', 'interpret') + (('cudnn',) if op == 'attention' else ())


def implementation(op: str, *, impl: str | None = None, chip: str | None = None) -> str:
    """The implementation that `impl` stands for on `chip`. Raises ValueError where it cannot run."""
    if impl is None:
        impl = 'xla' if chip is None else _MEASURED.get((chip, op), 'triton')
    _require(impl in implementations(op), op, f'impl={impl!r} is not one of {", ".join(implementations(op))}')
    if impl == 'triton':
        _require(
            chip in CHIPS, op, f"impl='triton' runs on chips {', '.join(CHIPS)}, not on {_name(chip)}; choose 'xla'"
        )
    _require(impl != 'cudnn' or chip is not None, op, f"impl='cudnn' runs on GPUs, not on {_name(chip)}; choose 'xla'")
    return impl


def attention(q_BTNH, k_BSKH, v_BSKH, *, segment_ids_BT=None, impl=None, chip=None):
    """Causal grouped-query attention, scaled by 1 / sqrt(H): [B, T, N, H] in q's dtype.

    Query head n reads key-value head n // (N / K). With `segment_ids_BT` a position attends to
    its own segment only. Triton: FlashAttention-2 (Dao, 2023). Raises ValueError for shapes,
    dtypes, head dims or an implementation that do not go.
    """
    impl = implementation('attention', impl=impl, chip=chip)
    _check_attention(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT, impl)
    if impl == 'xla':
        return _plain(chip).attention(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT=segment_ids_BT)
    if impl == 'cudnn':
        return jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, is_causal=True, implementation='cudnn')
    segments = None if segment_ids_BT is None else segment_ids_BT.astype(jnp.int32)
    return _kernels('attention').attention(q_BTNH, k_BSKH, v_BSKH, segments, _target(impl, chip))


def rms_norm(x_BTD, scale_D, *, eps, residual_BTD=None, impl=None, chip=None):
    """x / sqrt(mean(x^2) + eps) * scale: [B, T, D] in x's dtype (Zhang and Sennrich, 2019).

    With `residual_BTD`: (that of the sum x + residual, the sum), in one pass.
    """
    impl = implementation('rms_norm', impl=impl, chip=chip)
    _check_dtypes('rms_norm', impl, x=x_BTD, residual=residual_BTD)
    _check_shapes('rms_norm', 'BTD', x=x_BTD, residual=residual_BTD)
    _require(scale_D.shape == x_BTD.shape[2:], 'rms_norm', f'scale {scale_D.shape} is not [D] of x {x_BTD.shape}')
    if impl == 'xla':
        return _plain(chip).rms_norm(x_BTD, scale_D, eps=eps, residual_BTD=residual_BTD)
    D = x_BTD.shape[2]
    _require(D <= _MOST_COLUMNS, 'rms_norm', f'rows of {D} do not fit a program; {_MOST_COLUMNS} at most')
    return _kernels('rms_norm').rms_norm(x_BTD, scale_D, residual_BTD, eps, _target(impl, chip))


def rope(x_BTNH, positions_BT, *, base, scaling=1.0, impl=None, chip=None):
    """Rotary position embedding, half rotation, of queries or keys: [B, T, N, H] in x's dtype (Su et al., 2021).

    The pair (x[i], x[i + H/2]) turns by position / scaling * base^(-2i / H).
    """
    impl = implementation('rope', impl=impl, chip=chip)
    _check_dtypes('rope', impl, x=x_BTNH)
    _check_shapes('rope', 'BTNH', x=x_BTNH)
    _require(
        positions_BT.shape == x_BTNH.shape[:2],
        'rope',
        f'positions {positions_BT.shape} are not [B, T] of {x_BTNH.shape}',
    )
    _check_head_dim('rope', x_BTNH.shape[3], impl)
    if impl == 'xla':
        return _plain(chip).rope(x_BTNH, positions_BT, base=base, scaling=scaling)
    return _kernels('rope').rope(x_BTNH, positions_BT, base, scaling, _target(impl, chip))


def swiglu(gate_BTF, up_BTF, *, impl=None, chip=None):
    """silu(gate) * up: [B, T, F] in the inputs' dtype (Shazeer, 2020)."""
    impl = implementation('swiglu', impl=impl, chip=chip)
    _check_dtypes('swiglu', impl, gate=gate_BTF, up=up_BTF)
    _check_shapes('swiglu', 'BTF', gate=gate_BTF, up=up_BTF)
    if impl == 'xla':
        return _plain(chip).swiglu(gate_BTF, up_BTF)
    return _kernels('swiglu').swiglu(gate_BTF, up_BTF, _target(impl, chip))


def cross_entropy(
    x_BTD, head_DV, targets_BT, *, weights_BT=None, z_loss=0.0, vocab_axis=None, impl=None, chip=None
):  # fmt: skip
    """(mean loss, {'nll', 'z_loss'}) of a linear head, float32 scalars; by chunks, so that whole logits never exist.

    The loss is the sum of its parts: nll, the mean negative log-likelihood of `targets_BT` in
    nats, and `z_loss` times the mean squared log-sum-exp (PaLM, section 5). Only the loss has a
    gradient, which is made in the forward pass. `weights_BT` (constants) weight the means; a
    target outside [0, V) is not to be given. `vocab_axis` names the mapped axis that V is split over.
    """
    impl = implementation('cross_entropy', impl=impl, chip=chip)
    _check_dtypes('cross_entropy', impl, x=x_BTD, head=head_DV)
    _check_shapes('cross_entropy', 'BTD', x=x_BTD)
    _check_shapes('cross_entropy', 'DV', head=head_DV)
    fits = head_DV.shape[0] == x_BTD.shape[2] and targets_BT.shape == x_BTD.shape[:2]
    _require(
        fits,
        'cross_entropy',
        f'x {x_BTD.shape}, head {head_DV.shape} and targets {targets_BT.shape} do not go together',
    )
    if impl == 'xla':
        return cpu.cross_entropy(
            x_BTD, head_DV, targets_BT, weights_BT=weights_BT, z_loss=z_loss, vocab_axis=vocab_axis
        )
    function, target = _kernels('cross_entropy').cross_entropy, _target(impl, chip)
    return function(x_BTD, head_DV, targets_BT.astype(jnp.int32), weights_BT, z_loss, vocab_axis, target)


def linear(x, w, *, chip=None):
    """x [B, T, *inputs] times w [*inputs, *outputs], a library's matrix product everywhere: [B, T, *outputs]."""
    return _plain(chip).linear(x, w)


def _plain(chip):
    return cpu if chip is None else reference


def _target(impl: str, chip) -> launch.Target:
    return launch.Target(interpret=True) if impl == 'interpret' else launch.Target(chip)


def _kernels(op: str):
    """The module of an op's Triton kernels, which needs Triton."""
    try:
        return importlib.import_module(f'kernels.{op}')
    except ImportError as error:
        raise ImportError(
            f"{op}: its kernels need Triton ({error}); install requirements-kernels.txt, or choose impl='xla'"
        ) from error


def _name(chip) -> str:
    return 'a CPU (chip=None)' if chip is None else chip


def _require(condition: bool, op: str, message: str) -> None:
    if not condition:
        raise ValueError(f'{op}: {message}')


def _check_dtypes(op: str, impl: str, **arrays) -> None:
    """All floating and alike; kernels take float32 and bfloat16, cuDNN bfloat16."""
    dtypes = {name: array.dtype.name for name, array in arrays.items() if array is not None}
    _require(len(set(dtypes.values())) == 1, op, f'dtypes differ: {dtypes}')
    dtype = next(iter(dtypes.values()))
    _require(jnp.issubdtype(dtype, jnp.floating), op, f'dtype {dtype} is not a float')
    allowed = {'xla': (dtype,), 'cudnn': ('bfloat16',)}.get(impl, _DTYPES)
    _require(dtype in allowed, op, f'impl={impl!r} takes {" and ".join(allowed)}, not {dtype}')


def _check_shapes(op: str, axes: str, **arrays) -> None:
    shapes = {name: array.shape for name, array in arrays.items() if array is not None}
    fits = len(set(shapes.values())) == 1 and len(next(iter(shapes.values()))) == len(axes)
    _require(fits, op, f'shapes {shapes} are not [{", ".join(axes)}]')
    _require(0 not in next(iter(shapes.values())), op, f'shapes {shapes} hold nothing')


def _check_head_dim(op: str, H: int, impl: str) -> None:
    _require(H % 2 == 0, op, f'head dim {H} is not even')
    _require(impl == 'xla' or H in HEAD_DIMS, op, f'impl={impl!r} takes head dims {HEAD_DIMS}, not {H}')


def _check_attention(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT, impl: str) -> None:
    op = 'attention'
    _check_dtypes(op, impl, q=q_BTNH, k=k_BSKH, v=v_BSKH)
    _check_shapes(op, 'BTNH', q=q_BTNH)
    _check_shapes(op, 'BSKH', k=k_BSKH, v=v_BSKH)
    (B, T, N, H), K = q_BTNH.shape, k_BSKH.shape[2]
    _require(k_BSKH.shape == (B, T, K, H), op, f'q {q_BTNH.shape} and k {k_BSKH.shape} differ in B, T or H')
    _require(N % K == 0, op, f'{N} query heads are not a multiple of {K} key-value heads')
    _check_head_dim(op, H, impl)
    if segment_ids_BT is not None:
        _require(impl != 'cudnn', op, "impl='cudnn' takes no segment ids; choose 'triton' or 'xla'")
        _require(
            segment_ids_BT.shape == (B, T), op, f'segment ids {segment_ids_BT.shape} are not [B, T] of q {q_BTNH.shape}'
        )
