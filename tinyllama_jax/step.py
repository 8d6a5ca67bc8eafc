"""One training step and one evaluation step as pure functions of (state, batch). No I/O.

A batch is rows_ABR: A accumulation steps, B sequences, R = seq_len + 1 tokens, in the
store's 16 or 32 bits. They are widened and cut into inputs and targets here. With it
come segment_ids_ABR, which tell the documents of a row apart, or None: then a token
sees everything before it in its row.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from tinyllama_jax import errors, model, optimizer, sharding
from tinyllama_jax import ops as ops_lib
from tinyllama_jax.config import Config
from tinyllama_jax.ops import Ops


def accumulation_steps(config: Config, shards: int) -> int:
    """Returns the forward passes per optimizer step on one device. Raises UsageError if the batch does not divide."""
    batch, micro = config.train.global_batch_size, config.train.micro_batch_size * shards
    if batch % micro:
        raise errors.UsageError(
            f'config.train.global_batch_size: {batch} is not a multiple of micro_batch_size x batch shards = '
            f'{config.train.micro_batch_size} x {shards}; choose another micro_batch_size or mesh.'
        )
    return batch // micro


class TrainState(NamedTuple):
    """Everything that training changes; `step` counts the optimizer steps done."""

    step: Any
    params: Any
    opt_state: Any


def make_state(config: Config, params) -> TrainState:
    """Returns the state before step 0 with these parameters."""
    tx = optimizer.make_optimizer(config.optimizer, config.train.num_steps)
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))


def abstract_state(config: Config, mesh: Mesh) -> TrainState:
    """Returns shapes, dtypes and shardings of the state, without allocating it."""
    # eval_shape traces and runs nothing, so this describes the 1.1 B state on a laptop.
    state = jax.eval_shape(lambda: make_state(config, model.init_params(config.model, jax.random.key(0))))
    specs = sharding.shardings(state, mesh)
    return jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), state, specs)


def state_shardings(config: Config, mesh: Mesh) -> TrainState:
    """Returns the NamedSharding of each array of the state."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh))


def init_state(config: Config, mesh: Mesh) -> TrainState:
    """Returns a fresh state, a function of the seed alone. Every array is made on its own devices."""
    # Without out_shardings XLA may replicate the Adam moments, which do not fit then.
    make = jax.jit(
        lambda key: make_state(config, model.init_params(config.model, key)),
        out_shardings=state_shardings(config, mesh),
    )
    return make(model.random_key(config.seed))


def _split(rows_BR):
    # A row holds one token more than the model reads: its first T are inputs, its last T the targets.
    rows_BR = rows_BR.astype(jnp.int32)
    return rows_BR[:, :-1], rows_BR[:, 1:]


def _documents(segment_ids_BR, config: Config) -> dict[str, Any]:
    """Returns the arguments of `model.hidden` that tell documents apart; none without segment ids."""
    if segment_ids_BR is None:
        return {}
    # The model sees the documents of the inputs; a row's last token is only a target.
    segment_ids_BT = segment_ids_BR[:, :-1].astype(jnp.int32)
    if not config.data.restart_positions:
        return {'segment_ids_BT': segment_ids_BT}
    return {'segment_ids_BT': segment_ids_BT, 'positions_BT': _restarted_positions(segment_ids_BT)}


def _restarted_positions(segment_ids_BT):
    """Returns positions [B, T] that count from the start of each segment."""
    index_BT = jax.lax.broadcasted_iota(jnp.int32, segment_ids_BT.shape, 1)
    begins_BT = jnp.pad(segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1], ((0, 0), (1, 0)))
    # A running maximum carries the index of the newest start along the row.
    return index_BT - jax.lax.cummax(jnp.where(begins_BT, index_BT, 0), axis=1)


def _step_weights(params, config: Config, ops: Ops):
    """Returns the parameters as a step's passes read them; under ZeRO-1 all-gathered once for the whole step."""
    mesh = ops.mesh
    if not ops.whole_weights or mesh is None or mesh.size == 1:
        return params
    # A gradient has the dtype of its weight, so the copy is made in the gradients' dtype.
    dtype = config.train.gradient_dtype or model.compute_dtype(config.model, ops)

    def gathered(w, split, whole):
        if split == whole:
            return w
        # Cast before the all-gather: XLA would otherwise gather float32, twice the bytes.
        w = jax.lax.with_sharding_constraint(w.astype(dtype), split)
        return jax.lax.with_sharding_constraint(w, whole)

    return jax.tree.map(
        gathered, params, sharding.shardings(params, mesh), sharding.shardings(params, mesh, whole=True)
    )


