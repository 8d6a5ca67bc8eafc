"""Tasks that run programs: found in every form in which they can be written, and none of them runs outside the jail."""

import json
import pathlib

import pytest

from eval_bridge import evaluate
from eval_bridge.harness import listing
from eval_bridge.jail import programs
from tests.support.scripted import PLAIN, Scripted
from tinyllama_jax import errors

pytestmark = pytest.mark.filterwarnings('ignore')  # lm-eval and datasets give warnings of their own

RUNNING = {'process_results': '!run utils.score'}
MARKED = RUNNING | {'unsafe_code': True}
UNSAFE = PLAIN | MARKED
ONE = {'task': 'one', **PLAIN}
# Task files: in each form the task runs what the model wrote.
FORMS = {
    'a task': {'mine': {'task': 'mine', **UNSAFE}},
    'a task that does not say so': {'mine': {'task': 'mine', **PLAIN, **RUNNING}},
    'a mark that is not a truth value': {'mine': {'task': 'mine', **PLAIN, 'unsafe_code': 0}},
    'an included file': {'mine': {'task': 'mine', 'include': 'base'}, 'base': UNSAFE},
    'a tag': {'a': {'task': 'a', 'tag': 'mine', **UNSAFE}},
    'a tag in a group': {'a': {'task': 'a', 'tag': 't', **UNSAFE}, 'mine': {'group': 'mine', 'task': ['t']}},
    'a group of a group': {
        'a': {'task': 'a', **UNSAFE}, 'b': {'group': 'b', 'task': ['a']}, 'mine': {'group': 'mine', 'task': ['b']},
    },
    "a group's own settings": {'one': ONE, 'mine': {'group': 'mine', 'task': ['one'], **MARKED}},
    'a change of a member': {'one': ONE, 'mine': {'group': 'mine', 'task': [{'task': 'one', **MARKED}]}},
    'a change of a group': {
        'one': ONE, 'b': {'group': 'b', 'task': ['one']}, 'mine': {'group': 'mine', 'task': [{'group': 'b', **MARKED}]},
    },
    'a task in a group': {'mine': {'group': 'mine', 'task': [{'task': 'a', **UNSAFE}]}},
    'a task in a group in a group': {
        'mine': {'group': 'mine', 'task': [{'group': 'b', 'task': [{'task': 'a', **UNSAFE}]}]},
    },
    'deeper': {'mine': {'group': 'mine', 'task': [
        {'group': 'b', 'task': [{'group': 'c', **MARKED, 'task': [{'task': 'a', **PLAIN}]}]},
    ]}},
    'a named task in a group in a group': {
        'a': {'task': 'a', **UNSAFE}, 'mine': {'group': 'mine', 'task': [{'group': 'b', 'task': [{'task': 'a'}]}]},
    },
    'one of two changes of a task': {
        'one': ONE, 'mine': {'group': 'mine', 'task': [{'task': 'one', **MARKED}, {'task': 'one'}]},
    },
    'the mark taken off by a group': {
        'a': {'task': 'a', **UNSAFE}, 'mine': {'group': 'mine', 'task': [{'task': 'a', 'unsafe_code': False}]},
    },
    'another function in our task': {
        'mine': {'group': 'mine', 'task': [{'task': 'humaneval', 'process_results': '!run utils.score'}]},
    },
    'a class': {'mine': {'task': 'mine', 'class': '!run utils.Marked', **PLAIN}},
    'a class that does not say so': {'mine': {'task': 'mine', 'class': '!run utils.Unmarked', **PLAIN}},
    'a metric': {'mine': {'task': 'mine', **PLAIN, 'metric_list': [{'metric': '!run utils.score'}]}},
    'an aggregation': {'mine': {'task': 'mine', **PLAIN, 'metric_list': [
        {'metric': 'exact_match', 'aggregation': '!run utils.score'},
    ]}},
    'a filter': {'mine': {'task': 'mine', **PLAIN, 'filter_list': [
        {'name': 'f', 'filter': [{'function': 'custom', 'filter_fn': '!run utils.score'}]},
    ]}},
    "the package evaluate's metric": {'mine': {'task': 'mine', **PLAIN, 'metric_list': [{'metric': 'code_eval'}]}},
    'a function of Python': {'mine': {'task': 'mine', **PLAIN, 'process_results': '!run builtins.exec'}},
    'a module of Python': {'mine': {'task': 'mine', **PLAIN, 'process_results': '!run subprocess.getoutput'}},
    'processes that begin early': {'mine': {'task': 'mine', **PLAIN, 'process_results': '!run pool.score'}},
    'a helper': {'mine': {'task': 'mine', **PLAIN, 'process_results': '!run indirect.score'}},
}  # fmt: skip
UTILS = """
from lm_eval.api.task import ConfigurableTask

def score(*arguments, **options):
    exec(f'open({str(HOST)!r}, "w").write("x")')
    return {'exact_match': 1.0}

class Unmarked(ConfigurableTask):
    def __init__(self, config):
        super().__init__(config={name: value for name, value in config.items() if name != 'class'})

    def process_results(self, doc, results):
        return score()

class Marked(Unmarked):
    UNSAFE_CODE = True
"""
LATE = """
from lm_eval.api.task import ConfigurableTask

class Late(ConfigurableTask):
    def __init__(self, config):
        super().__init__(config={name: value for name, value in config.items() if name != 'class'})
        self.UNSAFE_CODE = True
"""
POOL = """
import builtins
import concurrent.futures

pool = concurrent.futures.ProcessPoolExecutor()

def score(doc, results):
    pool.submit(getattr(builtins, 'ex' + 'ec'), f'open({str(HOST)!r}, "w").write("x")').result()
    return {'exact_match': 1.0}
"""
HELPER = 'helper_of_programs_test'  # imported by its name
# Only the gate sees what this does.
HIDDEN = """
import builtins

def score(doc, results):
    try:
        getattr(builtins, 'ex' + 'ec')(f'open({str(HOST)!r}, "w").write("x")')
    except BaseException:
        pass
    return {'exact_match': 1.0}
"""


