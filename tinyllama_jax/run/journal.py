"""What a start of a run writes into its folder and prints. Of several processes only process 0 does it."""

import pathlib
from typing import Any

from tinyllama_jax.config import Config
from tinyllama_jax.run import metrics, resume, workdir
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

    def sync(self) -> None:
        """Returns when all logged steps are on disk."""

    def close(self) -> None:
        """Closes the files."""


class Journal(Silent):
    """The journal of the process that writes. Opening it prepares the run's folder for steps from `start` on.

    It copies the tokenizer, cuts the metrics to `start`, writes config.json, and says which settings changed.
    """

    def __init__(self, folder: pathlib.Path, config: Config, command: str, start: int, tokenizer_path: pathlib.Path):
        workdir.keep_tokenizer(folder, tokenizer_path)
        before = workdir.read_config_file(folder)
        self._recomputed = metrics.Recomputed(folder / 'metrics.jsonl', start)
        metrics.cut_entries(folder / 'validation.jsonl', start)
        now = workdir.write_config_file(folder, config, command)
        if not resume.same_losses(before, now):
            self._recomputed.forget()
        self._writer = metrics.Writer(folder / 'metrics.jsonl', config, start_step=start)
        self._validations = metrics.Writer(folder / 'validation.jsonl', config, start_step=start)
        tokens = config.train.global_batch_size * config.model.seq_len
        self._progress = metrics.Progress(start, config.train.num_steps, tokens_per_step=tokens)
        changes = tree.differences(before['config'], now['config'], 'config') if before else {}
        for field, (old, new) in changes.items():
            self.say(f'changed since the last start: {field} was {old}, is {new}')

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

    def sync(self) -> None:
        """Returns when all logged steps are on disk."""
        self._writer.sync()

    def close(self) -> None:
        """Closes the files."""
        self._progress.close()
        self._writer.close()
        self._validations.close()
