"""Runs lm-eval's tasks on a model and stamps the protocol into the result.

Uses the network only if HF_HUB_OFFLINE=0 is set.
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
from collections.abc import Iterator, Mapping, Sequence
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
_GENERATED = ('instructeval_mmlu', 'instructeval_bbh')  # groups whose members share the file _NAME, each with a dataset
# In the text of a task file: the name that it defines, and what it lists under `tag` and `include`.
_DEFINITION = re.compile(r'^["\']?(?:task|group)["\']?: *["\']?([^\s"\'#]+)', re.MULTILINE)
_LIST = re.compile(r'^["\']?(tag|include)["\']?:(.*(?:\n *- *.*)*)', re.MULTILINE)
_LISTED = re.compile(r'[\w./-]*\w[\w.-]*')


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
    """Runs `tasks` on `model` with lm-eval's simple_evaluate and returns its result with an entry `protocol`.

    Multiple-choice tasks also get `gold_bits_per_byte`, which improves while accuracy is still at chance.

    Args:
      model: an lm-eval model, such as lm.JaxLM, opened as the protocol says.
      tasks: names of tasks, groups or tags.
      protocol: decides the number of shots of each task.
      identity: what identifies the model; added to `protocol`.
      include_path: a folder with the user's own task files.
      task_data: a folder with the tasks' data (local_data.py); None: the hub's cache, or the hub.
      confirm_run_unsafe_code: run the programs that the model writes, in jails (sandbox.py).
      limit: take only the first `limit` examples of each task.
      log_samples: keep every example with its log-likelihoods under `samples`.
      output: a JSON file to write (`write`).
      manager: the result of `task_manager(tasks, include_path)`, if the caller has it.

    Raises UsageError for unknown tasks, for data that is missing, malformed or unreadable, and as `check_tasks` does.
    """
    manager = manager or task_manager(tasks, include_path)
    check_tasks(tasks, manager, task_data=task_data, confirm_run_unsafe_code=confirm_run_unsafe_code)
    without_training_split = _shots_from_validation(tasks, manager, protocol, task_data)
    data_files: dict[str, Any] = {}
    download = local_data.downloader(ConfigurableTask.download, include_path, task_data, data_files)
    options = {'task_manager': manager, 'limit': limit, 'confirm_run_unsafe_code': confirm_run_unsafe_code}
    with patches.replaced(ConfigurableTask, 'download', download):
        result = _run_tasks(model, tasks, protocol, **options)
    truncated = truncation.count(model, result['samples'])
    if cut := ', '.join(f'{count:,} of {task}' for task, count in (truncated or {}).items() if count):
        cause = f'requests were longer than the model reads ({model.max_length} tokens) and were cut on the left'
        print(f'evaluate: {cause}: {cut}.', file=sys.stderr)
    if not log_samples:
        del result['samples']
    result['protocol'] = {
        'name': protocol.name,
        'num_fewshot': result['n-shot'],
        'task_versions': result['versions'],
        'harness_version': importlib.metadata.version('lm_eval'),
        'limit': limit,
        'truncated_requests': truncated,
        **({'task_data': data_files, 'shots_from_validation': without_training_split} if task_data else {}),
        **(identity or {}),
    }
    if output is not None:
        write(pathlib.Path(output), result)
    return result


def _run_tasks(model, tasks: Sequence[str], protocol: protocols.Protocol, **options) -> dict[str, Any]:
    """Returns the merged results of one simple_evaluate for each number of shots."""
    logging.getLogger('lm_eval').setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    by_shots = defaultdict(list)
    for task in dict.fromkeys(tasks):
        by_shots[protocol.num_fewshot(task)].append(task)
    result: dict[str, Any] = {}
    for shots, names in by_shots.items():
        try:
            with (
                patches.replaced(lm_eval.evaluator, 'add_env_info', lambda result: None),  # a page that takes seconds
                patches.refusing(),
                patches.scoring_gold(),
                patches.fitting(model),
            ):
                part = lm_eval.evaluator.simple_evaluate(
                    model=model, tasks=names, num_fewshot=shots, log_samples=True, **options
                )
        except jinja2.UndefinedError as error:
            raise errors.UsageError(
                f"an example in the data of {', '.join(names)} does not fit its task's template: {error}."
            ) from error
        except UnicodeDecodeError as error:  # in the middle of a file, which is decoded only as it is read
            raise errors.UsageError(f'the data of {", ".join(names)} is not valid UTF-8: {error}.') from error
        for key, value in part.items():
            if isinstance(value, dict):
                result.setdefault(key, {}).update(value)
            else:
                result.setdefault(key, value)
    for task, samples in result['samples'].items():  # lm-eval has no standard error for a ratio of sums
        scored = [sample[patches.GOLD] for sample in samples if patches.GOLD in sample]
        if scored:
            result['results'][task][f'{patches.GOLD}_stderr,none'] = baselines.bits_per_byte(scored)[1]
    return result


def write(path: pathlib.Path, result: dict[str, Any]) -> None:
    """Writes a result as JSON; the file appears only when it is complete. Raises RunError if it can't be written."""
    text = json.dumps(result, indent=2, default=handle_non_serializable, ensure_ascii=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomically(path, text + '\n')
    except OSError as error:
        raise errors.RunError(f'{path} could not be written: {error.strerror}.') from error


def check_tasks(
    tasks: Sequence[str],
    manager: lm_eval.tasks.TaskManager,
    *,
    task_data: pathlib.Path | str | None = None,
    confirm_run_unsafe_code: bool = False,
) -> None:
    """Checks, before a model is opened, that `tasks` can run and are allowed to.

    Raises UsageError for data that `task_data` lacks, and for a task that runs programs if the user did not confirm
    it, if no jail can be made, or if the task does not use our jail.
    """
    unsafe = running_programs(tasks, manager)
    for name in unsafe:
        entry = manager.task_index.get(name)
        if not (entry and entry.yaml_path and _TASKS in entry.yaml_path.parents):
            raise errors.UsageError(f'the task {name} runs programs of the model outside our jail; leave it out.')
    if unsafe and not confirm_run_unsafe_code:
        raise errors.UsageError(
            f'{", ".join(unsafe)}: these tasks run programs that the model wrote; give --confirm_run_unsafe_code to '
            'have them run in a jail, or leave these tasks out.'
        )
    if unsafe:
        sandbox.require()
    if task_data:
        local_data.require_files(task_data, _configs(tasks, manager))


def running_programs(tasks: Sequence[str], manager: lm_eval.tasks.TaskManager) -> list[str]:
    """Returns the tasks, among `tasks` and their groups' members, that run programs which the model wrote."""
    return [name for name, config in _configs(tasks, manager).items() if config.get('unsafe_code')]


def _shots_from_validation(tasks, manager, protocol: protocols.Protocol, task_data) -> list[str]:
    """Returns and prints the tasks whose few-shot examples are from validation: their training split is missing."""
    if not task_data:
        return []
    affected = []
    for name, config in _configs(tasks, manager).items():
        shots = protocol.num_fewshot(name)
        shots = config.get('num_fewshot') if shots is None else shots
        if shots and local_data.from_validation(config, task_data):
            affected.append(name)
    if affected:
        missing = f'no training split of {", ".join(affected)} in {task_data}'
        print(f'evaluate: {missing}: few-shot examples are from validation.', file=sys.stderr)
    return affected


def _configs(names: Sequence[str], manager: lm_eval.tasks.TaskManager) -> dict[str, dict[str, Any]]:
    """Returns task -> its file's content, for `names` and their groups' members, with the groups' changes."""
    return {
        name: {**((entry.cfg if entry else None) or {}), **changes}
        for name, entry, changes in _expand(names, manager)
        if not entry or entry.kind not in (Kind.GROUP, Kind.TAG)
    }


def _expand(
    names: Sequence[str | dict[str, Any]], manager: lm_eval.tasks.TaskManager, changes: Mapping[str, Any] | None = None
) -> Iterator[tuple[str, Entry | None, dict[str, Any]]]:
    """Yields (name, its index entry or None, `changes`) of each name and, after a group or tag, of its members.

    A group may name a member by a dict. Its settings are changes: they replace those of the member and of what the
    member contains.
    """
    for each in names:
        name = each if isinstance(each, str) else each.get('group') or each['task']
        changed = {**(changes or {}), **({} if isinstance(each, str) else each)}
        entry = manager.task_index.get(name)
        yield name, entry, changed
        members = entry and (sorted(entry.tags) if entry.kind is Kind.TAG else (entry.cfg or {}).get('task'))
        if isinstance(members, list):  # a task's `task` is its name
            yield from _expand(members, manager, changed)


def task_manager(names: Sequence[str], include_path: pathlib.Path | str | None) -> lm_eval.tasks.TaskManager:
    """Returns an lm-eval TaskManager that knows `names` and everything they refer to.

    lm-eval's own manager reads 13,000 files, half a minute on a slow machine. This one reads only the folders of the
    tasks wanted, which it finds by searching the files' text. Raises UsageError for an unknown name, naming the
    nearest task.
    """
    if not names:
        raise errors.UsageError('--tasks=NAME,NAME is missing.')
    if include_path is not None and not pathlib.Path(include_path).is_dir():
        raise errors.UsageError(f'--include_path={include_path} is not a folder.')
    own: list[pathlib.Path | str] = [_TASKS, *([] if include_path is None else [pathlib.Path(include_path)])]
    folders: set[pathlib.Path] = set()  # those of lm-eval's that are read
    while True:
        paths: list[pathlib.Path | str] = [*sorted(folders), *own]
        manager = _with_generated(lm_eval.tasks.TaskManager(include_path=paths, include_defaults=False))
        missing = [
            name
            for name, entry, _ in _expand(names, manager)
            # A tag's tasks are all known only when its folder was read.
            if entry is None or (entry.kind is Kind.TAG and _official().get(name) not in folders)
        ]
        if not missing:
            return manager
        wanted = [_official().get(name) for name in missing]
        if None in wanted:
            break
        folders.update(path for path in wanted if path)
    known = {*_official(), *manager.task_index}
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0)
            raise errors.UsageError(f'--tasks: there is no task {name!r}; the nearest is {near[0]!r}.')
    # Every name exists, and one is a tag of several folders: only lm-eval's full index has them all.
    return _with_generated(lm_eval.tasks.TaskManager(include_path=own))


