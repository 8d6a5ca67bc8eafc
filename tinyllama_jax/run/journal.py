"""What a start of a run writes into its folder and prints. Of several processes only process 0 does it."""

import pathlib
from typing import Any

from tinyllama_jax.config import Config
from tinyllama_jax.run import metrics, records, resume, workdir
from tinyllama_jax.settings import tree


class Silent:
    """The journal of a process that writes nothing: it takes the calls of `Journal` and does nothing."""

    def say(self, line: str) -> None:
        """Prints a line."""

    def compare_recomputed(self, step: int, loss: float) -> None:
        """Raises RunError if another loss was logged for `step` before an interruption."""

    def log(self, entry: dict[str, Any]) -> None:
        """Writes and shows the metrics of a step."""

    def validated(self, step: int, losses: dict[str, float]) -> None:
        """Writes and shows the validation loss of each source."""

    def sync(self) -> bool:
        """Returns whether all logged steps are on disk."""
        return True

    def close(self) -> None:
        """Closes the files."""


class Journal(Silent):
    """The journal of the process that writes. Opening it prepares the run's folder for steps from `start` on.

    It copies the tokenizer, cuts the metrics to `start`, writes config.json, and says which settings changed or have
    no effect.
    """

    def __init__(self, folder: pathlib.Path, config: Config, command: str, start: int, tokenizer_path: pathlib.Path):
        workdir.keep_tokenizer(folder, tokenizer_path)
        try:
            before, unreadable = workdir.read_config_file(folder), None
        except tree.Unreadable as error:
            before, unreadable = None, error
        self._recomputed = records.Recomputed(folder / 'metrics.jsonl', start)
        for name in ('validation.jsonl', 'evaluation.jsonl'):
            records.cut_entries(folder / name, start)
        now = workdir.write_config_file(folder, config, command)
        if not resume.same_losses(before, now):
            self._recomputed.forget()
        self._writer = metrics.Writer(folder / 'metrics.jsonl', config, start_step=start)
        self._validations = metrics.Writer(folder / 'validation.jsonl', config, start_step=start)
        tokens = config.train.global_batch_size * config.model.seq_len
        self._progress = metrics.Progress(start, config.train.num_steps, tokens_per_step=tokens)
        if unreadable:
            self.say(f'{unreadable} Written anew.')
        changes = tree.differences(before['config'], now['config'], 'config') if before else {}
        for field, (old, new) in changes.items():
            self.say(f'changed since the last start: {field} was {old}, is {new}')
        for remark in _remarks(config):
            self.say(f'note: {remark}')

    def say(self, line: str) -> None:
        """Prints a line."""
        self._progress.say(line)

    def compare_recomputed(self, step: int, loss: float) -> None:
        """Raises RunError if another loss was logged for `step` before an interruption."""
        self._recomputed.compare(step, loss)

    def log(self, entry: dict[str, Any]) -> None:
        """Writes and shows the metrics of a step."""
        self._writer.write(entry)
        self._progress.update(entry)

    def validated(self, step: int, losses: dict[str, float]) -> None:
        """Writes and shows the validation loss of each source."""
        self._validations.write({'step': step, 'loss': losses})
        self.say(f'step {step}: validation loss ' + ', '.join(f'{name} {loss:.4f}' for name, loss in losses.items()))

    def sync(self) -> bool:
        """Returns whether all logged steps are on disk."""
        return self._writer.sync()

    def close(self) -> None:
        """Closes the files."""
        self._progress.close()
        self._writer.close()
        self._validations.close()


def _remarks(config: Config) -> list[str]:
    """Returns a sentence about each setting that cannot have the effect it is made for."""
    optimizer, train, lines = config.optimizer, config.train, []
    if optimizer.warmup_steps >= train.num_steps:
        lines.append(
            f'config.optimizer.warmup_steps is {optimizer.warmup_steps} and config.train.num_steps {train.num_steps}: '
            'the learning rate only rises, and never reaches its peak'
        )
    if optimizer.decay_steps and optimizer.schedule == 'cosine':
        lines.append(f'config.optimizer.decay_steps is {optimizer.decay_steps}: only the schedule wsd has them')
    if train.profile_step and train.profile_step > train.num_steps:
        lines.append(f'config.train.profile_step is {train.profile_step}: the run ends before, at {train.num_steps}')
    return lines
