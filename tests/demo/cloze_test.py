"""The cloze task, scored by an oracle."""

import json

import pytest
from lm_eval.api.model import LM

from demo import cloze
from eval_bridge import evaluate
from tests.support import corpora


class Oracle(LM):
    """A model that prefers the right continuation of each context, or else any other."""

    def __init__(self, known: dict[str, str], *, right: bool = True):
        super().__init__()
        self._known, self._right = known, right

    def loglikelihood(self, requests):
        def score(context, continuation):
            return 0.0 if (self._known[context] == continuation.strip()) == self._right else -10.0

        return [(score(*request.args), False) for request in requests]

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError

    def generate_until(self, requests):
        raise NotImplementedError


@pytest.fixture(scope='module')
def task(tmp_path_factory):
    """(folder of the task, its items, the held-out texts)"""
    root = tmp_path_factory.mktemp('cloze')
    corpora.slimpajama(root / 'corpus')
    count = cloze.build(root / 'corpus', root / 'cloze', items=12)
    items = [json.loads(line) for line in (root / 'cloze/items.jsonl').read_text().splitlines()]
    assert len(items) == count == 12
    return root / 'cloze', items, corpora.texts(8, seed=50)


def test_an_item_is_a_passage_of_a_held_out_document_and_three_of_others(task):
    _, items, texts = task
    for item in items:
        right = item['choices'][item['gold']]
        owners = [text for text in texts if f'{item["context"]} {right}' in text]
        assert len(owners) == 1
        assert len(set(item['choices'])) == 4
        for choice in item['choices']:
            assert 20 <= len(choice) <= 40
            assert choice == right or not any(choice in text for text in owners)
            assert any(choice in text for text in texts)
    assert {item['gold'] for item in items} == {0, 1, 2, 3}


def test_the_same_corpus_gives_the_same_items(task, tmp_path):
    cloze.build(task[0].parent / 'corpus', tmp_path / 'cloze', items=12)
    assert (tmp_path / 'cloze/items.jsonl').read_bytes() == (task[0] / 'items.jsonl').read_bytes()


@pytest.mark.parametrize(('right', 'accuracy'), [(True, 1.0), (False, 0.0)])
def test_lm_eval_scores_an_oracle(task, right, accuracy):
    folder, items, _ = task
    oracle = Oracle({item['context']: item['choices'][item['gold']] for item in items}, right=right)
    result = evaluate.evaluate(oracle, ['cloze'], include_path=folder)
    assert result['results']['cloze']['acc,none'] == accuracy
    assert result['n-samples']['cloze']['effective'] == 12
