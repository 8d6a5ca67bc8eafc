"""What is changed of lm-eval's tasks while they run, as it has no arguments for it: scored, refused, left out."""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import jinja2
from lm_eval.api.task import ConfigurableTask

from eval_bridge.tasks import instructeval
from tinyllama_jax import errors
from tinyllama_jax.report import baselines

GOLD = 'gold_bits_per_byte'


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Gives `owner` another attribute for a while."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def scoring_gold() -> contextlib.AbstractContextManager[None]:
    """Lets multiple-choice tasks score the log-likelihood and bytes of the right answer too, as a metric `GOLD`."""
    original = ConfigurableTask.process_results

    def process_results(self, doc, results):
        metrics = original(self, doc, results)
        if self.OUTPUT_TYPE == 'multiple_choice':
            choices = self.doc_to_choice(doc)
            gold = self.doc_to_text(doc) if self.multiple_input else self.doc_to_target(doc)
            gold = choices.index(gold) if isinstance(gold, str) and gold in choices else gold
            if not isinstance(gold, list):  # several right answers have no likelihood of their own
                _check_gold(self, doc, gold, choices)
                answer = self.doc_to_target(doc) if self.multiple_input else choices[gold]
                self._aggregation_list.setdefault(GOLD, lambda samples: baselines.bits_per_byte(samples)[0])
                self._higher_is_better.setdefault(GOLD, False)
                metrics[GOLD] = (results[gold][0], len(f'{self.config.target_delimiter}{answer}'.encode()))
        return metrics

    return replaced(ConfigurableTask, 'process_results', process_results)


def _check_gold(task: ConfigurableTask, doc, gold, choices) -> None:
    if not isinstance(gold, int) or not 0 <= gold < len(choices):
        raise errors.UsageError(
            f'the task {task.config.task}: the answer {gold!r} is none of the choices {choices} of {doc}.'
        )


@contextlib.contextmanager
def refusing() -> Iterator[None]:
    """Lets tasks refuse what would give a score without meaning, or none.

    Documents with an answer that is no choice, or with an empty text, or that end in an error; a model's nan.

    The likelihood of an empty text is 1 whatever the model, and its length 0 a divisor of acc_norm.
    """
    doc_to_choice, doc_to_target = ConfigurableTask.doc_to_choice, ConfigurableTask.doc_to_target
    construct_requests = _named('construct_requests')

    process_results = _named('process_results')

    def processed(self, doc, results):
        if any(_is_nan(result) for result in results):
            raise errors.RunError(
                f'the task {self.config.task}: the model gives what is not a number (nan) for {doc}; its weights are '
                'damaged, or its values overflow.'
            )
        return process_results(self, doc, results)

    def choices(self, doc, *options):
        found = doc_to_choice(self, doc, *options)
        if '' in found:
            _refuse_empty(self, doc)
        return found

    def target(self, doc, *options):
        found = doc_to_target(self, doc, *options)
        if isinstance(found, int) and self.config.doc_to_choice is not None:
            _check_gold(self, doc, found, self.doc_to_choice(doc))
        return found

    def requests(self, doc, ctx, **options):
        found = construct_requests(self, doc, ctx, **options)
        for request in found if isinstance(found, list) else [found]:
            if request.request_type == 'loglikelihood' and not request.args[-1]:
                _refuse_empty(self, doc)
        return found

    with (
        replaced(ConfigurableTask, 'doc_to_choice', choices),
        replaced(ConfigurableTask, 'doc_to_target', target),
        replaced(ConfigurableTask, 'construct_requests', requests),
        replaced(ConfigurableTask, 'fewshot_context', _named('fewshot_context')),
        replaced(ConfigurableTask, 'process_results', processed),
    ):
        yield


def _named(method: str) -> Callable:
    """A method of tasks whose failure names the task and the document, which it most likely cannot take."""
    original = getattr(ConfigurableTask, method)

    def called(self, doc, *arguments, **options):
        try:
            return original(self, doc, *arguments, **options)
        except (errors.Failure, jinja2.UndefinedError):
            raise
        except Exception as error:
            raise errors.UsageError(
                f'the task {self.config.task} cannot take {doc}: {type(error).__name__} ({error}).'
            ) from error

    return called


def _is_nan(result) -> bool:
    """Of a log-likelihood, alone or with whether it is greedy; or a text."""
    value = result[0] if isinstance(result, tuple) else result
    return isinstance(value, float) and math.isnan(value)


def _refuse_empty(task: ConfigurableTask, doc) -> None:
    raise errors.UsageError(f'the task {task.config.task} has an empty choice or target in {doc}.')


def fitting(model) -> contextlib.AbstractContextManager[None]:
    """Lets InstructEval's tasks leave out the examples that do not fit `model`; all fit one that has no tokens."""
    encode = getattr(model, 'tok_encode', None)
    most = min(instructeval.MOST_TOKENS, getattr(model, 'max_length', instructeval.MOST_TOKENS))

    def fits(prompt: str, new: int) -> bool:
        return encode is None or len(encode(prompt)) + new <= most

    return replaced(instructeval.InstructEval, 'fits', staticmethod(fits))
