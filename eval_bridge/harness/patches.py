"""Temporary changes to lm-eval's tasks for which it has no options: a metric, refusals, examples that must fit."""

import contextlib
import math
import types
from collections.abc import Callable, Iterator
from typing import Any

import jinja2
from lm_eval import evaluator
from lm_eval.api import metrics as lm_eval_metrics
from lm_eval.api.task import ConfigurableTask

from eval_bridge.tasks import instructeval
from tinyllama_jax import errors
from tinyllama_jax.report import baselines

GOLD = 'gold_bits_per_byte'


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Sets `owner.name` to `value` within the context."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def scoring_gold() -> contextlib.AbstractContextManager[None]:
    """Returns a context in which multiple-choice tasks have the metric `GOLD`: bits per byte of the right answers."""
    original = ConfigurableTask.process_results

    def process_results(self, doc, results):
        metrics = original(self, doc, results)
        if self.OUTPUT_TYPE == 'multiple_choice':
            choices = self.doc_to_choice(doc)
            gold = self.doc_to_text(doc) if self.multiple_input else self.doc_to_target(doc)
            gold = choices.index(gold) if isinstance(gold, str) and gold in choices else gold
            if not isinstance(gold, list):  # several right answers have no single likelihood
                _refuse_unknown_choice(self, doc, gold, choices)
                answer = self.doc_to_target(doc) if self.multiple_input else choices[gold]
                self._aggregation_list.setdefault(GOLD, lambda samples: baselines.bits_per_byte(samples)[0])
                self._higher_is_better.setdefault(GOLD, False)
                metrics[GOLD] = (results[gold][0], len(f'{self.config.target_delimiter}{answer}'.encode()))
        return metrics

    return replaced(ConfigurableTask, 'process_results', process_results)


def _refuse_unknown_choice(task: ConfigurableTask, doc, gold, choices) -> None:
    if not isinstance(gold, int) or not 0 <= gold < len(choices):
        raise errors.UsageError(
            f'the task {task.config.task}: the answer {gold!r} is none of the choices {choices} of {doc}.'
        )


@contextlib.contextmanager
def refusing() -> Iterator[None]:
    """A context in which tasks refuse examples that would get a meaningless score or none, and nan log-likelihoods.

    Refused are examples whose answer is not among the choices, that have an empty text, or that raise an error. An
    empty text has the likelihood 1 under every model, and acc_norm divides by its length, 0. Tasks that
    cannot be built, filters and metrics that raise an error are refused too.
    """
    build, apply_filters, score = ConfigurableTask.__init__, ConfigurableTask.apply_filters, evaluator._process_results
    doc_to_choice, doc_to_target = ConfigurableTask.doc_to_choice, ConfigurableTask.doc_to_target
    construct_requests, process_results = _naming_failures('construct_requests'), _naming_failures('process_results')

    def checked_results(self, doc, results):
        # A result is a log-likelihood, (log-likelihood, is greedy), or a text.
        values = [result[0] if isinstance(result, tuple) else result for result in results]
        if any(isinstance(value, float) and math.isnan(value) for value in values):
            raise errors.RunError(
                f'the task {self.config.task}: the answer of the model to {doc} is not a number (nan); its weights are '
                'damaged, or its values overflow.'
            )
        return process_results(self, doc, results)

    def checked_choices(self, doc, *options):
        choices = doc_to_choice(self, doc, *options)
        if '' in choices:
            _refuse_empty(self, doc)
        return choices

    def checked_target(self, doc, *options):
        target = doc_to_target(self, doc, *options)
        if isinstance(target, int) and self.config.doc_to_choice is not None:
            _refuse_unknown_choice(self, doc, target, self.doc_to_choice(doc))
        return target

    def checked_requests(self, doc, ctx, **options):
        requests = construct_requests(self, doc, ctx, **options)
        for request in requests if isinstance(requests, list) else [requests]:
            if request.request_type == 'loglikelihood' and not request.args[-1]:
                _refuse_empty(self, doc)
        return requests

    def checked_init(self, *arguments, config=None, **options):
        with _naming(f'the task {(config or {}).get("task", type(self).__name__)} cannot be built'):
            build(self, *arguments, config=config, **options)

    def checked_filters(self):
        with _naming(f'the filters of the task {self.config.task} cannot take the answers'):
            return apply_filters(self)

    def checked_scores(tasks, *arguments):
        with _naming(f'a metric of {", ".join(tasks)} cannot be computed from these answers'):
            return score(tasks, *arguments)

    with (
        replaced(ConfigurableTask, '__init__', checked_init),
        replaced(ConfigurableTask, 'apply_filters', checked_filters),
        replaced(evaluator, '_process_results', checked_scores),
        replaced(ConfigurableTask, 'doc_to_choice', checked_choices),
        replaced(ConfigurableTask, 'doc_to_target', checked_target),
        replaced(ConfigurableTask, 'construct_requests', checked_requests),
        replaced(ConfigurableTask, 'fewshot_context', _naming_failures('fewshot_context')),
        replaced(ConfigurableTask, 'process_results', checked_results),
    ):
        yield


def _naming_failures(method: str) -> Callable:
    """Returns a method of tasks, wrapped so that its failures name the task and the example."""
    original = getattr(ConfigurableTask, method)

    def called(self, doc, *arguments, **options):
        with _naming(f'the task {self.config.task} cannot take {doc}'):
            return original(self, doc, *arguments, **options)

    return called


@contextlib.contextmanager
def _naming(failure: str) -> Iterator[None]:
    """A context in which what a task raises becomes a UsageError that begins with `failure`."""
    try:
        yield
    except (errors.Failure, ImportError, UnicodeDecodeError, jinja2.UndefinedError):  # evaluate.py says what they mean
        raise
    except (Exception, SystemExit) as error:
        raise errors.UsageError(
            f'{failure}: {type(error).__name__} ({error}); mend the task or its data, or leave the task out.'
        ) from error


def _refuse_empty(task: ConfigurableTask, doc) -> None:
    raise errors.UsageError(f'the task {task.config.task} has an empty choice or target in {doc}.')


def saturating() -> contextlib.AbstractContextManager[None]:
    """Returns a context in which lm-eval's perplexities that no float holds are inf, not an OverflowError."""

    def exp(x: float) -> float:
        try:
            return math.exp(x)
        except OverflowError:
            return math.inf

    return replaced(lm_eval_metrics, 'math', types.SimpleNamespace(**{**vars(math), 'exp': exp}))


def fitting(model) -> contextlib.AbstractContextManager[None]:
    """Returns a context in which InstructEval shortens its prompts to fit `model`, if `model` has a tokenizer."""
    encode = getattr(model, 'tok_encode', None)
    most = min(instructeval.MOST_TOKENS, getattr(model, 'max_length', instructeval.MOST_TOKENS))

    def fits(prompt: str, new: int) -> bool:
        return encode is None or len(encode(prompt)) + new <= most

    return replaced(instructeval.InstructEval, 'fits', staticmethod(fits))
