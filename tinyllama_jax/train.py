"""The training loop: data in, steps dispatched, metrics and checkpoints out. No maths.

Step n + 1 is dispatched before the metrics of step n are fetched, so logging never
stalls the device; everything logged up to a checkpoint's step is on disk before that
checkpoint is complete, which makes a resume exact.
"""

import contextlib
import functools
import math
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import jax

from tinyllama_jax import checkpoint, errors, flops, ops, sharding
from tinyllama_jax import step as step_lib
from tinyllama_jax.cluster import members as cluster
from tinyllama_jax.cluster.lockstep import Lockstep
from tinyllama_jax.config import Config
from tinyllama_jax.data import pipeline, store
from tinyllama_jax.process import cores, signals, xla
from tinyllama_jax.run import journal, metrics, resume, selftest
from tinyllama_jax.run.validation import losses

Hook = Callable[[int, Any], None]  # called with (step, params) after each validation and every evaluate_every_steps


def accumulation_steps(config: Config, shards: int) -> int:
    """Forward passes per optimiser step on one device. Raises UsageError if the batch does not divide."""
    batch, micro = config.train.global_batch_size, config.train.micro_batch_size * shards
    if batch % micro:
        raise errors.UsageError(
            f'config.train.global_batch_size: {batch} is not a multiple of micro_batch_size x batch shards = '
            f'{config.train.micro_batch_size} x {shards}; choose another micro_batch_size or mesh.'
        )
    return batch // micro


def train(
    config: Config,
    folder: pathlib.Path,
    *,
    command: str = '',
    hooks: Iterable[Hook] = (),
    members: cluster.Members | None = None,
) -> None:
    """Trains until `config.train.num_steps`, going on from the newest whole checkpoint in `folder`.

    All processes of the run, its `members`, call it alike. Raises UsageError (what cannot be
    run or resumed), RunError (non-finite loss, failed write) and Stopped (after saving on
    SIGTERM or Ctrl-C).
    """
    members = members or cluster.alone(config.train)
    with signals.StopSignals() as stop_signals, cores.awake_cores() if members.count == 1 else contextlib.nullcontext():
        run = _Run(config, pathlib.Path(folder), command, tuple(hooks), members)
        try:
            run.loop(Lockstep(members, stop_signals))
        finally:
            run.close()