def _loss_and_grads(params, rows_ABR, segment_ids_ABR, config: Config, ops: Ops):
    """Returns (parts of the loss, gradients), means over all A x B sequences; the sums over A are float32."""
    weights = _step_weights(params, config, ops)
    options = {'ops': ops, 'z_loss': config.train.z_loss, 'remat': config.train.remat}

    def one(rows_BR, segment_ids_BR):
        documents = _documents(segment_ids_BR, config)
        loss = functools.partial(model.loss, config=config.model, **options, **documents)
        grads, parts = jax.grad(loss, has_aux=True)(weights, *_split(rows_BR))
        if ops.mesh and weights is not params:
            # ZeRO-1: reduce-scattered here, so that only a shard is accumulated, in float32.
            split = sharding.shardings(params, ops.mesh)
            grads = jax.tree.map(jax.lax.with_sharding_constraint, grads, split)
            grads = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), grads)
        return parts, grads

    if rows_ABR.shape[0] == 1:
        return one(*jax.tree.map(lambda x_ABR: x_ABR[0], (rows_ABR, segment_ids_ABR)))

    # One compiled pass, scanned over the A steps. Gradients are added up in the sharding of the parameters.
    def add(total, batch):
        return jax.tree.map(jnp.add, total, one(*batch)), None

    zero = ({name: jnp.zeros((), jnp.float32) for name in ('nll', 'z_loss')}, jax.tree.map(jnp.zeros_like, params))
    total, _ = jax.lax.scan(add, zero, (rows_ABR, segment_ids_ABR))
    return jax.tree.map(lambda leaf: leaf / rows_ABR.shape[0], total)


def train_step(state: TrainState, rows_ABR, segment_ids_ABR, *, config: Config, ops: Ops):
    """Takes one optimizer step; returns (new state, {loss, grad_norm, learning_rate, and z_loss if it is on}).

    `loss` is the mean next-token loss without the z-loss, `grad_norm` the norm before clipping, `learning_rate` the
    rate that this step used.
    """
    parts, grads = _loss_and_grads(state.params, rows_ABR, segment_ids_ABR, config, ops)
    tx = optimizer.make_optimizer(config.optimizer, config.train.num_steps)
    # Clipping scales by the norm of the whole gradient, so it comes after the accumulation.
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    metrics = {
        'loss': parts['nll'],
        'grad_norm': optax.tree.norm(grads),
        # The optimizer counts its own steps; `state.step` equals that count, so this is the rate that it used.
        'learning_rate': optimizer.learning_rate(config.optimizer, config.train.num_steps)(state.step),
    }
    if config.train.z_loss:
        metrics['z_loss'] = parts['z_loss']
    return TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state), metrics


def eval_step(params, rows_BR, segment_ids_BR, weights_B, *, config: Config, ops: Ops):
    """Returns the weighted mean loss of a batch; a weight of 0 marks a padding row."""
    inputs_BT, targets_BT = _split(rows_BR)
    weights_BT = jnp.broadcast_to(weights_B[:, None], targets_BT.shape)
    documents, params = _documents(segment_ids_BR, config), _step_weights(params, config, ops)
    return model.loss(params, inputs_BT, targets_BT, config.model, ops=ops, weights_BT=weights_BT, **documents)[0]


def jit_train_step(config: Config, mesh: Mesh, ops: Ops | None = None):
    """Returns `train_step` jitted for a mesh; it donates the state."""
    ops = ops or ops_lib.for_run(config, mesh)
    specs = state_shardings(config, mesh)
    # B is sharded and A is not: each device holds its own rows of every accumulation step, so no row ever moves.
    rows = sharding.batch_sharding(mesh, leading=1)
    return jax.jit(
        functools.partial(train_step, config=config, ops=ops),
        in_shardings=(specs, rows, rows),
        out_shardings=(specs, sharding.replicated(mesh)),
        donate_argnums=0,  # the new state takes the old one's memory; both do not fit
    )


def jit_eval_step(config: Config, mesh: Mesh, ops: Ops | None = None):
    """Returns `eval_step` jitted for a mesh."""
    ops = ops or ops_lib.for_run(config, mesh)
    batch = sharding.batch_sharding(mesh)
    params = state_shardings(config, mesh).params
    return jax.jit(
        functools.partial(eval_step, config=config, ops=ops),
        in_shardings=(params, batch, batch, batch),
        out_shardings=sharding.replicated(mesh),
    )
