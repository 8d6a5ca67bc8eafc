"""The training loop: data in, steps dispatched, metrics and checkpoints out. No maths.

Step n + 1 is dispatched before the metrics of step n are fetched, so logging never stalls the device. All
metrics up to a checkpoint's step are on disk before that checkpoint is complete, which makes a resume exact.
"""

import contextlib
import functools
import math
import pathlib
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import jax

from tinyllama_jax import checkpoint, errors, flops, ops, sharding
from tinyllama_jax import step as step_lib
from tinyllama_jax.cluster import members as cluster
from tinyllama_jax.cluster.lockstep import Lockstep
from tinyllama_jax.config import Config
from tinyllama_jax.data import pipeline, store
from tinyllama_jax.process import cores, signals, xla
from tinyllama_jax.run import journal, metrics, profiler, resume, selftest
from tinyllama_jax.run.validation import losses

# Called with (step, params) after each validation and every evaluate_every_steps, and by a start from such a step.
Hook = Callable[[int, Any], None]


def train(
    config: Config,
    folder: pathlib.Path,
    *,
    command: str = '',
    hooks: Iterable[Hook] = (),
    members: cluster.Members | None = None,
) -> None:
    """Trains until `config.train.num_steps`, resuming from the newest readable checkpoint in the workdir `folder`.

    With several processes all `members` of the run make this call. Raises UsageError (the run cannot be started or
    resumed like this), RunError (non-finite loss, failed write) and Stopped (after saving on SIGTERM or Ctrl-C).
    """
    keep, save = config.train.keep_every_steps, config.train.checkpoint_every_steps
    if keep and keep % save:  # not a check of every command: a run that was begun so can still be exported
        problem = (
            f'{keep} is not a multiple of checkpoint_every_steps = {save}, so most of what it names is never saved'
        )
        raise errors.usage('config.train.keep_every_steps', f'{problem}; set it to {-(-keep // save) * save}')
    members = members or cluster.alone(config.train)
    awake_cores = cores.awake_cores() if members.count == 1 else contextlib.nullcontext()
    with signals.StopSignals() as stop_signals, awake_cores:
        run = _Run(config, pathlib.Path(folder), command, tuple(hooks), members, Lockstep(members, stop_signals))
        try:
            run.loop()
        finally:
            run.close()


