"""The number of shots that each protocol gives a task."""

import pytest

from eval_bridge import protocols


@pytest.mark.parametrize(
    ('task', 'paper'),
    [
        ('hellaswag', 0), ('humaneval', 0), ('mmlu', 5), ('mmlu_astronomy', 5), ('bbh_fewshot', 3),
        ('bbh_fewshot_snarks', 3), ('drop', 3), ('dropped', 0), ('instructeval_mmlu', None),
    ],
)  # fmt: skip
def test_shots(task, paper):
    assert protocols.PAPER.num_fewshot(task) == paper
    assert protocols.CURRENT.num_fewshot(task) is None
