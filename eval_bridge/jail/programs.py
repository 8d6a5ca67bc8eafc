"""Says which tasks run programs that a model wrote, and whether nothing but our jail can run them.

A task says so itself (`unsafe_code`), or has a function that can run programs. What this reading of files misses,
gate.py refuses when it happens.
"""

import ast
import functools
import inspect
import pathlib
import sys
import sysconfig
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from eval_bridge.harness import listing
from eval_bridge.tasks import humaneval

_SCORING = ('process_results', 'filter_list', 'metric_list')  # fields whose functions are given the model's texts
# By these a Python file can run a program.
_BUILTINS = {'eval', 'exec'}
_MODULES = {'ctypes', 'multiprocess', 'multiprocessing', 'pty', 'runpy', 'subprocess'}
_MEMBERS = {'ProcessPoolExecutor', 'fork', 'forkpty', 'popen', 'posix_spawn', 'posix_spawnp', 'system'}
_MEMBERS |= {f'{kind}{how}' for kind in ('exec', 'spawn') for how in ('l', 'le', 'lp', 'lpe', 'v', 've', 'vp', 'vpe')}
_METRIC = 'code_eval'  # of the package evaluate


def running(tasks: Iterable[listing.Declared]) -> list[str]:
    """Returns the names of the tasks that run programs, or may; their functions must be resolved."""
    return list(dict.fromkeys(task.name for task in tasks if _marked(task.config) or _unjailed(task.config)))


def fault(config: Mapping[str, Any]) -> str | None:
    """Returns why a task might run programs outside our jail; None for one that runs none, or only inside."""
    if not _marked(config):
        return _unjailed(config)
    functions = list(_functions(config))
    ours = functions and all(map(_is_ours, functions)) and config.get('process_results') in functions
    return None if ours else 'only the functions of eval_bridge/tasks/humaneval.py are known to use the jail'


def _marked(config: Mapping[str, Any]) -> bool:
    """Returns whether a task says that it runs programs, as lm-eval reads that, or has our functions, which do."""
    kind = config.get('class')
    of_class = getattr(kind, 'CONFIG', None) or {}
    marks = (config.get('unsafe_code', False), of_class.get('unsafe_code', False))
    said = any(mark is not False for mark in marks) or bool(getattr(kind, 'UNSAFE_CODE', False))
    return said or any(map(_is_ours, _functions(config)))


def _functions(config: Mapping[str, Any]) -> Iterator[Any]:
    """Yields the functions and the class that are given the model's texts."""
    todo = [config.get(field) for field in (*_SCORING, 'class')]
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            todo += value.values()
        elif isinstance(value, list):
            todo += value
        elif callable(value):
            yield value


def _is_ours(function: Any) -> bool:
    return inspect.isfunction(function) and getattr(humaneval, function.__name__, None) is function


def _unjailed(config: Mapping[str, Any]) -> str | None:
    """Returns what in a task's scoring can run programs, if anything can."""
    for metric in config.get('metric_list') or ():
        if isinstance(metric, dict) and _METRIC in str(metric.get('metric')):
            return f'its metric {metric["metric"]} runs them'
    for function in _functions(config):
        while isinstance(function, functools.partial):
            function = function.func
        if not isinstance(function, type | types.FunctionType | types.MethodType):
            function = type(function)
        module = inspect.getmodule(function)
        if module is None or getattr(module, '__file__', None) is None:
            return f'{function!r} has no source that shows what it does'
        for path in _sources(module):
            if found := _runner(path.read_bytes()):
                return f'{path} has {found}'
    return None


def _sources(module: types.ModuleType) -> Iterator[pathlib.Path]:
    """Yields the file of a module and of those that it uses, except those of Python and of installed packages."""
    installed = [pathlib.Path(sysconfig.get_path(name)) for name in ('stdlib', 'purelib', 'platlib')]
    todo, seen = [module], set()
    while todo:
        module = todo.pop()
        file = pathlib.Path(getattr(module, '__file__', None) or '')
        foreign = any(map(file.is_relative_to, installed)) and not module.__name__.startswith('lm_eval.tasks.')
        if file.suffix != '.py' or file in seen or (foreign and seen):
            continue
        seen.add(file)
        yield file
        for value in list(vars(module).values()):
            name = str(getattr(value, '__module__', ''))
            used = value if isinstance(value, types.ModuleType) else sys.modules.get(name)
            todo += [used] if used else []


@functools.cache
def _runner(source: bytes) -> str | None:
    """Returns the name in the source of a Python file by which it can run a program, if there is one."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Name(id=name) if name in _BUILTINS:
                return name
            case ast.Import(names=names):
                found = {alias.name.partition('.')[0] for alias in names} & _MODULES
            case ast.ImportFrom(module=str(module), names=names):
                found = {module.partition('.')[0]} & _MODULES or {alias.name for alias in names} & _MEMBERS
            case ast.Attribute(value=ast.Name(id='builtins'), attr=name) if name in _BUILTINS:
                return name
            case ast.Attribute(value=owner, attr=name):  # of os under any name; `platform.system` runs nothing
                found = {name} & (_MEMBERS if ast.unparse(owner) == 'os' else _MEMBERS - {'system'})
            case ast.Constant(value=str(text)) if text == _METRIC:
                found = {text}
            case _:
                continue
        if found:
            return min(found)
    return None
