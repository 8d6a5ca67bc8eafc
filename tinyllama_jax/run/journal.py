"""What a start of a run writes into its folder and on the terminal; of several processes only the first does."""

import pathlib

from tinyllama_jax.config import Config
from tinyllama_jax.run import metrics, workdir
from tinyllama_jax.settings import tree


class Journal:
    """The record and tokenizer of a run, its metrics cut to the step it starts from, and the lines about it."""

    def __init__(self, folder: pathlib.Path, config: Config, command: str, start: int, tokenizer_path: pathlib.Path):
        workdir.keep_tokenizer(folder, tokenizer_path)
        before = workdir.read_record(folder)
        self._recomputed = metrics.Recomputed(folder / 'metrics.jsonl', start)
        metrics.cut_records(folder / 'validation.jsonl', start)
        record = workdir.write_record(folder, config, command)
        if not workdir.same_losses(before, record):
            self._recomputed.forget()
        self._writer = metrics.Writer(folder / 'metrics.jsonl', start_step=start)
        self._validations = metrics.Writer(folder / 'validation.jsonl', start_step=start)
        tokens = config.train.global_batch_size * config.model.seq_len
        self._progress = metrics.Progress(start, config.train.num_steps, tokens_per_step=tokens)
        changed = tree.differences(before['config'], record['config'], 'config') if before else {}
        for field, (old, new) in changed.items():
            self.say(f'changed since the last start: {field} was {old}, is {new}')

    def say(self, line: str) -> None:
        """Prints a line."""
        self._progress.say(line)

    def check(self, step: int, loss: float) -> None:
        """Raises RunError if another loss was logged for `step` before an interruption."""
        self._recomputed.check(step, loss)

    def log(self, record: dict) -> None:
        """Writes and shows the figures of a step."""
        self._writer.write(record)
        self._progress.update(record)

    def validated(self, step: int, loss: dict[str, float]) -> None:
        """Writes and shows the validation loss of each source."""
        self._validations.write({'step': step, 'loss': loss})
        self.say(f'step {step}: validation loss ' + ', '.join(f'{name} {value:.4f}' for name, value in loss.items()))

    def sync(self) -> None:
        """Returns when all logged steps are on disk."""
        self._writer.sync()

    def close(self) -> None:
        """Closes the files."""
        self._progress.close()
        self._writer.close()
        self._validations.close()


class Silent:
    """The journal of a process that writes none."""

    def __getattr__(self, name: str):
        if name not in vars(Journal):
            raise AttributeError(name)
        return lambda *_: None
