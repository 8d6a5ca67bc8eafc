"""The optimizer as one optax chain: clip, AdamW, schedule (paper, section 2.3).

The paper uses AdamW with betas 0.9 and 0.95, weight decay 0.1, gradient clipping at
1.0, and a cosine from 4e-4 to 4e-5 after 2,000 steps of warmup. The original code's
differences are switches of OptimizerConfig; docs/fidelity.md lists them.
"""

import jax
import jax.numpy as jnp
import optax

from tinyllama_jax.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Returns the rate as a function of the optimizer step (from 0): linear warmup, then `config.schedule`.

    With m = micro_steps_per_step the schedule runs over micro-steps. Step s uses the rate
    of its last one, m (s + 1) - 1; m = 1 gives the ordinary rate(s).
    """
    m = config.micro_steps_per_step
    schedule = _schedule(config, config.final_learning_rate, num_steps)
    stuck = _schedule(config, config.peak_learning_rate, num_steps)

    def rate(step):
        micro_step = m * (step + 1) - 1
        with _mixed_dtypes():
            return jnp.where(step < config.stuck_until_step, stuck(micro_step), schedule(micro_step))

    return rate


def _mixed_dtypes():
    """A context in which optax may multiply floats by its integer counts. Our own arithmetic never mixes dtypes."""
    return jax.numpy_dtype_promotion('standard')


def _schedule(config: OptimizerConfig, floor: float, num_steps: int) -> optax.Schedule:
    m, peak = config.micro_steps_per_step, config.peak_learning_rate
    warmup, total = m * config.warmup_steps, m * num_steps
    match config.schedule:
        case 'cosine':
            after = optax.cosine_decay_schedule(peak, max(total - warmup, 1), alpha=floor / peak)
        case 'wsd':
            decay = m * config.decay_steps
            after = optax.linear_schedule(peak, floor, decay, transition_begin=total - warmup - decay)
        case name:
            raise ValueError(f'optimizer.schedule: {name!r} has no schedule in optimizer.py')
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def decay_mask(config: OptimizerConfig, params):
    """Returns True for each parameter that is decayed: all of them, or all but the norms' scales."""
    return jax.tree_util.tree_map_with_path(lambda path, _: config.decay == 'all' or path[-1].key != 'scale', params)


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """Returns the chain: clip by global norm, then `config.name` with decoupled weight decay and the learning rate."""
    match config.name:
        case 'adamw':
            update = optax.adamw(
                learning_rate(config, num_steps),
                b1=config.beta1,
                b2=config.beta2,
                eps=config.eps,
                weight_decay=config.weight_decay,
                mask=lambda params: decay_mask(config, params),
            )
        case name:
            raise ValueError(f'optimizer.name: {name!r} has no update in optimizer.py')
    chain = optax.chain(optax.clip_by_global_norm(config.clip_norm), update)

    def update_fn(updates, state, params=None):
        with _mixed_dtypes():
            return chain.update(updates, state, params)

    return optax.GradientTransformation(chain.init, update_fn)
