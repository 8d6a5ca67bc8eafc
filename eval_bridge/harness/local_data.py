"""Reads the tasks' data from a local folder instead of the hub; a dataset is one row of `DATASETS`.

Only the source of a task's data changes; prompts and metrics stay the task's own. A file may be plain or gzipped (.gz),
and its examples have the fields of the hub's dataset.
"""

import contextlib
import dataclasses
import hashlib
import pathlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import datasets
from lm_eval.api.task import ConfigurableTask

from eval_bridge.harness import examples, listing, own_text, patches
from eval_bridge.harness.examples import gap, index, non_blank, non_empty, one_of, texts
from tinyllama_jax import errors

FORMATS = ('arrow', 'csv', 'json', 'parquet', 'text')  # values of dataset_path for tasks whose data_files are files


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Where a dataset's files are in the folder, and what each of its examples must have."""

    path: str  # of a split's file; {name} is the dataset's configuration, such as astronomy
    fields: Mapping[str, Any]  # field -> type
    rules: Sequence[examples.Rule] = ()  # what else must hold for an example
    inside: str | None = None  # the key of the list of examples in a file that is one JSON object; None: JSON lines
    least: Mapping[str, int] = dataclasses.field(default_factory=dict)  # split -> least number of examples, if not 1

    def file(self, config: Mapping[str, Any], split: str) -> str:
        """Returns the path of a split's file within the folder; `config` is the content of the task's file."""
        return self.path.format(name=config.get('dataset_name'), split=split)

    def __str__(self) -> str:
        kind = f'a JSON object with a list {self.inside}' if self.inside else 'JSON lines'
        return f'{kind}, or .gz of it, its examples with {", ".join(self.fields)}'


_SPLITS = ('train', 'dev', 'validation', 'test')
_NUMBER = int | str  # an answer's number; the hub's datasets have both types
_KINDS = {str: 'a text', int: 'a number', _NUMBER: 'a number', list: 'a list', dict: 'an object'}
_ARC = {'question': str, 'choices': dict, 'answerKey': str}
# The hub's name of a dataset, with its configuration's where that decides -> its files. A new one is one row.
DATASETS = {
    'Rowan/hellaswag': Dataset(
        'hellaswag/{split}.jsonl',
        {'activity_label': str, 'ctx_a': str, 'ctx_b': str, 'endings': list, 'label': _NUMBER},
        (non_empty('endings'), index('label', 'endings')),
    ),
    'allenai/openbookqa': Dataset(
        'openbookqa/{split}.jsonl', {'question_stem': str, 'choices': dict, 'answerKey': str}, (examples.lettered,)
    ),
    'allenai/winogrande': Dataset(
        'winogrande/{split}.jsonl',
        {'sentence': str, 'option1': str, 'option2': str, 'answer': str},
        (gap('sentence'), non_empty('option1', 'option2'), one_of('answer', '1', '2')),
    ),
    'allenai/ai2_arc/ARC-Easy': Dataset('arc_easy/{split}.jsonl', _ARC, (examples.lettered,)),
    'allenai/ai2_arc/ARC-Challenge': Dataset('arc_challenge/{split}.jsonl', _ARC, (examples.lettered,)),
    'aps/super_glue/boolq': Dataset(
        'boolq/{split}.jsonl', {'passage': str, 'question': str, 'label': _NUMBER}, (index('label', 2),)
    ),
    'baber/piqa': Dataset(
        'piqa/{split}.jsonl',
        {'goal': str, 'sol1': str, 'sol2': str, 'label': _NUMBER},
        (non_empty('sol1', 'sol2'), index('label', 2)),
    ),
    'cais/mmlu': Dataset(
        'mmlu/{name}_{split}.jsonl',
        {'question': str, 'subject': str, 'choices': list, 'answer': int},
        (texts('choices', 4), index('answer', 4)),
        least={'dev': 5},  # the few-shot examples
    ),
    'SaylorTwift/bbh': Dataset(
        'bbh/{name}.json',
        {'input': str, 'target': str},
        (non_empty('input'), non_blank('target')),  # an empty target would match every answer
        inside='examples',
    ),
    'EleutherAI/drop': Dataset(
        'drop/{split}.jsonl',
        {'query_id': str, 'passage': str, 'question': str, 'answer': dict, 'validated_answers': dict},
        (examples.drop,),
    ),
    'openai/openai_humaneval': Dataset('humaneval/HumanEval.jsonl', {'prompt': str, 'test': str, 'entry_point': str}),
}


