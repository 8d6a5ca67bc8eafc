"""One training step and one evaluation step as pure functions of (state, batch). No I/O.

Rows come as rows_ABR: A accumulation steps, B sequences, R = seq_len + 1 tokens, in
the store's 16 or 32 bits; they are widened and cut into inputs and targets here.
Beside them come segment_ids_ABR, which tell the documents of a row apart, or None:
then every token sees all before it in its row.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from tinyllama_jax import model, optimizer, sharding
from tinyllama_jax import ops as ops_lib
from tinyllama_jax.config import Config
from tinyllama_jax.ops import Ops


class TrainState(NamedTuple):
    """Everything that training changes; `step` counts the optimiser steps done."""

    step: Any
    params: Any
    opt_state: Any


def make_state(config: Config, params) -> TrainState:
    """The state before step 0 around given parameters."""
    tx = optimizer.make_optimizer(config.optimizer, config.train.num_steps)
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))


def abstract_state(config: Config, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state, without allocating it."""
    state = jax.eval_shape(lambda: make_state(config, model.init_params(config.model, jax.random.key(0))))
    specs = sharding.shardings(state, mesh)
    return jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), state, specs)


def state_shardings(config: Config, mesh: Mesh) -> TrainState:
    """The NamedSharding of each array of the state."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh))


def init_state(config: Config, mesh: Mesh) -> TrainState:
    """A fresh state, every array made where it will lie; a function of the seed alone."""

    def make(key):
        return make_state(config, model.init_params(config.model, key))

    return jax.jit(make, out_shardings=state_shardings(config, mesh))(jax.random.key(config.seed))


def _split(rows_BR):
    rows_BR = rows_BR.astype(jnp.int32)
    return rows_BR[:, :-1], rows_BR[:, 1:]


def _documents(segment_ids_BR, config: Config) -> dict[str, Any]:
    """What the model is told of the documents in the input tokens; nothing without segment ids."""
    if segment_ids_BR is None:
        return {}
    segment_ids_BT = segment_ids_BR[:, :-1].astype(jnp.int32)
    if not config.data.restart_positions:
        return {'segment_ids_BT': segment_ids_BT}
    return {'segment_ids_BT': segment_ids_BT, 'positions_BT': _restarted_positions(segment_ids_BT)}


def _restarted_positions(segment_ids_BT):
    """Positions [B, T] that count from the start of each segment."""
    index_BT = jax.lax.broadcasted_iota(jnp.int32, segment_ids_BT.shape, 1)
    begins_BT = jnp.pad(segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1], ((0, 0), (1, 0)))
    return index_BT - jax.lax.cummax(jnp.where(begins_BT, index_BT, 0), axis=1)


def _step_weights(params, config: Config, ops: Ops):
    """The parameters as a step's passes read them: themselves, or under ZeRO-1 a whole copy on each device."""
    if not (ops.whole_weights and ops.mesh.size > 1):
        return params
    dtype = config.train.gradient_dtype or model.compute_dtype(config.model, ops)  # gradients have the weights' own

    def gathered(w, split, whole):
        if split == whole:
            return w
        w = jax.lax.with_sharding_constraint(w.astype(dtype), split)  # or it would be gathered first, in float32
        return jax.lax.with_sharding_constraint(w, whole)

    split, whole = (sharding.shardings(params, ops.mesh, whole=whole) for whole in (False, True))
    return jax.tree.map(gathered, params, split, whole)


def _loss_and_grads(params, rows_ABR, segment_ids_ABR, config: Config, ops: Ops):
    """The loss's parts and its gradient, means over all A x B sequences; the sum over A is kept in float32."""
    weights = _step_weights(params, config, ops)
    options = {'ops': ops, 'z_loss': config.train.z_loss, 'remat': config.train.remat}

    def one(rows_BR, segment_ids_BR):
        documents = _documents(segment_ids_BR, config)
        grads, parts = jax.grad(model.loss, has_aux=True)(
            weights, *_split(rows_BR), config.model, **options, **documents
        )  # fmt: skip
        if weights is not params:
            split = sharding.shardings(params, ops.mesh)
            grads = jax.tree.map(jax.lax.with_sharding_constraint, grads, split)
            grads = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), grads)
        return parts, grads

    if rows_ABR.shape[0] == 1:
        return one(*jax.tree.map(lambda x_ABR: x_ABR[0], (rows_ABR, segment_ids_ABR)))

    def add(total, batch):
        return jax.tree.map(jnp.add, total, one(*batch)), None

    zero = ({name: jnp.zeros((), jnp.float32) for name in ('nll', 'z_loss')}, jax.tree.map(jnp.zeros_like, params))
    total, _ = jax.lax.scan(add, zero, (rows_ABR, segment_ids_ABR))
    return jax.tree.map(lambda leaf: leaf / rows_ABR.shape[0], total)


def train_step(state: TrainState, rows_ABR, segment_ids_ABR, *, config: Config, ops: Ops):
    """One optimiser step; returns the new state and scalars {loss, grad_norm, learning_rate}, z_loss if there is one.

    `loss` is the mean next-token loss, without the z-loss; `grad_norm` is taken before
    clipping; `learning_rate` is the one this step used.
    """
    parts, grads = _loss_and_grads(state.params, rows_ABR, segment_ids_ABR, config, ops)
    tx = optimizer.make_optimizer(config.optimizer, config.train.num_steps)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    metrics = {
        'loss': parts['nll'],
        'grad_norm': optax.tree.norm(grads),
        'learning_rate': optimizer.learning_rate(config.optimizer, config.train.num_steps)(state.step),
    }
    if config.train.z_loss:
        metrics['z_loss'] = parts['z_loss']
    return TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state), metrics


def eval_step(params, rows_BR, segment_ids_BR, weights_B, *, config: Config, ops: Ops):
    """Weighted mean loss of a batch; a weight of 0 marks a padding row."""
    inputs_BT, targets_BT = _split(rows_BR)
    weights_BT = jnp.broadcast_to(weights_B[:, None], targets_BT.shape)
    documents, params = _documents(segment_ids_BR, config), _step_weights(params, config, ops)
    return model.loss(params, inputs_BT, targets_BT, config.model, ops=ops, weights_BT=weights_BT, **documents)[0]


def jit_train_step(config: Config, mesh: Mesh, ops: Ops | None = None):
    """`train_step` compiled for a mesh, its state donated."""
    ops = ops or ops_lib.for_run(config, mesh)
    specs = state_shardings(config, mesh)
    rows = sharding.batch_sharding(mesh, leading=1)
    return jax.jit(
        functools.partial(train_step, config=config, ops=ops),
        in_shardings=(specs, rows, rows),
        out_shardings=(specs, sharding.replicated(mesh)),
        donate_argnums=0,
    )


def jit_eval_step(config: Config, mesh: Mesh, ops: Ops | None = None):
    """`eval_step` compiled for a mesh."""
    ops = ops or ops_lib.for_run(config, mesh)
    batch = sharding.batch_sharding(mesh)
    params = state_shardings(config, mesh).params
    return jax.jit(
        functools.partial(eval_step, config=config, ops=ops),
        in_shardings=(params, batch, batch, batch),
        out_shardings=sharding.replicated(mesh),
    )
