"""Lists the tasks that names stand for, and finds the files of tasks, groups and tags.

lm-eval's own factory walks the groups, because it alone knows every form in which they can be written. Where it would
build a task, the task's configuration is noted instead.
"""

import copy
import dataclasses
import difflib
import functools
import logging
import pathlib
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import lm_eval.tasks
from lm_eval.api import registry
from lm_eval.config.task import TaskConfig
from lm_eval.tasks import _factory
from lm_eval.tasks._index import Entry, Kind
from lm_eval.tasks._yaml_loader import load_yaml

from eval_bridge.harness import patches
from tinyllama_jax import errors

OURS = pathlib.Path(__file__).parents[1] / 'tasks'
_GENERATED = ('instructeval_mmlu', 'instructeval_bbh')  # groups whose members share the file _NAME, each with a dataset
# In the text of a task file: the name that it defines, and what it lists under `tag` and `include`.
_DEFINITION = re.compile(r'^["\']?(?:task|group)["\']?: *["\']?([^\s"\'#]+)', re.MULTILINE)
_LIST = re.compile(r'^["\']?(tag|include)["\']?:(.*(?:\n *- *.*)*)', re.MULTILINE)
_LISTED = re.compile(r'[\w./-]*\w[\w.-]*')


@dataclasses.dataclass(frozen=True)
class Declared:
    """A task as lm-eval would build it.

    Attributes:
      name: the task's name in results.
      config: the content of its file with the changes of its groups. Functions are paths in texts, or resolved.
      file: its file; of a task that stands in a group's file, that file; None: it has none.
      folders: those of its file, of the files that this includes, and then of the groups around it.
    """

    name: str
    config: Mapping[str, Any]
    file: pathlib.Path | None
    folders: tuple[pathlib.Path, ...] = ()


class _Lister(_factory.TaskFactory):
    """Notes in `found` the tasks that lm-eval's factory would build; `lenient`: with an index that lacks some."""

    def __init__(self, *, resolve: bool = False, lenient: bool = False):
        super().__init__()
        self.found: list[Declared] = []
        self._resolve, self._lenient = resolve, lenient
        self._files: list[pathlib.Path | None] = []  # of the groups around

    def build(self, entry, *, overrides=None, registry):
        self._files.append(entry.yaml_path)
        try:
            return super().build(entry, overrides=overrides, registry=registry)
        finally:
            self._files.pop()

    def note(self, config: dict[str, Any], file: pathlib.Path | None = None) -> '_Noted':
        """Stands in for ConfigurableTask, which the factory makes of a task that stands in a group's file."""
        if 'class' not in config and not self._lenient:
            TaskConfig(**copy.deepcopy(config))  # raises TypeError for an unknown field
            if file is None and not (config.get('dataset_path') or config.get('custom_dataset')):
                raise errors.UsageError(
                    f'{self._files[-1]}: there is no task {config["task"].rpartition("::")[2]!r}, and the group does '
                    'not define it (dataset_path is missing); correct the name, or define the task.'
                )
        files = [each for each in (file, *reversed(self._files)) if each]
        folders = () if self._lenient else dict.fromkeys(folder for each in files for folder in _folders(each))
        self.found.append(Declared(config['task'], config, file or self._files[-1], tuple(folders)))
        return _Noted(config['task'])

    def _build_task(self, entry: Entry, overrides: dict[str, Any] | None) -> Any:
        config = self._load_full_config(entry, overrides)
        for key in ('tag', 'group', 'task_list'):  # as lm-eval's factory does
            config.pop(key, None)
        return self.note(config, entry.yaml_path)

    def _build_group(self, group_name, raw_cfg, overrides, registry):
        if not self._lenient and not (isinstance(raw_cfg.get('task'), list) and raw_cfg['task']):
            raise ValueError(f'the group {group_name} has no list of tasks, but {raw_cfg.get("task")!r}')
        if not self._resolve:  # lm-eval would refuse the path of a function there
            raw_cfg = {name: value for name, value in raw_cfg.items() if name != 'aggregate_metric_list'}
        return super()._build_group(group_name, raw_cfg, overrides, registry)

    def _load_full_config(self, entry, overrides=None):
        unresolved = super()._load_full_config(dataclasses.replace(entry, yaml_path=None), overrides)
        if not self._resolve:
            return unresolved
        try:
            return super()._load_full_config(entry, overrides)
        except (Exception, SystemExit) as error:  # whatever a module raises while it is imported
            if unresolved.get('unsafe_code', False) is not False:
                return unresolved  # is refused by programs.py, which says more
            raise _unusable(entry, error) from None


