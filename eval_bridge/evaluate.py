"""Runs lm-eval's tasks on a model and stamps the protocol into the result.

Nothing asks the network unless HF_HUB_OFFLINE=0 is set.
"""

import contextlib
import difflib
import functools
import importlib.metadata
import json
import logging
import os
import pathlib
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

os.environ.setdefault('HF_HUB_OFFLINE', '1')  # read when the libraries below are imported
os.environ.setdefault('DISABLE_MULTIPROC', '1')  # lm-eval's bootstrap would fork, which a JAX process may not

import datasets
import lm_eval
import lm_eval.api.group
import lm_eval.evaluator
import lm_eval.tasks
from lm_eval.api.task import ConfigurableTask
from lm_eval.utils import handle_non_serializable

from eval_bridge import protocols
from tinyllama_jax import baselines, errors, metrics

_GOLD = 'gold_bits_per_byte'
_LOCAL = ('arrow', 'csv', 'json', 'parquet', 'text')  # dataset_path of tasks whose data_files are files here
_DEFINITION = re.compile(r'^["\']?(?:task|group)["\']?: *["\']?([^\s"\'#]+)', re.MULTILINE)
_TAGS = re.compile(r'^["\']?tag["\']?:(.*(?:\n *- *.*)*)', re.MULTILINE)


