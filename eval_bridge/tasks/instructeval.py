"""The tasks of InstructEval (declare-lab/instruct-eval: mmlu.py, bbh.py, drop.py), with which Table 3 was made.

The model completes `few-shot examples, question\\nAnswer:` greedily and is right if its text begins with the label.
Few-shot examples are dropped from the last on until the prompt fits 2,048 tokens. Scores don't compare with those of
lm-eval's own tasks.
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
    """An InstructEval task: its file says all but how few-shot examples are dropped and how an answer is judged.

    `fits` says whether a prompt and a number of new tokens fit the model; patches.fitting sets it.
    """

    fits: Callable[[str, int], bool] = staticmethod(lambda prompt, new: True)

    def __init__(self, config: dict[str, Any] | None = None):
        super().__init__(config={name: value for name, value in (config or {}).items() if name != 'class'})

    def fewshot_context(self, doc, num_fewshot, **options):
        """Returns the prompt with as many few-shot examples as fit."""
        for shots in range(num_fewshot, -1, -1):
            prompt = super().fewshot_context(doc, num_fewshot=shots, **options)
            if self.fits(prompt, (self.config.generation_kwargs or {})['max_gen_toks']):
                break
        return prompt

    def require_more(self, count: int) -> None:
        """Raises UsageError unless `count` usable examples are more than the few-shot examples."""
        if count <= _SHOTS:
            raise errors.UsageError(
                f'the task {self.config.task} has {count} usable examples: {_SHOTS} are few-shot examples, and no '
                'question is left; add examples to its data.'
            )

    def process_results(self, doc, results) -> dict[str, float]:
        """Returns accuracy 1 if the answer begins with the label, else 0."""
        return {'acc': float(results[0].strip().startswith(self.doc_to_target(doc)))}


class Bbh(InstructEval):
    """A task of BBH: the first examples are few-shot examples, the others questions."""

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **options) -> None:
        """Loads the examples and splits them."""
        super().download(dataset_kwargs, **options)
        examples = self.dataset['test']
        self.require_more(len(examples))
        questions = examples.select(range(_SHOTS, len(examples)))
        self.dataset = {'shots': examples.select(range(_SHOTS)), 'test': questions}


class Drop(InstructEval):
    """DROP: the questions whose validated answers all agree. Three, drawn with seed 0, are the few-shot examples.

    No other question is about the passage of a few-shot example.
    """

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **options) -> None:
        """Loads the examples, selects the usable ones and splits them."""
        super().download(dataset_kwargs, **options)
        usable = []
        for example in self.dataset['validation']:
            answers = _answers(example)
            if len(set(answers)) == 1:
                usable.append({**example, 'label': answers[0]})
        self.require_more(len(usable))
        shots = random.Random(0).sample(usable, _SHOTS)
        seen = {example['passage'] for example in shots}
        questions = [example for example in usable if example['passage'] not in seen]
        self.require_more(_SHOTS + len(questions))
        splits = {'shots': shots, 'validation': questions}
        self.dataset = {split: datasets.Dataset.from_list(part) for split, part in splits.items()}


def _answers(example: dict[str, Any]) -> list[str]:
    """Returns every text of a question's validated answers, or of its answer where none was validated."""
    many = example['validated_answers']
    answers = [{name: values[number] for name, values in many.items()} for number in range(len(many['number']))]
    texts = []
    for answer in answers or [example['answer']]:  # each has a number, a date, and spans of the passage
        date = ' '.join(answer['date'][part] for part in ('day', 'month', 'year')).strip()
        texts += [text for text in (answer['number'], date) if text] + list(answer['spans'])
    return [text.strip() for text in texts]