def _folders(file: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields the folder of a task's or group's file, and those of the files that it includes."""
    yield file.parent
    included = load_yaml(file, resolve_func=False, recursive=False).get('include') or []
    for name in included if isinstance(included, list) else [included]:
        yield from _folders((file.parent / name).resolve())


@dataclasses.dataclass(frozen=True)
class _Noted:
    """What a group gets as its member."""

    task_name: str


class _Registry(dict):
    """lm-eval's index of tasks, which notes the names that the factory looks for."""

    def __init__(self, index: Mapping[str, Entry]):
        super().__init__(index)
        self.asked: dict[str, None] = {}

    def __contains__(self, name: object) -> bool:
        self.asked[str(name)] = None
        return super().__contains__(name)


def declared(names: Sequence[str], manager: lm_eval.tasks.TaskManager, *, resolve: bool = False) -> list[Declared]:
    """Returns the tasks that lm-eval would build for `names`, in its order; one may come several times.

    Args:
      resolve: import the modules of the tasks' functions and put the functions into the configurations.

    Raises UsageError, naming task or group, for a file that lm-eval could not build and for a task that belongs to two
    of `names`; with `resolve` also for a module that cannot be imported.
    """
    owners: dict[str, str] = {}
    tasks = []
    for name in dict.fromkeys(names):
        found = _walk(name, _Registry(manager.task_index), _Lister(resolve=resolve))
        for task in found:
            owner = name if manager.task_index[name].kind is Kind.GROUP else task.name
            if owner != owners.setdefault(task.name, owner):
                raise errors.UsageError(
                    f'--tasks: {task.name} belongs to both {owners[task.name]} and {owner}; evaluate one at a time.'
                )
        tasks += found
    return tasks


def unknown(config: Mapping[str, Any]) -> str | None:
    """Returns the metric, aggregation or filter of a task that lm-eval would miss only when it scores, if there is one.

    The functions in `config` must be resolved.
    """
    own = config.get('process_results') or config.get('class')  # computes metrics of any name
    computed = config.get('output_type', 'generate_until') == 'generate_until' and not own
    try:
        for entry in config.get('metric_list') or ():
            name, aggregation = entry['metric'], entry.get('aggregation')
            hub = entry.get('hf_evaluate') is True
            with patches.replaced(registry.eval_logger, 'disabled', True):  # says less than the refusal
                if computed and not (callable(name) or registry.get_metric(name, hub)):
                    return f'metric {name!r}' + (' of the package evaluate' if hub else '')
            if isinstance(aggregation, str) and not registry.get_aggregation(aggregation):
                return f'aggregation {aggregation!r}'
        steps = [step['function'] for filters in config.get('filter_list') or () for step in filters['filter']]
        names = (name for name in steps if not callable(name) and name not in registry.filter_registry)
        return next((f'filter {name!r}' for name in names), None)
    except (AttributeError, KeyError, TypeError):
        return 'such form of metric_list or filter_list'


def _walk(name: str, registry: _Registry, lister: _Lister) -> list[Declared]:
    if name not in registry:
        return []
    try:
        with patches.replaced(_factory, 'ConfigurableTask', lister.note):
            lister.build(registry[name], registry=registry)
    except errors.Failure:
        raise
    except (Exception, SystemExit) as error:
        raise errors.UsageError(
            f'the task or group {name} is not one that lm-eval can build ({type(error).__name__}: '
            f'{errors.first_line(error)}); mend its file, or leave it out.'
        ) from None
    return lister.found


def _unusable(entry: Entry, error: BaseException) -> errors.UsageError:
    """Returns the error for a task whose functions cannot be had because of `error`."""
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(cause, ModuleNotFoundError) and cause.name:
        return errors.UsageError(
            f'the task {entry.name} needs the package {cause.name}, which is not installed; install it, or leave the '
            'task out.'
        )
    return errors.UsageError(
        f'the task {entry.name}: what {entry.yaml_path} names cannot be imported ({type(cause).__name__}: '
        f'{errors.first_line(cause)}); mend it, or leave the task out.'
    )


def task_manager(names: Sequence[str], include_path: pathlib.Path | str | None) -> lm_eval.tasks.TaskManager:
    """Returns an lm-eval TaskManager that knows `names` and everything they refer to.

    lm-eval's own manager reads 13,000 files, half a minute on a slow machine. This one reads only the folders of the
    tasks wanted, which it finds by searching the files' text. Raises UsageError for an unknown name, naming the
    nearest task.
    """
    logging.getLogger('lm_eval').setLevel(logging.ERROR)
    if not names:
        raise errors.UsageError('--tasks=NAME,NAME is missing.')
    if include_path is not None and not pathlib.Path(include_path).is_dir():
        raise errors.UsageError(f'--include_path={include_path} is not a folder.')
    own: list[pathlib.Path | str] = [OURS, *([] if include_path is None else [pathlib.Path(include_path)])]
    official = _official()
    folders: set[pathlib.Path] = set()  # those of lm-eval's that are read
    while True:
        paths: list[pathlib.Path | str] = [*sorted(folders), *own]
        manager = _with_generated(lm_eval.tasks.TaskManager(include_path=paths, include_defaults=False))
        registry = _Registry(manager.task_index)
        for name in names:
            _walk(name, registry, _Lister(lenient=True))
        missing = [
            name
            for name in registry.asked
            # A tag's tasks are all known only when its folder was read.
            if name in official
            and (name not in manager.task_index or manager.task_index[name].kind is Kind.TAG)
            and official[name] not in folders
        ]
        if not missing:
            break
        wanted = {official[name] for name in missing}
        if None in wanted:  # a tag of several folders: only lm-eval's full index has them all
            manager = _with_generated(lm_eval.tasks.TaskManager(include_path=own))
            break
        folders.update(path for path in wanted if path)
    for name in names:
        if name not in manager.task_index:
            raise _unknown(name, {*official, *manager.task_index}, include_path)
    return manager


def _unknown(name: str, known: set[str], include_path: pathlib.Path | str | None) -> errors.UsageError:
    """Returns the error for a name that no task file defines; lm-eval passes over a file that it cannot read."""
    for path in sorted(pathlib.Path(include_path).rglob('*.yaml')) if include_path is not None else ():
        try:
            load_yaml(path, resolve_func=False)
        except Exception as error:  # of yaml or of the file system
            return errors.UsageError(
                f'--tasks: there is no task {name!r}, and the task file {path} cannot be read '
                f'({" ".join(str(error).split())}); mend it.'
            )
    near = difflib.get_close_matches(name, known, n=1, cutoff=0)
    return errors.UsageError(f'--tasks: there is no task {name!r}; the nearest is {near[0]!r}.')


def _with_generated(manager: lm_eval.tasks.TaskManager) -> lm_eval.tasks.TaskManager:
    """Adds the members of the groups `_GENERATED`: GROUP_member is the file _GROUP with the dataset `member`."""
    for group in _GENERATED:
        shared = load_yaml(OURS / f'_{group}')
        for name in load_yaml(OURS / f'{group}.yaml')['task']:
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
