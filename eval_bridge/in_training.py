"""Evaluates the model while it trains: a hook of `train`, every config.train.evaluate_every_steps.

    WORKDIR/evaluation.jsonl              one object per evaluation: step, tasks {task: {metric: value}}
    WORKDIR/tensorboard/evaluation        the same
    WORKDIR/eval/training/step-STEP.json  the complete result, as `evaluate` writes it

It follows the paper's protocol, on the first evaluate_limit examples of each task. The parameters stay where they are
on the run's mesh, and training doesn't change: its losses are the same digits as without. An evaluation that fails is
one line, and one that a stop signal interrupts is made by the next start.
"""

import pathlib
import sys
from typing import Any

import jax
import tqdm
from lm_eval.api.model import LM
from lm_eval.models import utils as lm_eval_models_utils

from eval_bridge import evaluate, lm, protocols
from eval_bridge.harness import listing
from eval_bridge.jail import gate, programs
from tinyllama_jax import errors
from tinyllama_jax.cluster import members as cluster
from tinyllama_jax.config import Config
from tinyllama_jax.process import signals
from tinyllama_jax.run import metrics, records, workdir

_FIELD = 'config.train.evaluate_tasks'


def hooks(config: Config, folder: pathlib.Path, members: cluster.Members) -> tuple['Evaluation', ...]:
    """Returns a tuple with the hook that `config` asks for, if any. Raises UsageError for what cannot be evaluated."""
    if not config.train.evaluate_tasks:
        return ()
    if members.count > 1:
        raise errors.usage(
            _FIELD,
            f'only a run of one process can evaluate while it trains, and this one has {members.count}; leave it out, '
            'and evaluate the checkpoints with main.py evaluate',
        )
    return (Evaluation(config, folder, members),)


class _Stopped(Exception):
    """A stop signal came during an evaluation."""


class Evaluation:
    """A hook: called with (step, params), it evaluates if that is due at `step`, and writes the scores.

    The constructor tries every task on a model that answers at once, and raises UsageError for one that cannot run.
    """

    def __init__(self, config: Config, folder: pathlib.Path, members: cluster.Members):
        self._config, self._folder, self._members = config, folder, members
        self._path = folder / 'evaluation.jsonl'
        train = config.train
        options = {'include_path': train.evaluate_include_path, 'task_data': train.evaluate_task_data}
        self._options: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        try:
            manager = self._options['manager'] = listing.task_manager(train.evaluate_tasks, train.evaluate_include_path)
            with gate.owning_threads():
                tasks = programs.running(listing.declared(train.evaluate_tasks, manager, resolve=True))
            if tasks:
                raise errors.UsageError(
                    f'{", ".join(tasks)}: programs that the model wrote do not run while it trains; leave these tasks '
                    'out, and evaluate the checkpoints with main.py evaluate --confirm_run_unsafe_code'
                )
            evaluate.evaluate(_Rehearsal(config.model.seq_len), train.evaluate_tasks, limit=1, **self._options)
        except errors.UsageError as error:
            raise errors.usage(_FIELD, str(error).rstrip('.')) from None

    def __call__(self, step: int, params: Any) -> None:
        """Evaluates `params`, the parameters after step `step`, if that is due and has not been done. Never raises."""
        train = self._config.train
        if not train.due(step, train.evaluate_every_steps):
            return
        try:
            if not any(entry['step'] == step for entry in records.read_entries(self._path)):
                self._evaluate(step, params)
        except _Stopped:
            self._say(f'step {step}: told to stop; the next start evaluates this step')
        except (Exception, SystemExit) as error:  # whatever it is, the run goes on
            self._say(f'step {step}: not evaluated ({type(error).__name__}: {errors.first_line(error)})')

    def _evaluate(self, step: int, params: Any) -> None:
        """Evaluates `params` and writes the scores."""
        train = self._config.train
        tokenizer = workdir.load_tokenizer(self._folder, self._config)
        mesh = jax.tree.leaves(params)[0].sharding.mesh
        model = _Interruptible(params, self._config.model, tokenizer, mesh=mesh)
        model.members = self._members
        identity = {'step': step, 'backend': 'jax', 'tokenizer_sha256': tokenizer.sha256}
        identity |= {name: getattr(model, name) for name in ('dtype', 'add_bos', 'max_length')}
        result = evaluate.evaluate(
            model,
            train.evaluate_tasks,
            protocol=protocols.PAPER,
            limit=train.evaluate_limit,
            identity=identity,
            output=self._folder / 'eval' / 'training' / f'step-{step}.json',
            **self._options,
        )
        tasks = {}  # task -> metric -> value, the standard errors among them
        for task, values in result['results'].items():
            scores = {
                name.removesuffix(',none').replace(',', '/'): float(value)
                for name, value in values.items()
                if ',' in name and isinstance(value, int | float)
            }
            if scores:
                tasks[task] = scores
        writer = metrics.Writer(self._path, self._config, start_step=step - 1)
        writer.write({'step': step, 'tasks': tasks})
        writer.close()
        self._say(f'step {step}: ' + ', '.join(f'{task} {next(iter(of.values())):.4f}' for task, of in tasks.items()))

    def _say(self, line: str) -> None:
        tqdm.tqdm.write(line, file=sys.stderr)


class _Interruptible(lm.JaxLM):
    """A JaxLM that tells the watchdog about each batch, and raises _Stopped before one if the run is told to stop."""

    members: cluster.Members

    def _score_batch(self, batch):
        self._begin()
        return super()._score_batch(batch)

    def _generate(self, options, prompts):
        self._begin()
        return super()._generate(options, prompts)

    def _begin(self) -> None:
        if signals.stopping():
            raise _Stopped
        self.members.at('an evaluation')


class _Rehearsal(LM):
    """A model that answers everything at once, so that tasks that cannot run are refused before training begins."""

    def __init__(self, max_length: int):
        super().__init__()
        self.max_length = max_length

    def tok_encode(self, string: str, **_) -> list[int]:
        """Returns a token for each byte."""
        return list(string.encode())

    def loglikelihood(self, requests, **_) -> list[tuple[float, bool]]:
        """Returns the same log-likelihood for each request."""
        return [(-1.0, False)] * len(requests)

    def loglikelihood_rolling(self, requests, **_) -> list[float]:
        """Returns the same log-likelihood for each request."""
        return [-1.0] * len(requests)

    def generate_until(self, requests, **_) -> list[str]:
        """Returns empty texts. Raises UsageError for more new tokens than the model can hold."""
        for _, arguments in (request.args for request in requests):
            count = lm_eval_models_utils.normalize_gen_kwargs(arguments, lm.MOST_NEW_TOKENS)['max_gen_toks']
            if count >= self.max_length:
                raise errors.UsageError(f'a task wants {count} new tokens, but seq_len is {self.max_length}')
        return [''] * len(requests)
