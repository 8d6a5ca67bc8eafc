"""The training loop: data in, steps dispatched, metrics and checkpoints out. No maths.

Step n + 1 is dispatched before the metrics of step n are fetched, so logging never
stalls the device; everything logged up to a checkpoint's step is on disk before that
checkpoint is complete, which makes a resume exact.
"""

import functools
import math
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import jax

from tinyllama_jax import (
    checkpoint,
    config_tree,
    errors,
    flops,
    metrics,
    ops,
    runtime,
    selftest,
    sharding,
    validation,
    workdir,
)  # fmt: skip
from tinyllama_jax import config as config_lib
from tinyllama_jax import step as step_lib
from tinyllama_jax.config import Config
from tinyllama_jax.data import pipeline, store

Hook = Callable[[int, Any], None]  # called with (step, params) after each validation


def accumulation_steps(config: Config, shards: int) -> int:
    """Forward passes per optimiser step on one device. Raises UsageError if the batch does not divide."""
    batch, micro = config.train.global_batch_size, config.train.micro_batch_size * shards
    if batch % micro:
        raise errors.UsageError(
            f'config.train.global_batch_size: {batch} is not a multiple of micro_batch_size x batch shards = '
            f'{config.train.micro_batch_size} x {shards}; choose another micro_batch_size or mesh.'
        )
    return batch // micro


def train(config: Config, folder: pathlib.Path, *, command: str = '', hooks: Iterable[Hook] = ()) -> None:
    """Trains until `config.train.num_steps`, going on from the newest whole checkpoint in `folder`.

    Raises UsageError (what cannot be run or resumed), RunError (non-finite loss,
    failed write) and Stopped (after saving on SIGTERM or Ctrl-C).
    """
    with runtime.StopSignals() as signals, runtime.awake_cores():
        run = _Run(config, pathlib.Path(folder), command, tuple(hooks))
        try:
            run.loop(signals)
        finally:
            run.close()