def evaluate(
    model,
    tasks: Sequence[str],
    *,
    protocol: protocols.Protocol = protocols.PAPER,
    identity: Mapping[str, Any] | None = None,
    include_path: pathlib.Path | str | None = None,
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
        looked up from the current folder, then from the folder that holds `include_path`.
      limit: only the first so many examples of each task.
      log_samples: keep every example with its log-likelihoods under `samples`.
      output: a JSON file to write; it appears only when it is complete.
      manager: what `task_manager` made of `tasks` and `include_path`, where it was asked before.

    Raises UsageError for an unknown task or data that cannot be loaded.
    """
    _quieten()
    manager = manager or task_manager(tasks, include_path)
    by_shots = defaultdict(list)
    for task in dict.fromkeys(tasks):
        by_shots[protocol.num_fewshot(task)].append(task)
    result: dict[str, Any] = {}
    with (
        _loading_from(include_path),
        _scoring_gold(),
        _replaced(lm_eval.evaluator, 'add_env_info', lambda result: None),
    ):
        for shots, names in by_shots.items():  # add_env_info would take seconds to write a page about the machine
            part = lm_eval.evaluator.simple_evaluate(
                model=model, tasks=names, num_fewshot=shots, limit=limit, log_samples=True, task_manager=manager
            )
            _merge(result, part)
    _add_gold_errors(result)
    if not log_samples:
        del result['samples']
    result['protocol'] = {
        'name': protocol.name,
        'num_fewshot': result['n-shot'],
        'task_versions': result['versions'],
        'harness_version': importlib.metadata.version('lm_eval'),
        'limit': limit,
        **(identity or {}),
    }
    if output is not None:
        write(pathlib.Path(output), result)
    return result


def _merge(result: dict[str, Any], part: dict[str, Any]) -> None:
    """Adds the result of some tasks to that of others."""
    for key, value in part.items():
        if isinstance(value, dict):
            result.setdefault(key, {}).update(value)
        else:
            result.setdefault(key, value)


def _scoring_gold() -> contextlib.AbstractContextManager[None]:
    """Lets multiple-choice tasks score the log-likelihood and bytes of the right answer too, as a metric of theirs."""
    original = ConfigurableTask.process_results

    def process_results(self, doc, results):
        metrics = original(self, doc, results)
        if self.OUTPUT_TYPE == 'multiple_choice':
            choices = self.doc_to_choice(doc)
            gold = self.doc_to_text(doc) if self.multiple_input else self.doc_to_target(doc)
            gold = choices.index(gold) if isinstance(gold, str) and gold in choices else gold
            if isinstance(gold, int) and 0 <= gold < len(choices):
                answer = self.doc_to_target(doc) if self.multiple_input else choices[gold]
                self._aggregation_list.setdefault(_GOLD, lambda samples: baselines.bits_per_byte(samples)[0])
                self._higher_is_better.setdefault(_GOLD, False)
                metrics[_GOLD] = (results[gold][0], len(f'{self.config.target_delimiter}{answer}'.encode()))
        return metrics

    return _replaced(ConfigurableTask, 'process_results', process_results)


def _add_gold_errors(result: dict[str, Any]) -> None:
    """The standard errors, which lm-eval does not know for a ratio of sums."""
    for task, samples in result['samples'].items():
        scored = [sample[_GOLD] for sample in samples if _GOLD in sample]
        if scored:
            result['results'][task][f'{_GOLD}_stderr,none'] = baselines.bits_per_byte(scored)[1]


def _quieten() -> None:
    logging.getLogger('lm_eval').setLevel(logging.ERROR)
    datasets.disable_progress_bars()


def write(path: pathlib.Path, result: dict[str, Any]) -> None:
    """Writes a result as JSON; the file appears only when it is complete. Raises RunError where it cannot."""
    text = json.dumps(result, indent=2, default=handle_non_serializable, ensure_ascii=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        metrics.write_atomically(path, text + '\n')
    except OSError as error:
        raise errors.RunError(f'--output={path} could not be written: {error.strerror}.') from error


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Gives `owner` another attribute for a while; lm-eval has no arguments for what is replaced here."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _loading_from(include_path: pathlib.Path | str | None) -> contextlib.AbstractContextManager[None]:
    """Lets tasks find relative data files from wherever the command runs, and name data that is missing."""
    original = ConfigurableTask.download
    roots = [pathlib.Path.cwd(), *([pathlib.Path(include_path).resolve().parent] if include_path else [])]

    def download(self, dataset_kwargs=None, **kwargs):
        if self.DATASET_PATH in _LOCAL:
            dataset_kwargs = _located(dataset_kwargs, roots)
        try:
            return original(self, dataset_kwargs, **kwargs)
        except (OSError, datasets.exceptions.DatasetsError) as error:  # ConnectionError is an OSError
            raise errors.UsageError(
                f'the data of the task {self.config.task} cannot be loaded ({error}); give --include_path=DIR with '
                'a task file that names local data, or set HF_HUB_OFFLINE=0 to download it.'
            ) from None

    return _replaced(ConfigurableTask, 'download', download)


def _located(dataset_kwargs: dict[str, Any] | None, roots: list[pathlib.Path]) -> dict[str, Any] | None:
    if not dataset_kwargs or 'data_files' not in dataset_kwargs:
        return dataset_kwargs

    def locate(value):
        if isinstance(value, dict):
            return {key: locate(entry) for key, entry in value.items()}
        if isinstance(value, list):
            return [locate(entry) for entry in value]
        if pathlib.Path(value).is_absolute() or '://' in value:
            return value
        return next((str(root / value) for root in roots if any(root.glob(value))), value)

    return {**dataset_kwargs, 'data_files': locate(dataset_kwargs['data_files'])}


def task_manager(names: Sequence[str], include_path: pathlib.Path | str | None) -> lm_eval.tasks.TaskManager:
    """An lm-eval TaskManager that knows `names` and all they refer to.

    lm-eval's own reads its 13,000 files, half a minute on a slow machine; here only the
    folders of the tasks wanted are read, where a search of the texts can tell which.
    Raises UsageError naming the nearest task for a name that is nowhere.
    """
    if not names:
        raise errors.UsageError('--tasks=NAME,NAME is missing.')
    own = [] if include_path is None else [pathlib.Path(include_path)]
    if own and not own[0].is_dir():
        raise errors.UsageError(f'--include_path={include_path} is not a folder.')
    folders: list[pathlib.Path] = []
    while True:
        manager = lm_eval.tasks.TaskManager(include_path=[*folders, *own], include_defaults=False)
        missing = _missing(names, manager)
        if not missing:
            return manager
        defined, tags = _official()
        if not missing <= defined.keys():
            break
        folders = sorted({*folders, *(defined[name] for name in missing)})
    known = {*defined, *tags, *manager.all_tasks}
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0)
            raise errors.UsageError(f'--tasks: there is no task {name!r}; the nearest is {near[0]!r}.')
    return lm_eval.tasks.TaskManager(include_path=own)


def _missing(names, manager: lm_eval.tasks.TaskManager) -> set[str]:
    """Names that `manager` does not know, among `names` and the members of their groups."""
    missing, pending = set(), list(names)
    while pending:
        name = pending.pop()
        entry = manager.task_index.get(name)
        if entry is None or not entry.yaml_path:  # a tag is known in full only when every file is
            missing.add(name)
        elif isinstance(members := (entry.cfg or {}).get('task'), list):
            pending += [_member(member) for member in members]
    return missing


def _member(member: str | dict[str, Any]) -> str:
    return member if isinstance(member, str) else member.get('group') or member['task']


@functools.cache
def _official() -> tuple[dict[str, pathlib.Path], set[str]]:
    """Of what comes with lm-eval: name -> folder of every task and group, and the names of all tags."""
    defined, tags = {}, set()
    for path in sorted(pathlib.Path(lm_eval.tasks.__file__).parent.rglob('*')):
        if path.suffix not in ('', '.yaml') or not path.is_file():  # templates have no suffix
            continue
        text = path.read_text(encoding='utf-8')
        for match in _TAGS.findall(text):
            tags.update(re.findall(r'[\w.-]*\w[\w.-]*', match))
        if path.suffix == '.yaml':
            for name in _DEFINITION.findall(text):
                defined.setdefault(name, path.parent)
    return defined, tags
