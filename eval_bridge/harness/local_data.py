"""The tasks' data from local files: a folder in the layout below instead of the hub.

Only where a task's data comes from is changed; prompts and metrics stay the task's own. A file may be plain or gzipped
(.gz), and its records have the fields of the hub's dataset.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets
from lm_eval.api.task import ConfigurableTask

from eval_bridge.harness import records
from tinyllama_jax import errors

FORMATS = ('arrow', 'csv', 'json', 'parquet', 'text')  # dataset_path of tasks whose data_files are files


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Where a dataset's splits lie (`name` is its configuration, as astronomy); what each record has, of what type."""

    path: str
    fields: Mapping[str, Any]
    fault: Callable[[Mapping[str, Any]], str | None] = lambda record: None  # of a record (records.py)
    inside: str | None = None  # the name under which a file that is one JSON object has the records
    least: Mapping[str, int] = dataclasses.field(default_factory=dict)  # records of a split


_SPLITS = ('train', 'dev', 'validation', 'test')
_NUMBER = int | str  # of an answer; the hub's datasets have both
_KINDS = {str: 'text', int: 'number', _NUMBER: 'number', list: 'list', dict: 'object'}
_ARC = {'question': str, 'choices': dict, 'answerKey': str}
_LAYOUTS = {  # by the hub's name, with the configuration's where it decides
    'Rowan/hellaswag': _Layout(
        'hellaswag/{split}.jsonl',
        {'activity_label': str, 'ctx_a': str, 'ctx_b': str, 'endings': list, 'label': _NUMBER},
        records.hellaswag,
    ),
    'allenai/openbookqa': _Layout(
        'openbookqa/{split}.jsonl', {'question_stem': str, 'choices': dict, 'answerKey': str}, records.lettered
    ),
    'allenai/winogrande': _Layout(
        'winogrande/{split}.jsonl',
        {'sentence': str, 'option1': str, 'option2': str, 'answer': str},
        records.winogrande,
    ),
    'allenai/ai2_arc/ARC-Easy': _Layout('arc_easy/{split}.jsonl', _ARC, records.lettered),
    'allenai/ai2_arc/ARC-Challenge': _Layout('arc_challenge/{split}.jsonl', _ARC, records.lettered),
    'aps/super_glue/boolq': _Layout(
        'boolq/{split}.jsonl', {'passage': str, 'question': str, 'label': _NUMBER}, records.boolq
    ),
    'baber/piqa': _Layout(
        'piqa/{split}.jsonl', {'goal': str, 'sol1': str, 'sol2': str, 'label': _NUMBER}, records.piqa
    ),
    'cais/mmlu': _Layout(
        'mmlu/{name}_{split}.jsonl',
        {'question': str, 'subject': str, 'choices': list, 'answer': int},
        records.mmlu,
        least={'dev': 5},  # the examples
    ),
    'SaylorTwift/bbh': _Layout('bbh/{name}.json', {'input': str, 'target': str}, records.bbh, inside='examples'),
    'EleutherAI/drop': _Layout(
        'drop/{split}.jsonl',
        {'query_id': str, 'passage': str, 'question': str, 'answer': dict, 'validated_answers': dict},
        records.drop,
    ),
    'openai/openai_humaneval': _Layout('humaneval/HumanEval.jsonl', {'prompt': str, 'test': str, 'entry_point': str}),
}


def check(folder: pathlib.Path | str, tasks: Mapping[str, Mapping[str, Any]]) -> None:
    """Makes sure that `folder` has the data of `tasks` (name -> task file's content), of those that it can hold.

    Raises UsageError naming every file that is missing: a mean over fewer tasks would be another number.
    """
    if not pathlib.Path(folder).is_dir():
        raise errors.UsageError(f'--task_data={folder} is not a folder.')
    missing: dict[str, list[str]] = {}
    descriptions = {}
    for task, config in tasks.items():
        layout = _layout(config)
        for split in _needed(config) if layout else ():
            if _find(folder, path := _path(layout, config, split)) is None:
                missing.setdefault(task, []).append(path)
                descriptions[_describe(layout)] = None
    if missing:
        rest = [task for task in tasks if task not in missing]
        text = ', '.join(dict.fromkeys(path for paths in missing.values() for path in paths))
        others = f', or name only tasks whose data is there: --tasks={",".join(rest)}' if rest else ''
        raise errors.UsageError(
            f'--task_data={folder} lacks the data of {len(missing)} of {len(tasks)} tasks, and a mean over the others '
            f'is another number. Put these files there: {text} ({"; ".join(descriptions)}){others}.'
        )


def downloader(
    original: Callable, include_path: pathlib.Path | str | None, folder: pathlib.Path | str | None, used: dict[str, Any]
) -> Callable:
    """What takes the place of ConfigurableTask.download: local files where `folder` has them.

    Relative `data_files` of tasks are looked up from the current folder, then from those that hold `include_path` and
    `folder`. Adds to `used`, by task, the files from `folder` (split -> file, its hash).
    """
    roots = [pathlib.Path.cwd(), *(pathlib.Path(path).resolve().parent for path in (include_path, folder) if path)]

    def download(self, dataset_kwargs=None, **kwargs):
        layout, files = _layout(vars(self.config)), {}
        if self.DATASET_PATH in FORMATS:
            dataset_kwargs = _located(dataset_kwargs, roots)
        elif folder and layout:
            files = _files(folder, layout, vars(self.config))
            used[self.config.task] = {split: _stamp(path) for split, path in files.items()}
            dataset_kwargs = _take(self, layout, files)
        try:
            original(self, dataset_kwargs, **kwargs)
        # A ConnectionError is an OSError, bytes that are no text a ValueError; an empty file ends the iteration.
        except (OSError, EOFError, ValueError, StopIteration, datasets.exceptions.DatasetsError) as error:
            raise _unreadable(self, layout, dataset_kwargs, error) from None
        if files:
            _validate(self.dataset, layout, files)

    return download


