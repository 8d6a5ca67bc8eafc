"""The gate: what would run a program while answers are scored is refused, also if the task hides that; no more."""

import collections
import concurrent.futures
import contextlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import multiprocessing
import os
import py_compile
import runpy
import subprocess
import sys
import time
import types
import zipfile

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


def _write_and_import_an_archive(folder):
    with zipfile.ZipFile(folder / 'solution.zip', 'w') as file:
        file.writestr('zipped_solution.py', 'x = 1')
    sys.path.insert(0, str(folder / 'solution.zip'))
    try:
        importlib.import_module('zipped_solution')
    finally:
        del sys.path[0]


def _write_and_import_bytecode(folder):
    (folder / 'solution.py').write_text('x = 1')
    py_compile.compile(str(folder / 'solution.py'), cfile=str(folder / 'solution.pyc'))
    (folder / 'solution.py').unlink()
    loader = importlib.machinery.SourcelessFileLoader('solution', str(folder / 'solution.pyc'))
    loader.exec_module(importlib.util.module_from_spec(importlib.util.spec_from_loader('solution', loader)))


def _write_with_an_old_time(folder):
    (folder / 'solution.py').write_text('x = 1')
    os.utime(folder / 'solution.py', (0, 0))  # as a program that was unpacked
    runpy.run_path(str(folder / 'solution.py'))


class _FromText(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    def find_spec(self, name, path, target=None):
        return importlib.util.spec_from_loader(name, self) if name == 'solution_in_a_text' else None

    def get_source(self, fullname):
        return 'x = 1'


class _ByItself(_FromText):
    def exec_module(self, module):
        exec('x = 1', vars(module))


def _import_from_a_text(finder):
    sys.meta_path.insert(0, finder)
    try:
        importlib.import_module('solution_in_a_text')
    finally:
        sys.meta_path.remove(finder)


def _change_a_function(code):
    def function():
        pass

    function.__code__ = code


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
    'an import of a new archive': _write_and_import_an_archive,
    'an import of new bytecode': _write_and_import_bytecode,
    'a run of a new file with an old time': _write_with_an_old_time,
    'an import of a text': lambda folder: _import_from_a_text(_FromText()),
    'an import of a text by a loader of its own': lambda folder: _import_from_a_text(_ByItself()),
    'a function of compiled code': lambda folder: types.FunctionType(compile('x = 1', 'solution.py', 'exec'), {})(),
    'other code for a function': lambda folder: _change_a_function(compile('x = 1', 'solution.py', 'exec')),
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
    time.sleep(0.1)
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


@pytest.mark.parametrize('begun', [gate.owning_threads, lambda: gate.watching(Model(), 'earlier')])
def test_threads_of_tasks_are_watched_later_too(begun):
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        with begun():
            pool.submit(int).result()
        with pytest.raises(errors.UsageError, match='the task first, second would run code that it made'):
            _score(lambda: pool.submit(exec, 'x = 1').exception())
