"""The tasks of InstructEval (declare-lab/instruct-eval: mmlu.py, bbh.py, drop.py), as the paper's Table 3 was made.

A model completes `examples, question\\nAnswer:` greedily and is right if that begins with the label. Examples are left
out from the last on until the prompt fits 2,048 tokens. Their numbers do not compare with lm-eval's tasks.
"""

import random
from collections.abc import Callable
from typing import Any

import datasets
from lm_eval.api.task import ConfigurableTask

from tinyllama_jax import errors

MOST_TOKENS = 2048
_SHOTS = 3


class InstructEval(ConfigurableTask):
    """A task whose file says all but how examples are left out and an answer is judged.

    `fits` says whether a prompt, and so many new tokens, fit the model; evaluate.py sets it.
    """

    fits: Callable[[str, int], bool] = staticmethod(lambda prompt, new: True)

    def __init__(self, config: dict[str, Any] | None = None):
        super().__init__(config={name: value for name, value in (config or {}).items() if name != 'class'})

    def fewshot_context(self, doc, num_fewshot, **options):
        """The prompt, with as many of the examples as fit."""
        for shots in range(num_fewshot, -1, -1):
            prompt = super().fewshot_context(doc, num_fewshot=shots, **options)
            if self.fits(prompt, self.config.generation_kwargs['max_gen_toks']):
                break
        return prompt

    def require_more(self, count: int) -> None:
        """Raises UsageError unless more than the examples are left of `count` records."""
        if count <= _SHOTS:
            raise errors.UsageError(
                f'the task {self.config.task} can use {count} records: {_SHOTS} are examples, and no question is left.'
            )

    def process_results(self, doc, results) -> dict[str, float]:
        """Whether the answer begins with the label."""
        return {'acc': float(results[0].strip().startswith(self.doc_to_target(doc)))}


class Bbh(InstructEval):
    """The first rows are the examples, the others the questions."""

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **options) -> None:
        """Loads and divides the rows."""
        super().download(dataset_kwargs, **options)
        rows = self.dataset['test']
        self.require_more(len(rows))
        self.dataset = {'shots': rows.select(range(_SHOTS)), 'test': rows.select(range(_SHOTS, len(rows)))}


class Drop(InstructEval):
    """The questions whose validated answers all say the same; three drawn with seed 0 are the examples.

    No question is about an example's passage.
    """

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **options) -> None:
        """Loads, chooses and divides the rows."""
        super().download(dataset_kwargs, **options)
        rows = [{**row, 'label': _answers(row)} for row in self.dataset['validation']]
        rows = [{**row, 'label': row['label'][0]} for row in rows if len(set(row['label'])) == 1]
        self.require_more(len(rows))
        shots = random.Random(0).sample(rows, _SHOTS)
        seen = {row['passage'] for row in shots}
        parts = {'shots': shots, 'validation': [row for row in rows if row['passage'] not in seen]}
        self.require_more(_SHOTS + len(parts['validation']))
        self.dataset = {split: datasets.Dataset.from_list(part) for split, part in parts.items()}


def _answers(row: dict[str, Any]) -> list[str]:
    """Every span of a question's validated answers; of its answer where it has none."""
    many = row['validated_answers']
    answers = [{name: values[number] for name, values in many.items()} for number in range(len(many['number']))]
    return [text.strip() for answer in answers or [row['answer']] for text in _spans(answer)]


def _spans(answer: dict[str, Any]) -> list[str]:
    """The texts of one answer: a number, a date, or spans of the passage."""
    date = ' '.join(answer['date'][part] for part in ('day', 'month', 'year')).strip()
    return [text for text in (answer['number'], date) if text] + list(answer['spans'])