def from_validation(config: Mapping[str, Any], folder: pathlib.Path | str) -> bool:
    """Whether a task that takes its examples from its training split finds none in `folder`."""
    layout, split = _layout(config), config.get('training_split')
    if not (layout and split) or config.get('fewshot_split'):
        return False
    return _find(folder, _path(layout, config, split)) is None


def _layout(config: Mapping[str, Any]) -> _Layout | None:
    path, name = config.get('dataset_path'), config.get('dataset_name')
    return _LAYOUTS.get(f'{path}/{name}') or _LAYOUTS.get(str(path))


def _needed(config: Mapping[str, Any]) -> list[str]:
    """The splits that a task cannot do without, of those that a dataset has (not of those that a task makes)."""
    wanted = [config.get('test_split') or config.get('validation_split'), config.get('fewshot_split')]
    return [split for split in wanted if split in _SPLITS]


def _path(layout: _Layout, config: Mapping[str, Any], split: str) -> str:
    return layout.path.format(name=config.get('dataset_name'), split=split)


def _find(folder: pathlib.Path | str, path: str) -> pathlib.Path | None:
    found = (pathlib.Path(folder) / f'{path}{suffix}' for suffix in ('', '.gz'))
    return next((file.resolve() for file in found if file.is_file()), None)


def _describe(layout: _Layout) -> str:
    kind = f'a JSON object with a list {layout.inside}' if layout.inside else 'JSON lines'
    return f'{kind}, or .gz of it, its records with {", ".join(layout.fields)}'


def _files(folder: pathlib.Path | str, layout: _Layout, config: Mapping[str, Any]) -> dict[str, pathlib.Path]:
    """Split -> file: all that are needed, and those others that are there."""
    check(folder, {config['task']: config})
    others = [config.get('training_split'), config.get('validation_split')]
    splits = dict.fromkeys(split for split in (*_needed(config), *others) if split)
    found = {split: _find(folder, _path(layout, config, split)) for split in splits}
    return {split: path for split, path in found.items() if path}


def _stamp(path: pathlib.Path) -> dict[str, str]:
    return {'file': f'{path.parent.name}/{path.name}', 'sha256': hashlib.sha256(path.read_bytes()).hexdigest()}


def _take(task: ConfigurableTask, layout: _Layout, files: Mapping[str, pathlib.Path]) -> dict[str, Any]:
    """Makes a task load `files`, and forget the splits that are not there; returns its arguments of load_dataset."""
    task.DATASET_PATH, task.DATASET_NAME = 'json', None
    for setting in ('training_split', 'validation_split'):
        if getattr(task.config, setting) not in files:
            setattr(task.config, setting, None)
    inside = {'field': layout.inside} if layout.inside else {}
    return {'data_files': {split: str(path) for split, path in files.items()}, **inside}


def _located(dataset_kwargs: dict[str, Any] | None, roots: Sequence[pathlib.Path]) -> dict[str, Any] | None:
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


def _unreadable(task: ConfigurableTask, layout: _Layout | None, dataset_kwargs, error: Exception) -> errors.UsageError:
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    config = vars(task.config)
    if task.DATASET_PATH in FORMATS:
        advice = f'its files are {(dataset_kwargs or {}).get("data_files")}'
    elif layout:
        files = ', '.join(dict.fromkeys(_path(layout, config, split) for split in _needed(config)))
        advice = f'put {files} ({_describe(layout)}) into a folder and give --task_data=FOLDER'
    else:
        advice = 'give --include_path=DIR with a task file that names local data'
    return errors.UsageError(
        f'the data of the task {task.config.task} cannot be loaded ({str(cause) or "no records"}); {advice}, or set '
        'HF_HUB_OFFLINE=0 to download what the hub has.'
    )


def _validate(dataset, layout: _Layout, files: Mapping[str, pathlib.Path]) -> None:
    """Raises UsageError for records without a field, or with what the task cannot take, and for too few of them."""
    for split, path in files.items():
        rows = dataset[split]
        if len(rows) < (least := layout.least.get(split, 1)):
            found = f'{len(rows)} records, and {least} are needed' if rows else 'no records'
            raise errors.UsageError(f'{path} has {found}.')
        for name, kind in layout.fields.items():
            values = rows[name] if name in rows.column_names else [None]
            wrong = next((number for number, value in enumerate(values) if not isinstance(value, kind)), None)
            if wrong is not None:
                what = f'{name} is {values[wrong]!r}, which is no {_KINDS[kind]} ({_describe(layout)})'
                raise errors.UsageError(f'{path}, record {wrong + 1}: {what}.')
        for number, record in enumerate(rows, start=1):
            if fault := layout.fault(record):
                raise errors.UsageError(f'{path}, record {number}: {fault}.')
