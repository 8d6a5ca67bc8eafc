"""HumanEval: lm-eval's own prompts and rule, InstructEval's cut, programs that pass and fail, only when confirmed."""

import json
import pathlib

import lm_eval.tasks
import pytest
from lm_eval.tasks._yaml_loader import load_yaml

from eval_bridge import evaluate
from eval_bridge.jail import sandbox
from eval_bridge.tasks import humaneval
from tests.support.scripted import Scripted
from tinyllama_jax import errors

pytestmark = pytest.mark.filterwarnings('ignore')  # lm-eval and datasets give warnings of their own

DOCS = [
    {
        'task_id': f'HumanEval/{number}', 'prompt': f'def {name}(x):\n    """{number}"""\n', 'entry_point': name,
        'canonical_solution': f'    return x + {number}\n',
        'test': f'def check(candidate):\n    assert candidate(1) == {number} + 1\n',
    }
    for number, name in enumerate(('first', 'second', 'third'))
]  # fmt: skip


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp('eval')
    (root / 'humaneval').mkdir()
    (root / 'humaneval' / 'HumanEval.jsonl').write_text('\n'.join(map(json.dumps, DOCS)))
    return root


def _need_jail():
    try:
        sandbox.require()
    except errors.UsageError as error:
        pytest.skip(str(error))


def _complete(prompt: str) -> str:
    """Returns a wrong second function; all have text after their function, which InstructEval cuts off."""
    number = next(number for number, doc in enumerate(DOCS) if doc['prompt'] in prompt)
    return f'\n   return x + {0 if number == 1 else number}\n\nraise SystemExit\n'


@pytest.mark.parametrize(('task', 'score'), [('humaneval', 0), ('instructeval_humaneval', 2 / 3)])
def test_programs_are_run_and_counted(data, task, score):
    _need_jail()
    model = Scripted(_complete)
    result = evaluate.evaluate(model, [task], task_data=data, confirm_run_unsafe_code=True, log_samples=True)
    scores = result['results'][task]
    assert scores['pass@1,create_test'] == pytest.approx(score)
    assert 'pass@1_stderr,create_test' in scores
    ((judged,),) = result['samples'][task][0]['filtered_resps']
    assert judged['program'].startswith(DOCS[0]['prompt']) and judged['program'].endswith('check(first)')
    assert judged['outcome'] == ('failed' if score == 0 else 'passed')


def test_instructeval_asks_with_a_preamble_at_a_low_temperature(data):
    _need_jail()
    model = Scripted()
    evaluate.evaluate(model, ['instructeval_humaneval'], task_data=data, limit=1, confirm_run_unsafe_code=True)
    ((prompt, options),) = model.asked
    preamble = 'Please complete the following Python code without providing any additional tasks such as testing or'
    assert prompt == f'{preamble} explanations\n{DOCS[0]["prompt"]}'
    assert options == {'until': [], 'max_gen_toks': 512, 'do_sample': True, 'temperature': 0.1, 'top_k': 50}


def test_without_consent_nothing_is_asked_or_run(data):
    model = Scripted()
    with pytest.raises(errors.UsageError, match='give --confirm_run_unsafe_code'):
        evaluate.evaluate(model, ['humaneval'], task_data=data)
    assert not model.asked


def test_without_a_jail_nothing_is_asked(data, monkeypatch):
    monkeypatch.setattr('sys.executable', '/nowhere/python')
    sandbox.require.cache_clear()
    model = Scripted()
    try:
        with pytest.raises(errors.UsageError, match='run only in a jail, which cannot be made here: .*/nowhere/python'):
            evaluate.evaluate(model, ['humaneval'], task_data=data, confirm_run_unsafe_code=True)
    finally:
        sandbox.require.cache_clear()
    assert not model.asked


def test_our_task_is_lm_eval_s_except_for_who_runs_the_programs():
    theirs, ours = (
        load_yaml(folder / 'humaneval.yaml', resolve_func=False)
        for folder in (
            pathlib.Path(lm_eval.tasks.__file__).parent / 'humaneval',
            pathlib.Path(humaneval.__file__).parent,
        )
    )
    changed = {name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name)}
    assert changed == {'metric_list', 'process_results', 'filter_list'}


@pytest.mark.parametrize(
    ('completion', 'taken'),
    [
        ('    return 1\n\nprint(2)', '    return 1'),
        ('\n\n   return 1\n  x', '    return 1\n  x'),  # three spaces become four
        ('', ''),
        ('x = 1\n   \n    y', 'x = 1\n    \n    y'),  # a line of spaces is not blank there
    ],
)
def test_the_first_block_is_instructeval_s(completion, taken):
    assert humaneval.first_block(completion) == taken