def require_files(folder: pathlib.Path | str, tasks: Mapping[str, Mapping[str, Any]]) -> None:
    """Checks that `folder` has the data of those `tasks` (name -> the task file's content) that `DATASETS` knows.

    Raises UsageError naming every missing file: a mean over fewer tasks would be another number.
    """
    if not pathlib.Path(folder).is_dir():
        raise errors.UsageError(f'--task_data={folder} is not a folder.')
    missing: dict[str, list[str]] = {}
    kinds = {}
    for task, config in tasks.items():
        if (dataset := _dataset(config)) is None:
            continue
        for split in _needed_splits(config):
            if _find(folder, file := dataset.file(config, split)) is None:
                missing.setdefault(task, []).append(file)
                kinds[str(dataset)] = None
    if missing:
        rest = [task for task in tasks if task not in missing]
        files = ', '.join(dict.fromkeys(file for files in missing.values() for file in files))
        others = f', or name only tasks whose data is there: --tasks={",".join(rest)}' if rest else ''
        raise errors.UsageError(
            f'--task_data={folder} lacks the data of {len(missing)} of {len(tasks)} tasks, and a mean over the others '
            f'is another number. Put these files there: {files} ({"; ".join(kinds)}){others}.'
        )


@contextlib.contextmanager
def loading(
    tasks: Sequence[listing.Declared],
    include_path: pathlib.Path | str | None,
    folder: pathlib.Path | str | None,
    used: dict[str, Any],
) -> Iterator[None]:
    """A context in which `tasks` load their data from local files where `folder` or their own file names some.

    Relative `data_files` and folders of a task are looked up from the current folder, then from those that contain
    `include_path` and `folder`, then from those of the task's files (`listing.Declared`). `used` gets for each task the
    files taken from `folder`: split -> file and hash. Files are read anew, because the cache of `datasets` knows them
    by less than their content.
    """
    roots = [pathlib.Path.cwd(), *(pathlib.Path(path).resolve().parent for path in (include_path, folder) if path)]
    beside = {task.name: task.folders for task in tasks}
    original = ConfigurableTask.download

    def download(self, dataset_kwargs=None, **kwargs):
        config = vars(self.config)
        dataset, files = _dataset(config), {}
        places = [*roots, *beside.get(self.config.task, ())]
        whole = next((path for place in places if (path := place / str(self.DATASET_PATH)).is_dir()), None)
        if self.DATASET_PATH in FORMATS:
            dataset_kwargs = _locate_files(dataset_kwargs, places)
        elif folder and dataset:
            files = _files(folder, dataset, config)
            used[self.config.task] = {
                split: {
                    'file': f'{path.parent.name}/{path.name}',
                    'sha256': hashlib.sha256(path.read_bytes()).hexdigest(),
                }
                for split, path in files.items()
            }
            self.DATASET_PATH, self.DATASET_NAME = 'json', None
            for setting in ('training_split', 'validation_split'):  # the task forgets a split that the folder lacks
                if getattr(self.config, setting) not in files:
                    setattr(self.config, setting, None)
            inside = {'field': dataset.inside} if dataset.inside else {}
            dataset_kwargs = {'data_files': {split: str(path) for split, path in files.items()}, **inside}
        elif whole:
            self.DATASET_PATH = str(whole)
        if whole or self.DATASET_PATH in FORMATS:
            dataset_kwargs = {**(dataset_kwargs or {}), 'cache_dir': cache}
        try:
            original(self, dataset_kwargs, **kwargs)
        # A ConnectionError is an OSError, invalid UTF-8 a ValueError; an empty file raises StopIteration.
        except (OSError, EOFError, ValueError, StopIteration, datasets.exceptions.DatasetsError) as error:
            raise _unreadable(self, dataset, dataset_kwargs, error) from None
        if dataset and files:
            _check_examples(self.dataset, dataset, files)

    with (
        tempfile.TemporaryDirectory() as cache,
        own_text.kept(),
        patches.replaced(ConfigurableTask, 'download', download),
    ):
        yield