def _with_generated(manager: lm_eval.tasks.TaskManager) -> lm_eval.tasks.TaskManager:
    """Adds the members of the groups `_GENERATED`: GROUP_member is the file _GROUP with the dataset `member`."""
    for group in _GENERATED:
        shared = load_yaml(_TASKS / f'_{group}')
        for name in (manager.task_index[group].cfg or {})['task']:
            config = {**shared, 'task': name, 'dataset_name': name.removeprefix(f'{group}_')}
            manager.task_index.setdefault(name, Entry(name, Kind.PY_TASK, yaml_path=None, cfg=config))
    return manager


@functools.cache
def _official() -> dict[str, pathlib.Path | None]:
    """Returns the folder of each task, group and tag in lm-eval's own files; None for a tag that several may have."""
    folders: dict[str, pathlib.Path | None] = {}
    tagged: dict[str, set[pathlib.Path]] = defaultdict(set)
    shared = set()  # folders with a file that a file of another folder includes, and so may take its tags from
    for path in sorted(pathlib.Path(lm_eval.tasks.__file__).parent.rglob('*')):
        if path.suffix not in ('', '.yaml') or not path.is_file():  # templates have no suffix
            continue
        text = path.read_text(encoding='utf-8')
        if path.suffix == '.yaml':
            for name in _DEFINITION.findall(text):
                folders.setdefault(name, path.parent)
        for field, content in _LIST.findall(text):
            for name in _LISTED.findall(content):
                if field == 'tag':
                    tagged[name].add(path.parent)
                elif (source := (path.parent / name).resolve().parent) != path.parent:
                    shared.add(source)
    for tag, having in tagged.items():
        folders.setdefault(tag, None if len(having) > 1 or having & shared else next(iter(having)))
    return folders
