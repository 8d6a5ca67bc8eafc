"""What the ops accept: dtypes, shapes and sizes; each check raises a ValueError that names the op and the values."""

import jax.numpy as jnp

HEAD_DIMS = (64, 128)
KERNEL_DTYPES = ('float32', 'bfloat16')
_MOST_COLUMNS = 16_384  # of a row, which a program holds in registers


def require(condition: bool, op: str, message: str) -> None:
    """Raises ValueError unless the condition holds."""
    if not condition:
        raise ValueError(f'{op}: {message}')


def require_implementation(
    op: str, impl: str, dtype: str, *, head_dim: int = 64, columns: int = 1, segment_ids: bool = False
) -> None:
    """Raises ValueError unless the implementation takes this dtype, head dim, row length and segment ids.

    An op that has none of these ignores the argument.
    """
    allowed = {'xla': (dtype,), 'cudnn': ('bfloat16',)}.get(impl, KERNEL_DTYPES)
    require(dtype in allowed, op, f'impl={impl!r} takes {" and ".join(allowed)}, not {dtype}')
    if op in ('attention', 'rope'):
        require(head_dim % 2 == 0, op, f'head dim {head_dim} is not even')
        fits = impl == 'xla' or head_dim in HEAD_DIMS
        require(fits, op, f'impl={impl!r} takes head dims {HEAD_DIMS}, not {head_dim}')
    if op == 'attention' and segment_ids:
        require(impl != 'cudnn', op, "impl='cudnn' takes no segment ids; choose 'triton' or 'xla'")
    if op == 'rms_norm' and impl != 'xla':
        require(columns <= _MOST_COLUMNS, op, f'rows of {columns} do not fit a program; {_MOST_COLUMNS} at most')


def require_floats(op: str, axes: str, **arrays) -> str:
    """Returns the arrays' one dtype; raises ValueError unless it is a float and they have one shape of these axes.

    Arrays that are None are ignored.
    """
    given = {name: array for name, array in arrays.items() if array is not None}
    dtypes = {name: array.dtype.name for name, array in given.items()}
    require(len(set(dtypes.values())) == 1, op, f'dtypes differ: {dtypes}')
    dtype = next(iter(dtypes.values()))
    require(jnp.issubdtype(dtype, jnp.floating), op, f'dtype {dtype} is not a float')
    shapes = {name: array.shape for name, array in given.items()}
    shape = next(iter(shapes.values()))
    fits = set(shapes.values()) == {shape} and len(shape) == len(axes)
    require(fits, op, f'shapes {shapes} are not [{", ".join(axes)}]')
    require(0 not in shape, op, f'shapes {shapes} are empty')
    return dtype


def require_shape(op: str, name: str, array, shape: tuple[int, ...], axes: str) -> None:
    """Raises ValueError unless the array has this shape, which follows from the other arrays."""
    require(array.shape == shape, op, f'{name} {array.shape} are not [{", ".join(axes)}] = {shape}')


def require_integers(op: str, name: str, array, shape: tuple[int, ...], axes: str) -> None:
    """Raises ValueError unless the array holds integers or booleans and has this shape."""
    require_shape(op, name, array, shape, axes)
    integral = jnp.issubdtype(array.dtype, jnp.integer) or array.dtype == jnp.bool_
    require(integral, op, f'{name} are {array.dtype.name}, not integers')


def require_heads(op: str, q_BTNH, k_BSKH) -> None:
    """Raises ValueError unless queries and keys agree in batch, time and head dim, and K divides N."""
    (B, T, N, H), K = q_BTNH.shape, k_BSKH.shape[2]
    require(k_BSKH.shape == (B, T, K, H), op, f'q {q_BTNH.shape} and k {k_BSKH.shape} differ in B, T or H')
    require(N % K == 0, op, f'{N} query heads are not a multiple of {K} key-value heads')
