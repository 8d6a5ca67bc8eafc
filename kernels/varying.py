"""Between which devices an array differs: what `jax.shard_map` tracks in types, and a custom gradient must keep to.

Outside `shard_map` no array has such a type, and nothing here does anything.
"""

import jax


def axes(*arrays) -> tuple[str, ...]:
    """The mesh axes along which any of the arrays differs."""
    found = frozenset().union(*(jax.typeof(array).mat.varying for array in arrays))
    return tuple(sorted(found))


def along(names: tuple[str, ...], array):
    """`array` marked as differing along these axes; its gradient is then summed over those that were new."""
    new = tuple(name for name in names if name not in axes(array))
    return jax.lax.pcast(array, new, to='varying') if new else array


def together(*arrays) -> tuple:
    """The arrays, all marked as differing where any of them does."""
    names = axes(*arrays)
    return tuple(along(names, array) for array in arrays)