class _Run:
    """One start of a run: its data, mesh, state and writers."""

    def __init__(
        self,
        config: Config,
        folder: pathlib.Path,
        command: str,
        hooks: tuple[Hook, ...],
        members: cluster.Members,
        lockstep: Lockstep,
    ):
        self.config, self.folder, self.hooks, self.members, self.lockstep = config, folder, hooks, members, lockstep
        tokens = store.TokenStore(config.data.store_path(folder))
        self.data = pipeline.make_dataset(config, tokens)
        self.tokenizer = tokens.manifest['tokenizer_sha256']
        # Processes that read different stores would train on mixed batches, and no loss would show it.
        members.agree(data=self.data.fingerprint)
        self.mesh = sharding.make_mesh(config.mesh)
        self.ops = ops.for_run(config, self.mesh)
        self.accumulation = step_lib.accumulation_steps(config, sharding.batch_shards(self.mesh))
        self.eval_step = step_lib.jit_eval_step(config, self.mesh, self.ops)
        self.checkpointer = checkpoint.Checkpointer(
            folder / 'checkpoints', keep=config.train.keep_checkpoints, keep_every=config.train.keep_every_steps
        )
        check = functools.partial(resume.check_resume, config, self.data.fingerprint, folder)
        restored = self.checkpointer.restore(step_lib.abstract_state(config, self.mesh), check)
        self.state, meta = restored or (step_lib.init_state(config, self.mesh), {'step': 0})
        self.start = meta['step']
        # Only a start that is not refused writes config.json and metrics.
        self.journal = (
            journal.Journal(folder, config, command, self.start, tokens.tokenizer_path)
            if members.primary
            else journal.Silent()
        )
        self.profiler = profiler.Profiler(config.train, folder / 'profile', self.journal.say, enabled=members.primary)
        self.throughput = metrics.Throughput()
        self.logged = self.saved = self.start  # the last steps that were logged and saved

    def loop(self) -> None:
        """Trains from `start` to the end. Raises Stopped after a stop signal and a save."""
        config = self.config.train
        if self.start and self.hooks and config.due(self.start, config.evaluate_every_steps):
            self._call_hooks(self.start)  # an interrupted start may have saved this step and not evaluated it
        if self.start >= config.num_steps:
            done = f'trained to step {self.start}; nothing to do for num_steps={config.num_steps}.'
            self.journal.say(f'{self.folder}: {done}')
            return
        self._introduce()
        train_step = step_lib.jit_train_step(self.config, self.mesh, self.ops)
        rows = config.global_batch_size // self.accumulation
        # Batch n is a pure function of the step: no reader state to restore, and nothing is read twice.
        batches = self.data.batches(
            self.start,
            config.num_steps,
            accumulation=self.accumulation,
            columns=sharding.local_columns(self.mesh, rows),  # this process's part of the global batch
        )
        pending = None  # the step that was dispatched last, until its metrics are fetched
        # An implicit transfer would stall every step unnoticed; here it raises. What comes every N steps may transfer.
        with jax.transfer_guard('disallow'):
            for step in range(self.start + 1, config.num_steps + 1):
                # All processes see a stop signal before the same step, so they save the same one.
                if signal_number := self.lockstep.stop:
                    self._finish(pending)
                    self._stop(step - 1, signal_number)

                self.members.at('reading data')
                with self.throughput.timed('data'):
                    rows_ABR, segment_ids_ABR = sharding.global_arrays(next(batches), self.mesh, leading=1)

                self.profiler.before_step(step, self.state)
                # Two calls may compile: XLA may choose other layouts for the first step's results than init did.
                self.members.at('the step', compiles=2)
                self.state, scalars = train_step(self.state, rows_ABR, segment_ids_ABR)
                told = self.lockstep.tell()

                # The device works on this step while the metrics of the one before are fetched and written.
                self._finish(pending)
                pending = step, scalars, told

                validate = config.due(step, config.eval_every_steps)
                call_hooks = validate or (self.hooks and config.due(step, config.evaluate_every_steps))
                save = config.due(step, config.checkpoint_every_steps)
                if call_hooks or save:  # they come after this step's metrics
                    self._finish(pending)
                    pending = None
                if validate:
                    self._validate(step)
                if save:  # before the hooks, which may take long or fail
                    self._save(step)
                if call_hooks:
                    self._call_hooks(step)
        self.checkpointer.wait()
        self.journal.say(f'trained to step {config.num_steps}; checkpoints in {self.folder / "checkpoints"}')

    def _introduce(self) -> None:
        """Says what is about to run, and compares the kernels with plain JAX."""
        config, devices = self.config, self.mesh.devices
        axes = ', '.join(f'{axis} {size}' for axis, size in self.mesh.shape.items())
        rows = config.train.global_batch_size // self.accumulation
        self.journal.say(
            f'{self.members}, {devices.size} x {devices.flat[0].device_kind}, mesh {axes}; '
            f'{sum(flops.parameter_counts(config.model).values()):,} parameters; '
            f'{self._tokens_per_step():,} tokens a step in {self.accumulation} x {rows} sequences; '
            f'steps {self.start} to {config.train.num_steps}; the first step compiles'
        )
        shares = ', '.join(f'{name} {share:.1%}' for name, share in self.data.in_no_row().items())
        self.journal.say(f'tokens in no row, at the ends of streams: {shares}')
        self.journal.say(self.ops.table())
        if self.ops.chip:
            self.journal.say(xla.gpu_settings())
        if config.kernels.self_test:
            selftest.check_kernels(config, self.ops, self.journal.say)

    def _tokens_per_step(self) -> int:
        return self.config.train.global_batch_size * self.config.model.seq_len

    def _finish(self, pending) -> None:
        """Fetches the metrics of a dispatched step; writes them every log_every_steps and after the last step."""
        if pending is None:
            return
        entry = self._fetch(*pending)
        if self.config.train.due(entry['step'], self.config.train.log_every_steps):
            self._write(entry)

    def _fetch(self, step: int, scalars, told) -> dict[str, Any]:
        """Waits for a step; returns its entry. Raises RunError if its loss or gradient is not finite."""
        self.members.at('waiting for a step', compiles=1)
        self.lockstep.hear(told)
        entry = {'step': step} | {name: float(value) for name, value in jax.device_get(scalars).items()}
        # Every step is checked, logged or not: no checkpoint may hold parameters that such a step has spoiled.
        if not (math.isfinite(entry['loss']) and math.isfinite(entry['grad_norm'])):
            raise errors.RunError(
                f'step {step}: the loss is {entry["loss"]}, the norm of its gradient {entry["grad_norm"]}. Nothing '
                f'after it was saved; the newest checkpoint in {self.folder / "checkpoints"} is from before. Lower the '
                'learning rate, or inspect the data of this step.'
            )
        return entry

    def _write(self, entry: dict[str, Any]) -> None:
        """Writes and shows an entry, with the speed since the last one."""
        step, model_config, devices = entry['step'], self.config.model, self.mesh.devices
        # After a crash some steps run again. With the same code, machine and data another loss means broken hardware.
        self.journal.compare_recomputed(step, entry['loss'])
        entry |= self.throughput.lap((step - self.logged) * self._tokens_per_step())
        convention, kind = self.config.train.mfu, devices.flat[0].device_kind
        entry['mfu'] = flops.mfu(model_config, convention, entry['tokens_per_second'], kind, devices.size)
        if self.logged == self.start:  # once per start, beside the speed that it explains
            entry['kernels'] = dict(self.ops.implementations)
        if step_seconds := self.lockstep.lap():
            entry['step_seconds'] = step_seconds
        self.journal.log(entry)
        self.logged = step

    def _validate(self, step: int) -> None:
        self.members.at('validation', compiles=1)
        # As many rows as one forward pass of training: memory is known to be enough.
        batch = self.config.train.micro_batch_size * sharding.batch_shards(self.mesh)
        with self._aside():
            loss = losses(
                self.eval_step,
                self.state.params,
                self.data,
                batch,
                columns=sharding.local_columns(self.mesh, batch),
                put=functools.partial(sharding.global_arrays, mesh=self.mesh),
            )
        self.journal.validated(step, loss)

    def _call_hooks(self, step: int) -> None:
        with self._aside():
            for hook in self.hooks:
                self.members.at('a hook')
                hook(step, self.state.params)

    @contextlib.contextmanager
    def _aside(self):
        """A context for work beside training: its time is left out of the steps', and it may transfer."""
        with self.throughput.timed('paused'), jax.transfer_guard('allow'):
            yield
        self.lockstep.pause()  # the next step's time would otherwise include this work

    def _save(self, step: int) -> None:
        self.members.at('saving')
        with self.throughput.timed('checkpoint'), jax.transfer_guard('allow'):
            # Metrics first: after a crash none may be missing below the checkpoint that the run resumes from.
            if not self.journal.sync():
                raise errors.RunError(f'{self.folder / "metrics.jsonl"} cannot be written; make room.')
            meta = checkpoint.make_meta(self.config, self.data.fingerprint, self.data.seen(step), self.tokenizer)
            self.checkpointer.save(step, self.state, meta)
        self.saved = step

    def _stop(self, step: int, signal_number: int) -> NoReturn:
        # A run that is stopped before its first step still leaves a checkpoint.
        if self.saved != step or not self.checkpointer.steps():
            self._save(step)
        self.checkpointer.wait()
        raise errors.Stopped(f'stopped and saved at step {step}; the same command resumes from there.', signal_number)

    def close(self) -> None:
        """Ends the profile, if one is being taken, and closes the files."""
        self.profiler.stop(self.state)
        self.journal.close()
