"""One training step and one evaluation step as pure functions of (state, batch). No I/O.

Rows come as rows_ABR: A accumulation steps, B sequences, R = seq_len + 1 tokens, in
the store's 16 or 32 bits; they are widened and cut into inputs and targets here.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from tinyllama_jax import model, optimizer, sharding
from tinyllama_jax.config import Config


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


def _loss_and_grads(params, rows_ABR, config: Config):
    """Mean loss and gradient over all A x B sequences; the sum over A is kept in float32."""

    def one(rows_BR):
        inputs_BT, targets_BT = _split(rows_BR)
        return jax.value_and_grad(model.loss)(params, inputs_BT, targets_BT, config.model, remat=config.train.remat)

    if rows_ABR.shape[0] == 1:
        return one(rows_ABR[0])

    def add(total, rows_BR):
        return jax.tree.map(jnp.add, total, one(rows_BR)), None

    zero = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params))
    total, _ = jax.lax.scan(add, zero, rows_ABR)
    return jax.tree.map(lambda leaf: leaf / rows_ABR.shape[0], total)


def train_step(state: TrainState, rows_ABR, *, config: Config):
    """One optimiser step; returns the new state and scalars {loss, grad_norm, learning_rate}.

    `grad_norm` is taken before clipping; `learning_rate` is the one this step used.
    """
    loss, grads = _loss_and_grads(state.params, rows_ABR, config)
    tx = optimizer.make_optimizer(config.optimizer, config.train.num_steps)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    metrics = {
        'loss': loss,
        'grad_norm': optax.tree.norm(grads),
        'learning_rate': optimizer.learning_rate(config.optimizer, config.train.num_steps)(state.step),
    }
    return TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state), metrics


def eval_step(params, rows_BR, weights_B, *, config: Config):
    """Weighted mean loss of a batch; a weight of 0 marks a padding row."""
    inputs_BT, targets_BT = _split(rows_BR)
    weights_BT = jnp.broadcast_to(weights_B[:, None], targets_BT.shape)
    return model.loss(params, inputs_BT, targets_BT, config.model, weights_BT=weights_BT)


def jit_train_step(config: Config, mesh: Mesh):
    """`train_step` compiled for a mesh, its state donated."""
    specs = state_shardings(config, mesh)
    rows = sharding.batch_sharding(mesh, leading=1)
    return jax.jit(
        functools.partial(train_step, config=config),
        in_shardings=(specs, rows),
        out_shardings=(specs, sharding.replicated(mesh)),
        donate_argnums=0,
    )


def jit_eval_step(config: Config, mesh: Mesh):
    """`eval_step` compiled for a mesh."""
    batch = sharding.batch_sharding(mesh)
    params = state_shardings(config, mesh).params
    return jax.jit(
        functools.partial(eval_step, config=config),
        in_shardings=(params, batch, batch),
        out_shardings=sharding.replicated(mesh),
    )