def from_validation(config: Mapping[str, Any], folder: pathlib.Path | str) -> bool:
    """Returns whether a task wants few-shot examples from its training split and `folder` does not have that."""
    dataset, split = _dataset(config), config.get('training_split')
    if not (dataset and split) or config.get('fewshot_split'):
        return False
    return _find(folder, dataset.file(config, split)) is None


def _dataset(config: Mapping[str, Any]) -> Dataset | None:
    path, name = config.get('dataset_path'), config.get('dataset_name')
    return DATASETS.get(f'{path}/{name}') or DATASETS.get(str(path))


def _needed_splits(config: Mapping[str, Any]) -> list[str]:
    """Returns the splits that a task cannot run without, except those that the task makes itself."""
    wanted = [config.get('test_split') or config.get('validation_split'), config.get('fewshot_split')]
    return [split for split in wanted if split in _SPLITS]


def _find(folder: pathlib.Path | str, file: str) -> pathlib.Path | None:
    candidates = (pathlib.Path(folder) / f'{file}{suffix}' for suffix in ('', '.gz'))
    return next((path.resolve() for path in candidates if path.is_file()), None)


def _files(folder: pathlib.Path | str, dataset: Dataset, config: Mapping[str, Any]) -> dict[str, pathlib.Path]:
    """Returns split -> file for the splits that a task needs, and for its others that exist."""
    require_files(folder, {config['task']: config})
    splits = [*_needed_splits(config), config.get('training_split'), config.get('validation_split')]
    files = {split: _find(folder, dataset.file(config, split)) for split in splits if split}
    return {split: path for split, path in files.items() if path}


def _locate_files(dataset_kwargs: dict[str, Any] | None, roots: Sequence[pathlib.Path]) -> dict[str, Any]:
    """Returns `dataset_kwargs` with relative `data_files` and `data_dir` looked up in `roots`; others are kept."""

    def locate(value):
        if isinstance(value, dict):
            return {key: locate(entry) for key, entry in value.items()}
        if isinstance(value, list):
            return [locate(entry) for entry in value]
        if not isinstance(value, str) or pathlib.Path(value).is_absolute() or '://' in value:
            return value
        return next((str(root / value) for root in roots if any(root.glob(value))), value)

    return {
        name: locate(value) if name in ('data_files', 'data_dir') and value else value
        for name, value in (dataset_kwargs or {}).items()
    }


def _unreadable(task: ConfigurableTask, dataset: Dataset | None, dataset_kwargs, error: Exception) -> errors.UsageError:
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    if task.DATASET_PATH in FORMATS:
        advice = f'its files are {(dataset_kwargs or {}).get("data_files")}'
    elif dataset:
        config = vars(task.config)
        files = ', '.join(dict.fromkeys(dataset.file(config, split) for split in _needed_splits(config)))
        advice = f'put {files} ({dataset}) into a folder and give --task_data=FOLDER'
    else:
        advice = 'give --include_path=DIR with a task file that names local data'
    return errors.UsageError(
        f'the data of the task {task.config.task} cannot be loaded ({str(cause) or "no examples"}); {advice}, or set '
        'HF_HUB_OFFLINE=0 to download what the hub has.'
    )


def _check_examples(splits, dataset: Dataset, files: Mapping[str, pathlib.Path]) -> None:
    """Raises UsageError for too few examples, and for one without a field, of another type or against a rule."""
    for split, path in files.items():
        loaded = splits[split]
        if len(loaded) < (least := dataset.least.get(split, 1)):
            count = f'{len(loaded)} examples, and {least} are needed' if loaded else 'no examples'
            raise errors.UsageError(f'{path} has {count}.')
        for name, kind in dataset.fields.items():
            values = loaded[name] if name in loaded.column_names else [None]
            wrong = next((number for number, value in enumerate(values) if not isinstance(value, kind)), None)
            if wrong is not None:
                fault = f'{name} is {values[wrong]!r}, which is not {_KINDS[kind]} ({dataset})'
                raise errors.UsageError(f'{path}, example {wrong + 1}: {fault}.')
        for number, example in enumerate(loaded, start=1):
            for rule in dataset.rules:
                if fault := rule(example):
                    raise errors.UsageError(f'{path}, example {number}: {fault}.')
