"""The mesh axes along which an array varies: `jax.shard_map` tracks them in types, custom gradients must respect them.

Outside `shard_map` arrays have no such type, and these functions change nothing.
"""

import jax


def axes(*arrays) -> tuple[str, ...]:
    """Returns the mesh axes along which any of the arrays varies, sorted."""
    return tuple(sorted(frozenset().union(*(jax.typeof(array).mat.varying for array in arrays))))


def along(names: tuple[str, ...], array):
    """Marks `array` as varying along these axes; its gradient is then summed over the new ones."""
    new = tuple(name for name in names if name not in axes(array))
    return jax.lax.pcast(array, new, to='varying') if new else array


def together(*arrays) -> tuple:
    """Marks all arrays as varying along every axis along which one of them varies."""
    names = axes(*arrays)
    return tuple(along(names, array) for array in arrays)
