"""Changes to lm-eval's tasks: undone after the context; they add a metric and refuse bad examples."""

import json
import math

import pytest
from lm_eval.api.registry import AGGREGATION_REGISTRY
from lm_eval.api.task import ConfigurableTask

from eval_bridge import evaluate
from eval_bridge.harness import patches
from eval_bridge.tasks import instructeval
from tests.support.scripted import Scripted
from tinyllama_jax import errors

pytestmark = pytest.mark.filterwarnings('ignore')  # lm-eval and datasets give warnings of their own

METHODS = ('process_results', 'fewshot_context', 'doc_to_choice', 'doc_to_target', 'construct_requests', 'download')
TASK = {
    'task': 'tiny', 'dataset_path': 'json', 'dataset_kwargs': {'data_files': {'test': 'tasks/data.jsonl'}},
    'test_split': 'test', 'output_type': 'multiple_choice', 'doc_to_text': '{{context}}', 'doc_to_choice': 'choices',
    'doc_to_target': 'answer', 'metric_list': [{'metric': 'acc'}],
}  # fmt: skip


def _evaluate(root, last, **changes):
    """Evaluates a task of two examples, the second of which is `last`."""
    (root / 'tasks').mkdir(exist_ok=True)
    first = {'context': 'a', 'choices': ['b', 'cc'], 'answer': 'x' if last.get('answer') == '' else 0}
    (root / 'tasks' / 'data.jsonl').write_text('\n'.join(map(json.dumps, [first, {**first, **last}])))
    (root / 'tasks' / 'tiny.yaml').write_text(
        json.dumps(TASK | changes).replace('"FUNCTION"', '!function failing.fail')
    )
    return evaluate.evaluate(Scripted(), ['tiny'], include_path=root / 'tasks')


def test_methods_are_restored_after_a_failure(tmp_path):
    before = [getattr(ConfigurableTask, name) for name in METHODS] + [instructeval.InstructEval.fits]
    with pytest.raises(errors.UsageError):
        _evaluate(tmp_path, {'answer': 5})
    assert [getattr(ConfigurableTask, name) for name in METHODS] + [instructeval.InstructEval.fits] == before


def test_the_gold_metric_scores_the_right_answers(tmp_path):
    scores = _evaluate(tmp_path, {'answer': 1})['results']['tiny']
    # Scripted's log-likelihood is minus the length: 2 and 3 nats for 2 and 3 bytes, with the space before each.
    assert scores[f'{patches.GOLD},none'] == pytest.approx(1.442695, abs=1e-6)
    assert scores['acc,none'] == 0.5


@pytest.mark.parametrize(
    ('last', 'changes', 'message'),
    [
        ({'answer': -1}, {}, 'the answer -1 is none of the choices'),
        ({'choices': ['b', '']}, {}, 'an empty choice or target'),
        ({'choices': None}, {}, r'the task tiny .*TypeError'),
        ({'answer': ''}, {'output_type': 'loglikelihood', 'doc_to_choice': None, 'target_delimiter': ''}, 'an empty'),
    ],
)
def test_an_example_that_would_give_a_wrong_number_is_refused(tmp_path, last, changes, message):
    with pytest.raises(errors.UsageError, match=message):
        _evaluate(tmp_path, last, **changes)


def test_nan_from_a_model_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Scripted, 'loglikelihood', lambda self, requests, **_: [(float('nan'), False)] * len(requests))
    with pytest.raises(errors.RunError, match=r'the task tiny: the answer of the model to .* is not a number'):
        _evaluate(tmp_path, {'answer': 1})


def test_every_prompt_fits_a_model_without_tokens():
    with patches.fitting(object()):
        assert instructeval.InstructEval.fits('x' * 10_000, 1)
    with patches.fitting(Scripted(max_length=10)):
        assert instructeval.InstructEval.fits('x' * 9, 1) and not instructeval.InstructEval.fits('x' * 10, 1)


def test_a_perplexity_that_no_float_holds_is_infinite(tmp_path):
    changes = {'output_type': 'loglikelihood', 'doc_to_choice': None, 'metric_list': [{'metric': 'perplexity'}]}
    changes['doc_to_target'] = '{{choices[1]}}'
    scores = _evaluate(tmp_path, {'choices': ['b', 'c' * 4000]}, **changes)['results']['tiny']
    assert scores['perplexity,none'] == math.inf
    with pytest.raises(OverflowError):
        AGGREGATION_REGISTRY['perplexity']([-1000.0])


FAILING = {
    'process_docs': 'the task tiny cannot be built: ',
    'process_results': r"the task tiny cannot take \{'context'.*: ",
    'filter': 'the filters of the task tiny cannot take the answers: ',
    'aggregation': 'a metric of tiny cannot be computed from these answers: ',
}


@pytest.mark.parametrize('place', FAILING)
@pytest.mark.parametrize('kind', ['KeyError', 'SystemExit', 'OverflowError'])
def test_a_function_that_fails_is_one_line_naming_the_task(tmp_path, place, kind):
    changes = {
        'filter': {'filter_list': [{'name': 'f', 'filter': [{'function': 'custom', 'filter_fn': 'FUNCTION'}]}]},
        'aggregation': {'metric_list': [{'metric': 'acc', 'aggregation': 'FUNCTION'}]},
    }.get(place, {place: 'FUNCTION'})
    (tmp_path / 'tasks').mkdir()
    (tmp_path / 'tasks' / 'failing.py').write_text(f'def fail(*arguments):\n    raise {kind}("told so")\n')
    with pytest.raises(errors.UsageError, match=f"{FAILING[place]}{kind} .*told so'?.; mend the task or its data"):
        _evaluate(tmp_path, {'answer': 1}, **changes)