class _Run:
    """One start of a run: its mesh, state, data and writers."""

    def __init__(
        self, config: Config, folder: pathlib.Path, command: str, hooks: tuple[Hook, ...], members: cluster.Members
    ):
        self.config, self.folder, self.hooks, self.members = config, folder, hooks, members
        self.profiling, self.unwritten = False, True
        self.command = command or f'main.py train --config=FILE --workdir={folder}'
        prepare_command = 'python ' + self.command.replace(' train ', ' prepare ', 1)
        tokens = store.TokenStore(config.data.store_path(folder), prepare_command)
        self.data = pipeline.make_dataset(config, tokens)
        members.agree(data=self.data.fingerprint)
        self.mesh = sharding.make_mesh(config.mesh)
        self.ops = ops.for_run(config, self.mesh)
        self.eval_step = step_lib.jit_eval_step(config, self.mesh, self.ops)
        self.accumulation = accumulation_steps(config, sharding.batch_shards(self.mesh))
        self.checkpointer = checkpoint.Checkpointer(
            folder / 'checkpoints', keep=config.train.keep_checkpoints, keep_every=config.train.keep_every_steps
        )
        self.state, self.start = self._restore_or_init()
        written = folder, config, command, self.start, tokens.tokenizer_path
        self.journal = journal.Journal(*written) if members.primary else journal.Silent()
        self.tokens_per_step = config.train.global_batch_size * config.model.seq_len

    def _restore_or_init(self):
        check = functools.partial(resume.check, self.config, self.data.fingerprint, self.folder, self.command)
        restored = self.checkpointer.restore(step_lib.abstract_state(self.config, self.mesh), check)
        if restored is None:
            return step_lib.init_state(self.config, self.mesh), 0
        state, meta = restored
        return state, meta['step']

    def loop(self, steps: Lockstep) -> None:
        config, stop = self.config.train, self.config.train.num_steps
        if self.start >= stop:
            self.journal.say(f'{self.folder}: trained to step {self.start}; nothing to do for num_steps={stop}.')
            return
        self.journal.say(self._banner())
        self.journal.say(self.ops.table())
        if self.ops.chip:
            self.journal.say(xla.gpu_settings())
        if self.config.kernels.self_test:
            selftest.check_kernels(self.config, self.ops, self.journal.say)
        train_step = step_lib.jit_train_step(self.config, self.mesh, self.ops)
        self.throughput, self.steps, self.logged = metrics.Throughput(), steps, self.start
        saved, pending = self.start, None
        batches = self.data.batches(
            self.start, stop, accumulation=self.accumulation, columns=sharding.local_columns(self.mesh, self._columns())
        )
        for step in range(self.start + 1, stop + 1):
            if steps.stop:
                self._stop(steps.stop, step - 1, pending, saved)
            self.members.at('reading data')
            with self.throughput.timed('data'):
                rows_ABR, segment_ids_ABR = self._to_devices(next(batches))
            self._profile(step)
            self.members.at('the step', compiles=2)  # the second may wait for the first
            self.state, scalars = train_step(self.state, rows_ABR, segment_ids_ABR)
            told = steps.tell()
            self._log(pending)
            pending = (step, scalars, told)
            validate, save = (config.due(step, n) for n in (config.eval_every_steps, config.checkpoint_every_steps))
            evaluate = validate or (self.hooks and config.due(step, config.evaluate_every_steps))
            if evaluate or save:
                pending = self._log(pending)
            if evaluate:
                self._evaluate(step, validate=validate)
            if save:
                saved = self._save(step)
        self.checkpointer.wait()
        self.journal.say(f'trained to step {stop}; checkpoints in {self.folder / "checkpoints"}')

    def _columns(self) -> int:
        return self.config.train.global_batch_size // self.accumulation

    def _to_devices(self, batch, *, leading: int = 1):
        spec = sharding.batch_sharding(self.mesh, leading=leading)
        return jax.tree.map(functools.partial(jax.make_array_from_process_local_data, spec), batch)

    def _banner(self) -> str:
        config, count = self.config, sum(flops.parameter_counts(self.config.model).values())
        axes = ', '.join(f'{axis} {size}' for axis, size in self.mesh.shape.items())
        return (
            f'{self.members}, {self.mesh.size} x {self.mesh.devices.flat[0].device_kind}, mesh {axes}; '
            f'{count:,} parameters; '
            f'{self.tokens_per_step:,} tokens a step in {self.accumulation} x {self._columns()} sequences; '
            f'steps {self.start} to {config.train.num_steps}; the first step compiles'
        )

    def _log(self, pending) -> None:
        """Fetches the scalars of a finished step, stops on a bad loss, writes every log_every_steps."""
        if pending is None:
            return
        step, scalars, told = pending
        self.members.at('waiting for a step', compiles=1)
        self.steps.hear(told)
        record = {'step': step} | {name: float(value) for name, value in jax.device_get(scalars).items()}
        if not (math.isfinite(record['loss']) and math.isfinite(record['grad_norm'])):
            raise errors.RunError(
                f'step {step}: the loss is {record["loss"]}, the norm of its gradient {record["grad_norm"]}. Nothing '
                f'after it was saved; the newest checkpoint in {self.folder / "checkpoints"} is from before. Lower the '
                'learning rate, or inspect the data of this step.'
            )
        if step % self.config.train.log_every_steps and step != self.config.train.num_steps:
            return
        self.journal.check(step, record['loss'])
        record |= self.throughput.lap((step - self.logged) * self.tokens_per_step)
        kind = self.mesh.devices.flat[0].device_kind
        record['mfu'] = flops.mfu(
            self.config.model, self.config.train.mfu, record['tokens_per_second'], kind, self.mesh.size
        )
        if self.unwritten:  # once per start, beside what it explains
            record['kernels'], self.unwritten = dict(self.ops.implementations), False
        self.logged = step
        if step_seconds := self.steps.lap():
            record['step_seconds'] = step_seconds
        self.journal.log(record)

    def _evaluate(self, step: int, *, validate: bool) -> None:
        """Validation loss of each source if that is due; then the hooks."""
        with self.throughput.timed('paused'):
            if validate:
                self.members.at('validation', compiles=1)
                columns = sharding.local_columns(self.mesh, batch := self._eval_batch())
                put = functools.partial(self._to_devices, leading=0)
                loss = losses(self.eval_step, self.state.params, self.data, batch, columns=columns, put=put)
                self.journal.validated(step, loss)
            for hook in self.hooks:
                self.members.at('a hook')
                hook(step, self.state.params)
            self.steps.pause()

    def _eval_batch(self) -> int:
        return self.config.train.micro_batch_size * sharding.batch_shards(self.mesh)

    def _save(self, step: int) -> int:
        with self.throughput.timed('checkpoint'):
            self.members.at('saving')
            self.journal.sync()
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
        if self.members.primary and step == first:
            jax.profiler.start_trace(str(self.folder / 'profile'))
            self.profiling = True
        if self.profiling and step == first + self.config.train.profile_steps:
            self._end_profile()

    def _end_profile(self) -> None:
        jax.block_until_ready(self.state)
        jax.profiler.stop_trace()
        self.profiling = False
        self.journal.say(f'profile, for TensorBoard: {self.folder / "profile"}')

    def close(self) -> None:
        if self.profiling:
            self._end_profile()
        self.journal.close()
