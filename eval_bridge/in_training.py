"""Tasks asked of the model while it trains: a hook of `train`, every config.train.evaluate_every_steps.

    WORKDIR/evaluation.jsonl              one object per evaluation: step, tasks {task: {metric: value}}
    WORKDIR/tensorboard/evaluation        the same
    WORKDIR/eval/training/step-STEP.json  the whole result, as `evaluate` writes it

By the paper's protocol, on the first evaluate_limit examples of each task. The parameters are read where they lie on
the run's mesh, and nothing of the training changes: its losses are the same digits as without.
"""

import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import jax
import tqdm
from lm_eval.api.model import LM
from lm_eval.models import utils as lm_eval_models_utils

from eval_bridge import evaluate, lm, protocols
from tinyllama_jax import errors, tokenizer
from tinyllama_jax.config import Config
from tinyllama_jax.run import metrics

_FIELD = 'config.train.evaluate_tasks'


def hooks(config: Config, folder: pathlib.Path, processes: int) -> tuple['Evaluation', ...]:
    """The hook that `config` asks for, if any. Raises UsageError before training for what cannot be evaluated."""
    if not config.train.evaluate_tasks:
        return ()
    if processes > 1:
        raise errors.usage(
            _FIELD,
            f'one process evaluates while it trains, {processes} do not; leave it out, and evaluate the checkpoints '
            'with main.py evaluate',
        )
    return (Evaluation(config, folder),)


class Evaluation:
    """Called with (step, params) it evaluates, if that is due at `step`, and writes what it found."""

    def __init__(self, config: Config, folder: pathlib.Path):
        self._config, self._folder = config, folder
        self._path, self._begun = folder / 'evaluation.jsonl', False
        train = config.train
        options = {'include_path': train.evaluate_include_path, 'task_data': train.evaluate_task_data}
        self._options = {name: value for name, value in options.items() if value is not None}
        try:
            self._options['manager'] = evaluate.task_manager(train.evaluate_tasks, train.evaluate_include_path)
            _refuse_programs(evaluate.running_programs(train.evaluate_tasks, self._options['manager']))
            evaluate.evaluate(_Rehearsal(config.model.seq_len), train.evaluate_tasks, limit=1, **self._options)
        except errors.UsageError as error:
            raise errors.usage(_FIELD, str(error).rstrip('.')) from None

    def __call__(self, step: int, params: Any) -> None:
        """Evaluates `params` of `step`."""
        train = self._config.train
        if not train.due(step, train.evaluate_every_steps):
            return
        pieces = tokenizer.Tokenizer(self._folder / 'tokenizer.model')
        model = lm.JaxLM(params, self._config.model, pieces, mesh=jax.tree.leaves(params)[0].sharding.mesh)
        identity = {
            'step': step, 'backend': 'jax', 'dtype': model.dtype, 'add_bos': model.add_bos,
            'max_length': model.max_length, 'tokenizer_sha256': pieces.sha256,
        }  # fmt: skip
        result = evaluate.evaluate(
            model, train.evaluate_tasks, protocol=protocols.PAPER, limit=train.evaluate_limit, identity=identity,
            output=self._folder / 'eval' / 'training' / f'step-{step}.json', **self._options,
        )  # fmt: skip
        found = {task: scalars(values) for task, values in result['results'].items()}
        self._write({'step': step, 'tasks': {task: values for task, values in found.items() if values}})

    def _write(self, record: dict[str, Any]) -> None:
        step = record['step']
        if not self._begun:  # what an interrupted start wrote after the checkpoint that this one goes on from
            metrics.cut_records(self._path, step - 1)
            self._begun = True
        writer = metrics.Writer(self._path, start_step=step - 1)
        writer.write(record)
        writer.close()
        shown = (f'{task} {next(iter(values.items()))[1]:.4f}' for task, values in record['tasks'].items())
        tqdm.tqdm.write(f'step {step}: ' + ', '.join(shown), file=sys.stderr)


def _refuse_programs(tasks: list[str]) -> None:
    if tasks:
        raise errors.UsageError(
            f'{", ".join(tasks)}: programs that the model wrote do not run while it trains; leave these tasks out, and '
            'evaluate the checkpoints with main.py evaluate --confirm_run_unsafe_code'
        )


def scalars(values: Mapping[str, Any]) -> dict[str, float]:
    """Metric -> value of a task's results, with the standard errors."""
    return {
        name.removesuffix(',none').replace(',', '/'): float(value)
        for name, value in values.items()
        if ',' in name and isinstance(value, int | float)
    }


class _Rehearsal(LM):
    """Answers everything at once, so that tasks that cannot run are known before a run begins."""

    def __init__(self, max_length: int):
        super().__init__()
        self.max_length = max_length

    def tok_encode(self, string: str, **_) -> list[int]:
        """A token a character."""
        return list(string.encode())

    def loglikelihood(self, requests, **_) -> list[tuple[float, bool]]:
        """Improbable, each."""
        return [(-1.0, False)] * len(requests)

    def loglikelihood_rolling(self, requests, **_) -> list[float]:
        """Improbable, each."""
        return [-1.0] * len(requests)

    def generate_until(self, requests, **_) -> list[str]:
        """Nothing, each. Raises UsageError for a text that the model would have no room for."""
        for _, arguments in (request.args for request in requests):
            count = lm_eval_models_utils.normalize_gen_kwargs(arguments, lm.MOST_NEW_TOKENS)['max_gen_toks']
            if count >= self.max_length:
                raise errors.UsageError(f'a task wants {count} new tokens, but seq_len is {self.max_length}')
        return [''] * len(requests)
