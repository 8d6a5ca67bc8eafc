"""Fifty training steps against a PyTorch loop: the same losses, for the default and the original's settings."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from configs import tinyllama_1b
from tests.support import tiny, tiny_export
from tinyllama_jax import sharding
from tinyllama_jax import step as step_lib
from tinyllama_jax.config import Config, MeshConfig

STEPS, WARMUP, PEAK, FLOOR = 50, 5, 4e-3, 4e-4


def _config(variant: str, **optimizer) -> Config:
    """A tiny model trained with the settings of configs/tinyllama_1b.py, all but sizes and rates."""
    full = tinyllama_1b.get_config(variant)
    rates = {'peak_learning_rate': PEAK, 'final_learning_rate': FLOOR, 'warmup_steps': WARMUP, **optimizer}
    return dataclasses.replace(
        tiny.CONFIG,
        model=dataclasses.replace(tiny.MODEL, vocab_size=tiny_export.PIECES, init=full.model.init),
        optimizer=dataclasses.replace(full.optimizer, **rates),
        train=dataclasses.replace(tiny.CONFIG.train, num_steps=STEPS),
    )


def _batches(accumulation: int) -> list[np.ndarray]:
    """Returns rows_ABR whose next token is a function of the last one with some noise: something to learn."""
    rng = np.random.default_rng(0)
    tokens = np.zeros((STEPS * 8, tiny.MODEL.seq_len + 1), np.int64)
    tokens[:, 0] = rng.integers(tiny_export.PIECES, size=len(tokens))
    for time in range(1, tokens.shape[1]):
        noise = rng.integers(3, size=len(tokens))
        tokens[:, time] = (5 * tokens[:, time - 1] + 7 + noise) % tiny_export.PIECES
    return list(tokens.astype(np.uint16).reshape(STEPS, accumulation, 8 // accumulation, -1))


def _our_run(config: Config, params, batches) -> list[dict[str, float]]:
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    # Copied, since the step gives its buffers away.
    state = jax.device_put(
        jax.tree.map(np.array, step_lib.make_state(config, params)), step_lib.state_shardings(config, mesh)
    )
    train_step, scalars = step_lib.jit_train_step(config, mesh), []
    for rows_ABR in batches:
        state, step_scalars = train_step(state, rows_ABR, None)
        scalars.append(jax.tree.map(float, step_scalars))
    return scalars


def _torch_run(llama, batches, groups, rate_of) -> list[dict[str, float]]:
    """AdamW with clipping in PyTorch's words; `rate_of(step, micro_step)` is set before each micro-step."""
    torch = tiny_export.require_torch()
    optimizer = torch.optim.AdamW(groups(llama), lr=0.0, betas=(0.9, 0.95), eps=1e-8)
    scalars = []
    for step, rows_ABR in enumerate(batches):
        optimizer.zero_grad()
        loss_sum = 0.0
        for micro, rows_BR in enumerate(torch.from_numpy(rows_ABR.astype(np.int64))):
            for group in optimizer.param_groups:
                group['lr'] = rate_of(step, step * len(rows_ABR) + micro)
            logits_BTV = llama(rows_BR[:, :-1]).logits
            loss = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), rows_BR[:, 1:].flatten())
            (loss / len(rows_ABR)).backward()
            loss_sum += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(llama.parameters(), 1.0)
        optimizer.step()
        scalars.append(
            {
                'loss': loss_sum / len(rows_ABR),
                'grad_norm': norm.item(),
                'learning_rate': optimizer.param_groups[0]['lr'],
            }
        )
    return scalars


def _cosine(iteration: int, warmup: int, total: int, floor: float) -> float:
    if iteration < warmup:
        return PEAK * iteration / warmup
    return floor + 0.5 * (1 + math.cos(math.pi * (iteration - warmup) / (total - warmup))) * (PEAK - floor)


def _decay_matrices(llama):
    norms = [weight for name, weight in llama.named_parameters() if 'norm' in name]
    others = [weight for name, weight in llama.named_parameters() if 'norm' not in name]
    assert len(norms) == 2 * tiny.MODEL.num_layers + 1
    return [{'params': norms, 'weight_decay': 0.0}, {'params': others, 'weight_decay': 0.1}]


def _decay_all(llama):
    return [{'params': list(llama.parameters()), 'weight_decay': 0.1}]


def _paper_rate(step, micro_step):
    return _cosine(step, WARMUP, STEPS, FLOOR)


def _original_rate(step, micro_step):
    return _cosine(micro_step, 8 * WARMUP, 8 * STEPS, FLOOR)


def _stuck_rate(step, micro_step):
    return _cosine(micro_step, 8 * WARMUP, 8 * STEPS, PEAK if step < 20 else FLOOR)


@pytest.mark.parametrize(
    ('config', 'accumulation', 'groups', 'rate_of'),
    [
        (_config(''), 1, _decay_matrices, _paper_rate),
        (_config('original'), 8, _decay_all, _original_rate),
        (_config('original', stuck_until_step=20), 8, _decay_all, _stuck_rate),
    ],
    ids=['default', 'original', 'original-stuck'],
)
def test_fifty_losses_equal_those_of_a_torch_loop(tmp_path, config, accumulation, groups, rate_of):
    batches = _batches(accumulation)
    params = tiny_export.random_params(config.model, std=0.06)
    llama = tiny_export.transformers_llama(params, config.model, tmp_path).train()
    theirs = _torch_run(llama, batches, groups, rate_of)
    ours = _our_run(config, params, batches)
    np.testing.assert_allclose(
        [scalars['learning_rate'] for scalars in ours], [scalars['learning_rate'] for scalars in theirs], rtol=1e-4
    )
    losses = [scalars['loss'] for scalars in theirs]
    np.testing.assert_allclose([scalars['loss'] for scalars in ours], losses, atol=1e-3, rtol=0)
    assert losses[-1] < losses[0] - 1, 'without learning the agreement would show little'
    norms = [scalars['grad_norm'] for scalars in theirs]
    np.testing.assert_allclose([scalars['grad_norm'] for scalars in ours], norms, rtol=1e-2)
    assert max(norms) > 1 > min(norms), 'the clipping must be both at work and at rest'
