"""Runs lm-eval's tasks on a model and stamps the protocol into the result.

Nothing asks the network unless HF_HUB_OFFLINE=0 is set.
"""

import difflib
import functools
import importlib.metadata
import json
import logging
import os
import pathlib
import re
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

os.environ.setdefault('HF_HUB_OFFLINE', '1')  # read when the libraries below are imported
os.environ.setdefault('DISABLE_MULTIPROC', '1')  # lm-eval's bootstrap would fork, which a JAX process may not

import datasets
import jinja2
import lm_eval
import lm_eval.api.group
import lm_eval.evaluator
import lm_eval.tasks
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._index import Entry, Kind
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.utils import handle_non_serializable

from eval_bridge import protocols
from eval_bridge.harness import local_data, patches, truncation
from eval_bridge.jail import sandbox
from tinyllama_jax import errors, files
from tinyllama_jax.report import baselines

_TASKS = pathlib.Path(__file__).parent / 'tasks'
_MADE = ('instructeval_mmlu', 'instructeval_bbh')  # groups whose members are one file, _NAME, with another dataset
_DEFINITION = re.compile(r'^["\']?(?:task|group)["\']?: *["\']?([^\s"\'#]+)', re.MULTILINE)
_INCLUDES = re.compile(r'^["\']?include["\']?:(.*(?:\n *- *.*)*)', re.MULTILINE)
_TAGS = re.compile(r'^["\']?tag["\']?:(.*(?:\n *- *.*)*)', re.MULTILINE)


def evaluate(
    model,
    tasks: Sequence[str],
    *,
    protocol: protocols.Protocol = protocols.PAPER,
    identity: Mapping[str, Any] | None = None,
    include_path: pathlib.Path | str | None = None,
    task_data: pathlib.Path | str | None = None,
    confirm_run_unsafe_code: bool = False,
    limit: int | None = None,
    log_samples: bool = False,
    output: pathlib.Path | str | None = None,
    manager: lm_eval.tasks.TaskManager | None = None,
) -> dict[str, Any]:
    """Runs `tasks` on `model` with lm-eval's simple_evaluate and returns its result with `protocol`.

    Multiple-choice tasks have `gold_bits_per_byte` besides their own metrics: of the right answers
    together, which moves where accuracy is still chance.

    Args:
      model: an lm-eval model, such as lm.JaxLM, opened as the protocol says.
      tasks: names of tasks, groups or tags.
      protocol: decides the number of shots of each task.
      identity: what to stamp about the model.
      include_path: a folder with task files of one's own; relative data files in tasks are
        looked up from the current folder, then from those that hold `include_path` and `task_data`.
      task_data: a folder with the tasks' data (local_data.py); none: the hub's cache, or the hub.
      confirm_run_unsafe_code: run the programs that the model writes, in jails (sandbox.py).
      limit: only the first so many examples of each task.
      log_samples: keep every example with its log-likelihoods under `samples`.
      output: a JSON file to write; it appears only when it is complete.
      manager: what `task_manager` made of `tasks` and `include_path`, where it was asked before.

    Raises UsageError for an unknown task, data that is missing, malformed or cannot be loaded, and what `check` does.
    """
    _quieten()
    manager = manager or task_manager(tasks, include_path)
    check(tasks, manager, task_data=task_data, confirm_run_unsafe_code=confirm_run_unsafe_code)
    drawn = _shots_from_validation(tasks, manager, protocol, task_data)
    files: dict[str, Any] = {}
    download = local_data.downloader(ConfigurableTask.download, include_path, task_data, files)
    by_shots = defaultdict(list)
    for task in dict.fromkeys(tasks):
        by_shots[protocol.num_fewshot(task)].append(task)
    result: dict[str, Any] = {}
    with (
        patches.replaced(ConfigurableTask, 'download', download),
        patches.refusing(),
        patches.scoring_gold(),
        patches.fitting(model),
        patches.replaced(lm_eval.evaluator, 'add_env_info', lambda result: None),
    ):
        for shots, names in by_shots.items():  # add_env_info would take seconds to write a page about the machine
            options = {'task_manager': manager, 'limit': limit, 'confirm_run_unsafe_code': confirm_run_unsafe_code}
            _merge(result, _asked(model, names, num_fewshot=shots, log_samples=True, **options))
    _add_gold_errors(result)
    truncated = truncation.count(model, result['samples'])
    _tell_truncated(truncated, model)
    if not log_samples:
        del result['samples']
    result['protocol'] = {
        'name': protocol.name,
        'num_fewshot': result['n-shot'],
        'task_versions': result['versions'],
        'harness_version': importlib.metadata.version('lm_eval'),
        'limit': limit,
        'truncated_requests': truncated,
        **({'task_data': files, 'shots_from_validation': drawn} if task_data else {}),
        **(identity or {}),
    }
    if output is not None:
        write(pathlib.Path(output), result)
    return result