class _Run:
    """One start of a run: its mesh, state, data and writers."""

    def __init__(self, config: Config, folder: pathlib.Path, command: str, hooks: tuple[Hook, ...]):
        self.config, self.folder, self.hooks, self.profiling, self.unwritten = config, folder, hooks, False, True
        self.command = command or f'main.py train --config=FILE --workdir={folder}'
        prepare_command = 'python ' + self.command.replace(' train ', ' prepare ', 1)
        tokens = store.TokenStore(config.data.store_path(folder), prepare_command)
        self.data = pipeline.make_dataset(config, tokens)
        self.mesh = sharding.make_mesh(config.mesh)
        self.ops = ops.for_run(config, self.mesh)
        self.eval_step = step_lib.jit_eval_step(config, self.mesh, self.ops)
        self.accumulation = accumulation_steps(config, sharding.batch_shards(self.mesh))
        self.checkpointer = checkpoint.Checkpointer(
            folder / 'checkpoints', keep=config.train.keep_checkpoints, keep_every=config.train.keep_every_steps
        )
        workdir.keep_tokenizer(folder, tokens.tokenizer_path)
        self.state, self.start = self._restore_or_init()
        before = workdir.read_record(folder)
        self.recomputed = metrics.Recomputed(folder / 'metrics.jsonl', self.start)
        metrics.cut_records(folder / 'validation.jsonl', self.start)
        record = workdir.write_record(folder, config, command)
        if not workdir.same_losses(before, record):
            self.recomputed.forget()
        self.writer = metrics.Writer(folder / 'metrics.jsonl', start_step=self.start)
        self.validations = metrics.Writer(folder / 'validation.jsonl', start_step=self.start)
        self.tokens_per_step = config.train.global_batch_size * config.model.seq_len
        self.progress = metrics.Progress(self.start, config.train.num_steps, tokens_per_step=self.tokens_per_step)
        changed = config_tree.differences(before['config'], record['config'], 'config') if before else {}
        for field, (old, new) in changed.items():
            self.progress.say(f'changed since the last start: {field} was {old}, is {new}')

    def _restore_or_init(self):
        restored = self.checkpointer.restore(step_lib.abstract_state(self.config, self.mesh), self._check_resumable)
        if restored is None:
            return step_lib.init_state(self.config, self.mesh), 0
        state, meta = restored
        return state, meta['step']

    def _check_resumable(self, meta: dict) -> None:
        saved = checkpoint.fixed_settings(config_tree.from_dict(meta['config']))
        wanted = checkpoint.fixed_settings(self.config)
        if meta['data'] is None:  # imported, not trained yet: only the weights' shapes and meaning bind
            saved, wanted = ({'model': workdir.weights_settings(settings['model'])} for settings in (saved, wanted))
        found = config_tree.differences(saved, wanted, 'config')
        if not found and meta['data'] not in (None, self.data.fingerprint):
            changed = config_tree.differences(
                config_tree.completed(meta['config'])['data'], config_lib.to_dict(self.config.data), 'config.data'
            )
            found = changed or {'data (the store behind it)': (meta['data'][:12], self.data.fingerprint[:12])}
        for field, (old, new) in found.items():
            raise errors.UsageError(
                f'{field} is {new}, but {self.folder} was trained with {old} up to step {meta["step"]}. Set it back, '
                f'or start a new run: python {self.command.replace(str(self.folder), f"{self.folder}-2")}'
            )

    def loop(self, signals: runtime.StopSignals) -> None:
        config, stop = self.config.train, self.config.train.num_steps
        if self.start >= stop:
            self.progress.say(f'{self.folder}: trained to step {self.start}; nothing to do for num_steps={stop}.')
            return
        self.progress.say(self._banner())
        self.progress.say(self.ops.table())
        if self.config.kernels.self_test:
            selftest.check(self.config, self.ops, self.progress.say)
        train_step = step_lib.jit_train_step(self.config, self.mesh, self.ops)
        self.throughput, self.logged, saved, pending = metrics.Throughput(), self.start, self.start, None
        batches = self.data.batches(
            self.start, stop, accumulation=self.accumulation, columns=sharding.local_columns(self.mesh, self._columns())
        )
        for step in range(self.start + 1, stop + 1):
            if signals.received:
                self._stop(signals.received, step - 1, pending, saved)
            with self.throughput.timed('data'):
                rows_ABR, segment_ids_ABR = self._to_devices(next(batches))
            self._profile(step)
            self.state, scalars = train_step(self.state, rows_ABR, segment_ids_ABR)
            self._log(pending)
            pending = (step, scalars)
            evaluate = step == stop or (config.eval_every_steps and step % config.eval_every_steps == 0)
            save = step == stop or step % config.checkpoint_every_steps == 0
            if evaluate or save:
                pending = self._log(pending)
            if evaluate:
                self._validate(step)
            if save:
                saved = self._save(step)
        self.checkpointer.wait()
        self.progress.say(f'trained to step {stop}; checkpoints in {self.folder / "checkpoints"}')

    def _columns(self) -> int:
        return self.config.train.global_batch_size // self.accumulation

    def _to_devices(self, batch):
        spec = sharding.batch_sharding(self.mesh, leading=1)
        return jax.tree.map(functools.partial(jax.make_array_from_process_local_data, spec), batch)

    def _banner(self) -> str:
        config, count = self.config, sum(flops.parameter_counts(self.config.model).values())
        axes = ', '.join(f'{axis} {size}' for axis, size in self.mesh.shape.items())
        return (
            f'{count:,} parameters on {self.mesh.size} x {self.mesh.devices.flat[0].device_kind} ({axes}); '
            f'{self.tokens_per_step:,} tokens a step in {self.accumulation} x {self._columns()} sequences; '
            f'steps {self.start} to {config.train.num_steps}; the first step compiles'
        )

    def _log(self, pending) -> None:
        """Fetches the scalars of a finished step, stops on a bad loss, writes every log_every_steps."""
        if pending is None:
            return
        step, scalars = pending
        record = {'step': step} | {name: float(value) for name, value in jax.device_get(scalars).items()}
        if not (math.isfinite(record['loss']) and math.isfinite(record['grad_norm'])):
            raise errors.RunError(
                f'step {step}: the loss is {record["loss"]}, the norm of its gradient {record["grad_norm"]}. Nothing '
                f'after it was saved; the newest checkpoint in {self.folder / "checkpoints"} is from before. Lower the '
                'learning rate, or inspect the data of this step.'
            )
        if step % self.config.train.log_every_steps and step != self.config.train.num_steps:
            return
        self.recomputed.check(step, record['loss'])
        record |= self.throughput.lap((step - self.logged) * self.tokens_per_step)
        kind = self.mesh.devices.flat[0].device_kind
        record['mfu'] = flops.mfu(
            self.config.model, self.config.train.mfu, record['tokens_per_second'], kind, self.mesh.size
        )
        if self.unwritten:  # once per start, beside what it explains
            record['kernels'], self.unwritten = dict(self.ops.implementations), False
        self.logged = step
        self.writer.write(record)
        self.progress.update(record)

    def _validate(self, step: int) -> None:
        """Validation loss of each source; then the hooks."""
        with self.throughput.timed('paused'):
            loss = validation.losses(self.eval_step, self.state.params, self.data, self._eval_batch())
            self.validations.write({'step': step, 'loss': loss})
            self.progress.say(
                f'step {step}: validation loss ' + ', '.join(f'{name} {value:.4f}' for name, value in loss.items())
            )
            for hook in self.hooks:
                hook(step, self.state.params)

    def _eval_batch(self) -> int:
        return self.config.train.micro_batch_size * sharding.batch_shards(self.mesh)

    def _save(self, step: int) -> int:
        with self.throughput.timed('checkpoint'):
            self.writer.sync()
            meta = checkpoint.make_meta(self.config, self.data.fingerprint, self.data.seen(step))
            self.checkpointer.save(step, self.state, meta)
        return step

    def _stop(self, received: int, step: int, pending, saved: int) -> None:
        self._log(pending)
        if saved != step or not self.checkpointer.steps():
            self._save(step)
        self.checkpointer.wait()
        raise errors.Stopped(f'stopped and saved at step {step}; the same command goes on from there.', received)

    def _profile(self, step: int) -> None:
        first = self.config.train.profile_step
        if first is not None and step == first:
            jax.profiler.start_trace(str(self.folder / 'profile'))
            self.profiling = True
        if self.profiling and step == first + self.config.train.profile_steps:
            self._end_profile()

    def _end_profile(self) -> None:
        jax.block_until_ready(self.state)
        jax.profiler.stop_trace()
        self.profiling = False
        self.progress.say(f'profile, for TensorBoard: {self.folder / "profile"}')

    def close(self) -> None:
        if self.profiling:
            self._end_profile()
        self.progress.close()
        self.writer.close()
        self.validations.close()
