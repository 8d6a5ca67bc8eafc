"""Benchmarks the train step of the whole model: speed and memory for each choice of ops, and an exact resume.

Shapes: A accumulation steps, B sequences, R = seq_len + 1.
"""

import dataclasses
import functools
import os
import statistics
import time

import jax
import numpy as np

from bench.gpu import benchmark
from tinyllama_jax import checkpoint, flops, sharding
from tinyllama_jax import step as step_lib
from tinyllama_jax.config import Config

LOSS_TOLERANCE = 0.02  # nats, for the first two losses in bfloat16, which are near ln 32,000 = 10.4
RESUME_STEPS = 20
_MODULE = 'bench.gpu.all'
_DETERMINISTIC = '--xla_gpu_exclude_nondeterministic_ops=true'  # the embedding's gradient adds in a fixed order
_MARGIN = 0.95  # share of device memory that a predicted peak may take


@dataclasses.dataclass(frozen=True)
class Trainer:
    """A compiled step (state, rows) -> (state, metrics), and the memory that the compiler plans for it."""

    step: object
    remat: str
    memory: dict[str, int | None]


def make_mesh(config: Config):
    """Returns a mesh of the first device only."""
    return sharding.make_mesh(config.mesh, jax.devices()[:1])


def train_config(setting: benchmark.Setting) -> Config:
    """Returns the run with our kernels; in the smoke run only attention is interpreted, because it is slow."""
    return setting.config('xla', attention='interpret') if setting.smoke else setting.config()


def make_rows(setting: benchmark.Setting, count: int) -> np.ndarray:
    """Returns `count` batches rows_ABR of random tokens from a fixed seed."""
    shape = (count, 1, setting.batch, setting.model.seq_len + 1)
    return np.random.default_rng(0).integers(0, setting.model.vocab_size, shape, dtype=np.uint16)


def fitting(compile_, remats: tuple[str, ...]) -> Trainer:
    """Compiles with each of `remats` until the predicted peak fits the device; the last is taken in any case."""
    limit = (jax.devices()[0].memory_stats() or {}).get('bytes_limit')
    for remat in remats:
        compiled = compile_(remat)
        memory = benchmark.compiler_memory(compiled)
        if not limit or (memory['predicted_peak_bytes'] or 0) <= _MARGIN * limit:
            break
    return Trainer(compiled, remat, memory)


def compiled_step(config: Config, setting: benchmark.Setting, remats: tuple[str, ...]) -> Trainer:
    """Compiles the product's train step with the first of `remats` that fits."""
    mesh = make_mesh(config)
    state = step_lib.abstract_state(config, mesh)
    rows = jax.ShapeDtypeStruct(make_rows(setting, 1)[0].shape, np.uint16)

    def compiled(remat: str):
        chosen = dataclasses.replace(config, train=dataclasses.replace(config.train, remat=remat))
        return step_lib.jit_train_step(chosen, mesh).lower(state, rows, None).compile()

    trainer = fitting(compiled, remats)
    return dataclasses.replace(trainer, step=lambda state, rows_ABR: trainer.step(state, rows_ABR, None))


def step(setting: benchmark.Setting) -> dict:
    """Measures tokens/s, MFU and memory of the train step with Triton's, cuDNN's and XLA's ops, in turns.

    XLA's attention saves whole attention matrices, so its step recomputes every layer. One of Triton's variants
    does so too, for comparison.
    """
    ours = setting.kernels
    variants = {
        ours: (train_config(setting), ('none', 'attention', 'full')),
        'xla': (setting.config('xla'), ('full',)),
    }
    if not setting.smoke:
        variants[f'{ours}, recomputing'] = (setting.config(), ('full',))
        variants[f'{ours}, cudnn attention'] = (setting.config(attention='cudnn'), ('none', 'full'))
    return _measured(setting, variants)


def unrolled(setting: benchmark.Setting) -> dict:
    """Measures the step with our ops, with unrolled and with scanned layers."""
    if setting.smoke:
        raise benchmark.Skipped('the smoke run covers this code in `step`')
    config = train_config(setting)
    scanned = dataclasses.replace(config, model=dataclasses.replace(config.model, scan_layers=True))
    remats = ('none', 'attention', 'full')
    return _measured(setting, {'scanned': (scanned, remats), 'unrolled': (config, remats)})


def _measured(setting: benchmark.Setting, variants: dict) -> dict:
    batches = list(make_rows(setting, 2 if setting.smoke else 4))
    trainers = {name: compiled_step(config, setting, remats) for name, (config, remats) in variants.items()}
    trainers = dict(sorted(trainers.items(), key=lambda item: item[1].memory['predicted_peak_bytes'] or 0))
    rows, failures, state = {}, [], None
    for name, trainer in trainers.items():
        del state  # two states do not fit in memory
        config = variants[name][0]
        state, losses = step_lib.init_state(config, make_mesh(config)), []
        for rows_ABR in batches[:2]:
            state, metrics = trainer.step(state, rows_ABR)
            losses.append(float(metrics['loss']))
        rows[name] = {'ops': name, 'remat': trainer.remat, 'first_loss': losses[0], 'second_loss': losses[1]}
        rows[name] |= trainer.memory | {'peak_bytes_so_far': benchmark.peak_bytes()}
    failures += loss_failures({name: [row['first_loss'], row['second_loss']] for name, row in rows.items()})
    seconds = take_turns(trainers, state, batches, setting)
    tokens, kind = setting.batch * setting.model.seq_len, jax.devices()[0].device_kind
    for name, row in rows.items():
        row |= speed(setting, tokens / statistics.median(seconds[name]), kind)
    return {'rows': list(rows.values()), 'failures': failures}