def _asked(model, names: Sequence[str], **options) -> dict[str, Any]:
    """The result of lm-eval's simple_evaluate."""
    try:
        return lm_eval.evaluator.simple_evaluate(model=model, tasks=names, **options)
    except jinja2.UndefinedError as error:
        raise errors.UsageError(
            f'a record of the data does not fit the template of its task, of {", ".join(names)}: {error}.'
        ) from error
    except UnicodeDecodeError as error:  # of a text in the middle of a file, which is decoded when it is read
        raise errors.UsageError(f'the data of {", ".join(names)} is no UTF-8: {error}.') from error


def _merge(result: dict[str, Any], part: dict[str, Any]) -> None:
    """Adds the result of some tasks to that of others."""
    for key, value in part.items():
        if isinstance(value, dict):
            result.setdefault(key, {}).update(value)
        else:
            result.setdefault(key, value)


def _add_gold_errors(result: dict[str, Any]) -> None:
    """The standard errors, which lm-eval does not know for a ratio of sums."""
    for task, samples in result['samples'].items():
        scored = [sample[patches.GOLD] for sample in samples if patches.GOLD in sample]
        if scored:
            result['results'][task][f'{patches.GOLD}_stderr,none'] = baselines.bits_per_byte(scored)[1]


def _tell_truncated(counts: Mapping[str, int] | None, model) -> None:
    told = ', '.join(f'{count:,} of {task}' for task, count in (counts or {}).items() if count)
    if told:
        what = f'requests were longer than the model reads ({model.max_length} tokens) and were cut on the left'
        print(f'evaluate: {what}: {told}.', file=sys.stderr)


def _quieten() -> None:
    logging.getLogger('lm_eval').setLevel(logging.ERROR)
    datasets.disable_progress_bars()


def write(path: pathlib.Path, result: dict[str, Any]) -> None:
    """Writes a result as JSON; the file appears only when it is complete. Raises RunError where it cannot."""
    text = json.dumps(result, indent=2, default=handle_non_serializable, ensure_ascii=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomically(path, text + '\n')
    except OSError as error:
        raise errors.RunError(f'--output={path} could not be written: {error.strerror}.') from error


def check(
    tasks: Sequence[str],
    manager: lm_eval.tasks.TaskManager,
    *,
    task_data: pathlib.Path | str | None = None,
    confirm_run_unsafe_code: bool = False,
) -> None:
    """Makes sure, before a model is opened, that `tasks` may and can run.

    Raises UsageError where a task runs programs and that was not confirmed, cannot be contained, or is not done in our
    jail; and for data that `task_data` lacks.
    """
    unsafe = running_programs(tasks, manager)
    for name in unsafe:
        entry = manager.task_index.get(name)
        if not (entry and entry.yaml_path and _TASKS in entry.yaml_path.parents):
            raise errors.UsageError(f'the task {name} runs programs that the model wrote, and not in our jail.')
    if unsafe and not confirm_run_unsafe_code:
        raise errors.UsageError(
            f'{", ".join(unsafe)}: these tasks run programs that the model wrote; give --confirm_run_unsafe_code to '
            'have them run in a jail, or leave these tasks out.'
        )
    if unsafe:
        sandbox.require()
    if task_data:
        local_data.check(task_data, _configs(tasks, manager))


def running_programs(tasks: Sequence[str], manager: lm_eval.tasks.TaskManager) -> list[str]:
    """The tasks, among `tasks` and the members of their groups, that run what the model wrote."""
    return [name for name, config in _configs(tasks, manager).items() if config.get('unsafe_code')]


def _shots_from_validation(tasks, manager, protocol: protocols.Protocol, task_data) -> list[str]:
    """The tasks whose examples would come from a training split that is not there; says so."""
    if not task_data:
        return []
    drawn = [
        name
        for name, config in _configs(tasks, manager).items()
        if (config.get('num_fewshot') if (shots := protocol.num_fewshot(name)) is None else shots)
        and local_data.from_validation(config, task_data)
    ]
    if drawn:
        names = ', '.join(drawn)
        print(f'evaluate: no training split of {names} in {task_data}: examples are from validation.', file=sys.stderr)
    return drawn


def _configs(names: Sequence[str], manager: lm_eval.tasks.TaskManager) -> dict[str, dict[str, Any]]:
    """The content of the file of each task among `names` and their groups, changed as a group says."""
    found, pending = {}, [(name, {}) for name in reversed(names)]
    while pending:
        name, changes = pending.pop()
        entry = manager.task_index.get(name)
        members = (entry.cfg or {}).get('task') if entry else None
        if entry and entry.kind is Kind.TAG:
            pending += [(member, changes) for member in sorted(entry.tags, reverse=True)]
        elif isinstance(members, list):
            own = [(_member(member), member if isinstance(member, dict) else {}) for member in reversed(members)]
            pending += [(member, {**changes, **more}) for member, more in own]
        else:
            found[name] = {**((entry.cfg if entry else None) or {}), **changes}
    return found


def task_manager(names: Sequence[str], include_path: pathlib.Path | str | None) -> lm_eval.tasks.TaskManager:
    """An lm-eval TaskManager that knows `names` and all they refer to.

    lm-eval's own reads its 13,000 files, half a minute on a slow machine; here only the
    folders of the tasks wanted are read, where a search of the texts can tell which.
    Raises UsageError naming the nearest task for a name that is nowhere.
    """
    if not names:
        raise errors.UsageError('--tasks=NAME,NAME is missing.')
    if include_path is not None and not pathlib.Path(include_path).is_dir():
        raise errors.UsageError(f'--include_path={include_path} is not a folder.')
    own = [_TASKS, *([] if include_path is None else [pathlib.Path(include_path)])]
    folders: set[pathlib.Path] = set()
    while True:
        paths = [*sorted(folders), *own]
        manager = _with_made(lm_eval.tasks.TaskManager(include_path=paths, include_defaults=False))
        missing = _missing(names, manager, folders)
        if not missing:
            return manager
        defined, tags = _official()
        wanted = {name: defined.get(name) or tags.get(name) for name in missing}
        if not all(wanted.values()):
            break
        folders = folders.union(*wanted.values())
    known = {*defined, *tags, *manager.task_index}
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0)
            raise errors.UsageError(f'--tasks: there is no task {name!r}; the nearest is {near[0]!r}.')
    return _with_made(lm_eval.tasks.TaskManager(include_path=own))


