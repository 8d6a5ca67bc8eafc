"""The mesh, and the table that says how every array is sharded over it.

Parameters, gradients and optimizer state follow the same rules, matched on their
path. `fsdp` splits the model dimension (ZeRO-3), `tensor` splits heads, the
feed-forward width and the vocabulary; the batch is split over `data` and `fsdp`.
Only this file names mesh axes.
"""

import functools
import math
import re

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tinyllama_jax import errors
from tinyllama_jax.config import MeshConfig

AXES = ('data', 'fsdp', 'tensor')
BATCH = ('data', 'fsdp')  # the axes that split the batch
VOCABULARY_AXIS = 'tensor'
WEIGHTS_AXIS = 'fsdp'  # splits weights, which are all-gathered where they are used

# PartitionSpecs of the arrays that ops take and return.
TOKENS = P(BATCH)  # [B, T, ...]
HEADS = P(BATCH, None, 'tensor', None)  # [B, T, N or K, H]
HIDDEN = P(BATCH, None, 'tensor')  # [B, T, F]
EMBEDDING = P(VOCABULARY_AXIS, WEIGHTS_AXIS)  # [V, D]
HEAD = P(WEIGHTS_AXIS, VOCABULARY_AXIS)  # [D, V]

# (end of the parameter's path, partition); a leading None is the stacked layer axis.
PARAM_RULES = (
    (r'embed$', EMBEDDING),
    (r'attention/[qkv]$', P(None, 'fsdp', 'tensor', None)),
    (r'attention/o$', P(None, 'tensor', None, 'fsdp')),
    (r'mlp/(gate|up)$', P(None, 'fsdp', 'tensor')),
    (r'mlp/down$', P(None, 'tensor', 'fsdp')),
    (r'scale$', P()),
    (r'lm_head$', HEAD),
    (r'ns_coeffs$', P()),  # Muon's, of optax
)


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
    """Returns the (data, fsdp, tensor) mesh over `devices`, by default all of them.

    Raises UsageError if the product of the axes is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config, axis) for axis in AXES]
    known = math.prod(size for size in sizes if size > 0)
    sizes = [len(devices) // known if size == -1 else size for size in sizes]
    if math.prod(sizes) != len(devices):
        axes = ', '.join(f'{axis}={getattr(config, axis)}' for axis in AXES)
        raise errors.UsageError(f'config.mesh: {axes} do not multiply to the {len(devices)} devices there are.')
    return jax.make_mesh(sizes, AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3, devices=devices)


def shardings(tree, mesh: Mesh, *, whole: bool = False):
    """Returns the NamedSharding of every array of a tree of parameters or optimizer state; scalars are replicated.

    With `whole` it leaves `fsdp` out: the weights as each device holds them through a step under ZeRO-1. Raises
    ValueError if no rule matches an array, UsageError if an axis does not divide a dimension.
    """
    specs = jax.tree_util.tree_map_with_path(lambda path, leaf: _sharding(path, leaf, mesh), tree)
    if not whole:
        return specs
    return jax.tree.map(lambda s: NamedSharding(mesh, split_axes(s.spec, mesh, (WEIGHTS_AXIS,))), specs)


def _sharding(path, leaf, mesh: Mesh) -> NamedSharding:
    if not leaf.ndim:
        return NamedSharding(mesh, P())
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    spec = next((spec for pattern, spec in PARAM_RULES if re.search(pattern, name)), None)
    if spec is None:
        raise ValueError(f'sharding.PARAM_RULES has no rule for {name} of shape {leaf.shape}')
    for size, axis in zip(leaf.shape, spec, strict=False):
        if axis is not None and size % mesh.shape[axis]:
            raise errors.UsageError(
                f'config.mesh.{axis}: {mesh.shape[axis]} devices do not divide {name} of shape {leaf.shape}.'
            )
    return NamedSharding(mesh, spec)


def batch_shards(mesh: Mesh) -> int:
    """Returns the number of parts that the batch is split into."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


def batch_sharding(mesh: Mesh, *, leading: int = 0) -> NamedSharding:
    """Returns the sharding of an array whose axis number `leading` is the batch."""
    return NamedSharding(mesh, P(*(None,) * leading, BATCH))


def split_axes(spec: P, mesh: Mesh, without: tuple[str, ...] = ()) -> P:
    """Returns `spec` without the axes in `without` and without axes of size 1."""

    def kept(axes):
        names = (axes,) if isinstance(axes, str) else axes or ()
        return tuple(name for name in names if mesh.shape[name] > 1 and name not in without) or None

    return P(*map(kept, spec))


def global_arrays(batch, mesh: Mesh, *, leading: int = 0):
    """Returns a tree of global arrays made from this process's columns of a batch, on axis number `leading`."""
    return jax.tree.map(functools.partial(global_array, batch_sharding(mesh, leading=leading)), batch)


def global_array(spec: NamedSharding, local) -> jax.Array:
    """Returns the global array of which `local` is this process's part. A transfer guard lets this transfer through."""
    with jax.transfer_guard_host_to_device('allow'):  # JAX counts it as implicit if there are several processes
        return jax.make_array_from_process_local_data(spec, local)


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, P())


def local_columns(mesh: Mesh, batch: int) -> slice:
    """Returns this process's slice of a batch of `batch` sequences."""
    index_map = batch_sharding(mesh).addressable_devices_indices_map((batch,))
    starts, stops = zip(*(index[0].indices(batch)[:2] for index in index_map.values() if index), strict=True)
    return slice(min(starts), max(stops))