def loss_failures(losses: dict[str, list[float]], tolerance: float = LOSS_TOLERANCE) -> list[str]:
    """Returns a sentence for each entry whose losses differ from the first entry's by more than `tolerance`."""
    first, *others = losses
    worst = {name: float(np.abs(np.subtract(losses[first], losses[name])).max()) for name in others}  # NaN stays
    return [
        f"the losses of {name} differ from {first}'s by {error:.2g}, more than {tolerance}"
        for name, error in worst.items()
        if not error <= tolerance
    ]


def speed(setting: benchmark.Setting, tokens_per_second: float, kind: str) -> dict[str, float | None]:
    """Returns tokens/s, and MFU by FLOP conventions C and F."""
    share = functools.partial(flops.mfu, setting.model, devices=1, device_kind=kind)
    return {'tokens_per_second': tokens_per_second} | {
        f'mfu_{convention}': share(convention, tokens_per_second) for convention in ('C', 'F')
    }


def take_turns(
    trainers: dict[str, Trainer], state, batches, setting: benchmark.Setting, *, repeats: int = 5, count: int = 1
) -> dict[str, list[float]]:
    """Measures seconds per step, in turns. All trainers update one donated state."""
    holder = [state]

    def call(trainer: Trainer):
        for rows_ABR in batches:
            holder[0], metrics = trainer.step(holder[0], rows_ABR)
        return metrics

    del state
    calls = {name: functools.partial(call, trainer) for name, trainer in trainers.items()}
    seconds = benchmark.in_turns(calls, repeats=1 if setting.smoke else repeats, count=count)
    return {name: [each / len(batches) for each in values] for name, values in seconds.items()}


def resume(setting: benchmark.Setting) -> dict:
    """Trains 20 steps and saves after 10; a new process resumes there; its losses must be the same digits."""
    env = {} if setting.smoke else {'XLA_FLAGS': f'{os.environ.get("XLA_FLAGS", "")} {_DETERMINISTIC}'.strip()}
    results = []
    for phase, function in (('resume_first', resume_first), ('resume_second', resume_second)):
        if setting.smoke and phase == 'resume_first':  # memory is not short here: no own process
            result = benchmark.outcome(function, setting)
        else:
            result = benchmark.in_process(_MODULE, phase, setting, limit_s=200, env=env)
        if result['status'] != 'ok':
            raise RuntimeError(f'{phase}: {result["error"]}')
        results.append(result['results'])
    whole, resumed = (each['losses'] for each in results)
    after = whole[RESUME_STEPS // 2 :]
    failures = [] if after == resumed else [f'losses after the resume differ: {after} became {resumed}']
    return {
        'digits_equal': str(after == resumed),
        'losses': whole,
        'resumed_losses': resumed,
        'save_s': results[0]['seconds'],
        'restore_s': results[1]['seconds'],
        'failures': failures,
    }


def _resumed_config(setting: benchmark.Setting) -> Config:
    return setting.config('xla' if setting.smoke else None)


def _checkpointer(setting: benchmark.Setting) -> checkpoint.Checkpointer:
    return checkpoint.Checkpointer(setting.work / 'checkpoints')


def _trained(trainer: Trainer, state, batches) -> tuple:
    losses = []
    for rows_ABR in batches:
        state, metrics = trainer.step(state, rows_ABR)
        losses.append(float(metrics['loss']))
    return state, losses


def resume_first(setting: benchmark.Setting) -> dict:
    """Trains all steps with a save in the middle; returns the losses and the seconds of the save."""
    trainer = compiled_step(_resumed_config(setting), setting, ('none', 'attention', 'full'))
    batches, half = make_rows(setting, RESUME_STEPS), RESUME_STEPS // 2
    state, losses = _trained(
        trainer, step_lib.init_state(_resumed_config(setting), make_mesh(_resumed_config(setting))), batches[:half]
    )
    start = time.perf_counter()
    checkpoints = _checkpointer(setting)
    checkpoints.save(half, state, {})
    checkpoints.close()
    seconds = time.perf_counter() - start
    return {'losses': losses + _trained(trainer, state, batches[half:])[1], 'seconds': seconds}


def resume_second(setting: benchmark.Setting) -> dict:
    """Restores the checkpoint of `resume_first` and trains the remaining steps."""
    config, half = _resumed_config(setting), RESUME_STEPS // 2
    trainer = compiled_step(config, setting, ('none', 'attention', 'full'))
    start = time.perf_counter()
    abstract = step_lib.abstract_state(config, make_mesh(config))
    state, meta = _checkpointer(setting).restore(abstract, lambda meta: None)
    seconds = time.perf_counter() - start
    assert meta['step'] == half
    return {'losses': _trained(trainer, state, make_rows(setting, RESUME_STEPS)[half:])[1], 'seconds': seconds}
