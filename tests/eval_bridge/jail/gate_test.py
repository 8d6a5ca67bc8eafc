"""The gate: what would run a program while answers are scored is refused, also if the task hides that; no more."""

import collections
import concurrent.futures
import contextlib
import importlib
import importlib.util
import multiprocessing
import os
import runpy
import subprocess

import jinja2
import pytest

from eval_bridge.jail import gate, sandbox
from tinyllama_jax import errors


class Model:
    """Answers, and starts a process in order to."""

    rank = 0

    def generate_until(self, requests):
        return [subprocess.run(['true'], check=True).returncode for _ in requests]


def _score(act, requests=('one',)):
    with gate.watching(Model(), 'first, second') as model:
        assert model.rank == 0
        exec('before = 1')  # the model has not answered yet
        assert model.generate_until(requests) == [0] * len(requests)
        act()


def _write_and_import(folder):
    path = folder / 'solution.py'
    path.write_text('x = 1')
    spec = importlib.util.spec_from_file_location('solution', path)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def _write_and_run(folder):
    (folder / 'solution.py').write_text('x = 1')
    runpy.run_path(str(folder / 'solution.py'))


def _quietly(act):
    with contextlib.suppress(BaseException):
        act()


def _in_a_thread(act):
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pool.submit(act).result()


ACTS = {
    'exec': lambda folder: exec('x = 1'),
    'eval': lambda folder: eval('1 + 1'),
    'exec of compiled code': lambda folder: exec(compile('x = 1', 'solution.py', 'exec')),
    'an import of a new file': _write_and_import,
    'a run of a new file': _write_and_run,
    'a process': lambda folder: subprocess.run(['true']),
    'a shell': lambda folder: os.system('true'),
    'a pipe': lambda folder: os.popen('true').read(),
    'a spawned program': lambda folder: os.spawnlp(os.P_WAIT, 'true', 'true'),
    'a fork': lambda folder: os.fork() or os._exit(0),
    "multiprocessing's fork": lambda folder: multiprocessing.get_context('fork').Process(target=print).start(),
    "multiprocessing's spawn": lambda folder: multiprocessing.get_context('spawn').Process(target=int).start(),
    'exec, and silence': lambda folder: _quietly(lambda: exec('x = 1')),
    'a thread': lambda folder: _in_a_thread(lambda: exec('x = 1')),
}


@pytest.mark.parametrize('act', ACTS.values(), ids=ACTS)
def test_what_would_run_a_program_is_refused(act, tmp_path):
    with pytest.raises(errors.UsageError, match='the task first, second would (run code|start a process)'):
        _score(lambda: act(tmp_path))
    exec('after = 1')
    assert subprocess.run(['true']).returncode == 0


def test_a_task_s_method_is_named():
    class Task:
        config = collections.namedtuple('Config', 'task')('third')

        def process_results(self):
            exec('x = 1')

    with pytest.raises(errors.UsageError, match='the task third would run code that it made'):
        _score(Task().process_results)


def test_ordinary_scoring_is_not_refused(tmp_path, monkeypatch):
    (tmp_path / 'lazy_helper.py').write_text(
        'import collections, dataclasses\nPair = collections.namedtuple("Pair", "a b")\n'
        '@dataclasses.dataclass\nclass Point:\n    x: int = eval("1")\n'
    )
    os.utime(tmp_path / 'lazy_helper.py', (0, 0))
    monkeypatch.syspath_prepend(tmp_path)

    def score():
        assert jinja2.Environment().from_string('{{x}}').render(x=1) == '1'
        assert importlib.import_module('lazy_helper').Point().x == 1
        assert collections.namedtuple('Late', 'a')(1).a == 1

    _score(score)


def test_our_jails_start():
    try:
        sandbox.require()
    except errors.UsageError as error:
        pytest.skip(str(error))
    outcomes = []
    _score(lambda: outcomes.extend(sandbox.run(['x = 1', 'x = ('])))
    assert outcomes == ['passed', 'failed']


def test_threads_that_were_there_before_go_on():
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()
        _score(lambda: pool.submit(exec, 'x = 1').result())