def _write(root, files) -> tuple[pathlib.Path, pathlib.Path]:
    """Returns a folder of task files and the file that their functions write if they run."""
    tasks, host = root / 'tasks', root / 'host'
    tasks.mkdir()
    (root / 'data.jsonl').write_text('{"q": "1", "a": "2"}\n')
    for name, content in files.items():
        text = json.dumps(content).replace('"!run ', '!function "')
        (tasks / (name if name == 'base' else f'{name}.yaml')).write_text(text)
    indirect = f'import {HELPER}\n\ndef score(doc, results):\n    return {HELPER}.score()\n'
    for name, code in {'utils': UTILS, HELPER: UTILS, 'hidden': HIDDEN, 'pool': POOL, 'indirect': indirect}.items():
        (tasks / f'{name}.py').write_text(f'HOST = {str(host)!r}\n{code}')
    return tasks, host


@pytest.mark.parametrize('files', FORMS.values(), ids=FORMS)
def test_no_form_of_a_task_runs_a_program(files, tmp_path, monkeypatch):
    tasks, host = _write(tmp_path, files)
    monkeypatch.syspath_prepend(tasks)
    model = Scripted(lambda prompt: 'program')
    for confirmed in (False, True):
        with pytest.raises(errors.UsageError, match='runs programs of the model outside our jail, or may: '):
            evaluate.evaluate(model, ['mine'], include_path=tasks, confirm_run_unsafe_code=confirmed)
    assert not host.exists() and not model.asked
    manager = listing.task_manager(['mine'], tasks)
    assert programs.running(listing.declared(['mine'], manager, resolve=True))


@pytest.mark.parametrize('confirmed', [False, True])
def test_what_no_reading_of_files_finds_is_refused_when_it_happens(tmp_path, confirmed):
    tasks, host = _write(tmp_path, {'mine': {'task': 'mine', **PLAIN, 'process_results': '!run hidden.score'}})
    with pytest.raises(errors.UsageError, match='the task mine would run code that it made while it scores'):
        evaluate.evaluate(Scripted(), ['mine'], include_path=tasks, confirm_run_unsafe_code=confirmed)
    assert not host.exists()


def test_a_mark_that_only_a_constructor_sets_is_seen(tmp_path):
    tasks, _ = _write(tmp_path, {'mine': {'task': 'mine', 'class': '!run late.Late', **PLAIN}})
    (tasks / 'late.py').write_text(LATE)
    model = Scripted()
    with pytest.raises(errors.UsageError, match='the task mine runs programs of the model outside our jail'):
        evaluate.evaluate(model, ['mine'], include_path=tasks, confirm_run_unsafe_code=True)
    assert not model.asked


def test_changes_that_leave_our_functions_alone_keep_the_jail(tmp_path):
    files = {'mine': {'group': 'mine', 'task': [{'task': 'humaneval', 'num_fewshot': 0, 'unsafe_code': False}]}}
    tasks, _ = _write(tmp_path, files)
    (task,) = listing.declared(['mine'], listing.task_manager(['mine'], tasks), resolve=True)
    assert programs.fault(task.config) is None and programs.running([task]) == ['humaneval']
    with pytest.raises(errors.UsageError, match='humaneval: these tasks run programs .* give --confirm_run_unsafe'):
        evaluate.evaluate(Scripted(), ['mine'], include_path=tasks)


def test_a_file_that_looks_like_ours_is_not_ours(tmp_path):
    files = {
        'mine': {
            'task': 'mine',
            **PLAIN,
            'unsafe_code': True,
            'process_results': '!run eval_bridge.tasks.humaneval.pass_at_1',
        }
    }
    tasks, _ = _write(tmp_path, files)
    (tasks / 'eval_bridge/tasks').mkdir(parents=True)
    (tasks / 'eval_bridge/tasks/humaneval.py').write_text('def pass_at_1(doc, results):\n    return {}\n')
    with pytest.raises(errors.UsageError, match='the task mine runs programs of the model outside our jail'):
        evaluate.evaluate(Scripted(), ['mine'], include_path=tasks, confirm_run_unsafe_code=True)


def test_ordinary_tasks_run_no_programs():
    names = ['gsm8k', 'truthfulqa_mc2', 'drop', 'squadv2', 'instructeval_drop', 'bbh_cot_fewshot', 'race', 'wikitext']
    tasks = listing.declared(names, listing.task_manager(names, None), resolve=True)
    assert len(tasks) > 30 and not programs.running(tasks)