def _with_made(manager: lm_eval.tasks.TaskManager) -> lm_eval.tasks.TaskManager:
    """Adds the members of `_MADE`: NAME_member is the file _NAME with the dataset `member`."""
    for group in _MADE:
        shared = load_yaml(_TASKS / f'_{group}')
        for name in manager.task_index[group].cfg['task']:
            config = {**shared, 'task': name, 'dataset_name': name.removeprefix(f'{group}_')}
            manager.task_index.setdefault(name, Entry(name, Kind.PY_TASK, yaml_path=None, cfg=config))
    return manager


def _missing(names, manager: lm_eval.tasks.TaskManager, folders: set[pathlib.Path]) -> set[str]:
    """Names that `manager`, which has read `folders`, does not know, among `names` and the members of their groups."""
    missing, pending = set(), list(names)
    while pending:
        name = pending.pop()
        entry = manager.task_index.get(name)
        if entry is None:
            missing.add(name)
        elif entry.kind is Kind.TAG:  # known in full only when every file is that has it
            places = _official()[1].get(name)
            if not places or not places <= folders:
                missing.add(name)
        elif isinstance(members := (entry.cfg or {}).get('task'), list):
            pending += [_member(member) for member in members]
    return missing


def _member(member: str | dict[str, Any]) -> str:
    return member if isinstance(member, str) else member.get('group') or member['task']


@functools.cache
def _official() -> tuple[dict[str, set[pathlib.Path]], dict[str, set[pathlib.Path]]]:
    """Of what comes with lm-eval: the folder of every task and group, and all folders of every tag.

    The set of a tag is empty where it is in several folders (of which lm-eval's index would keep one), or where files
    elsewhere include one that has it, and so may have it too.
    """
    defined: dict[str, set[pathlib.Path]] = {}
    tags: dict[str, set[pathlib.Path]] = defaultdict(set)
    included = set()
    for path in sorted(pathlib.Path(lm_eval.tasks.__file__).parent.rglob('*')):
        if path.suffix not in ('', '.yaml') or not path.is_file():  # templates have no suffix
            continue
        text = path.read_text(encoding='utf-8')
        for match in _TAGS.findall(text):
            for tag in re.findall(r'[\w.-]*\w[\w.-]*', match):
                tags[tag].add(path.parent)
        for match in _INCLUDES.findall(text):
            places = {(path.parent / name).resolve().parent for name in re.findall(r'[\w./-]*\w[\w.-]*', match)}
            included |= places - {path.parent}
        if path.suffix == '.yaml':
            for name in _DEFINITION.findall(text):
                defined.setdefault(name, {path.parent})
    return defined, {tag: set() if len(folders) > 1 or folders & included else folders for tag, folders in tags.items()}
