"""The command `evaluate`: evaluates one model, or makes the paper's tables or figure from several models."""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lm_eval.utils import make_table as describe_result

from eval_bridge import evaluate, opening, protocols
from eval_bridge import parity as parity_lib
from eval_bridge.harness import listing, responses
from eval_bridge.tables import results
from tinyllama_jax import checkpoint, errors
from tinyllama_jax.config import Config
from tinyllama_jax.run import workdir as workdir_lib

_TOKENS = re.compile(r'(?:^|[-_])(\d+(?:\.\d+)?)([bt])$', re.IGNORECASE)
# What answers depend on, besides the protocol and the request.
_ANSWERS_DEPEND_ON = (
    'weights_sha256', 'settings_sha256', 'tokenizer_sha256', 'backend', 'dtype', 'add_bos', 'max_length',
)  # fmt: skip
_LONGEST_NAME = 100  # of the tasks in a file's name
_NO_MODEL = 'evaluate needs --workdir=DIR, the folder of a run, or --model=FOLDER (--models for a table or figure).'
_Source = opening.Run | opening.Folder
_ModelsByTokens = dict[float, tuple[str, _Source]]  # training tokens -> name, model


@dataclasses.dataclass(frozen=True)
class Flags:
    """The command's flags, with their defaults (settings/commands.py says what each means)."""

    model: str | None = None
    models: Sequence[str] = ()
    step: int | None = None
    tasks: Sequence[str] = ()
    table: int | None = None
    figure: int | None = None
    protocol: str = 'paper'
    backend: str | None = None
    parity: bool = False
    include_path: str | None = None
    task_data: str | None = None
    confirm_run_unsafe_code: bool = False
    limit: int | None = None
    log_samples: bool = False
    output: str | None = None


def evaluate_run(config: Config | None, workdir: pathlib.Path | None, **flags: Any) -> None:
    """Evaluates one model (a checkpoint of `workdir` or the folder --model), or makes --table or --figure from several.

    `flags` are the fields of `Flags`. Raises UsageError for what cannot be evaluated, RunError where parity does not
    hold.
    """
    given = Flags(**flags)
    _check_flags(given, workdir)
    output = pathlib.Path(given.output) if given.output else None
    folder = workdir / 'eval' if workdir else None
    if not (given.table or given.figure):
        if given.model:
            source = opening.Folder(pathlib.Path(given.model))
        elif workdir:
            source = opening.Run(workdir, given.step, config)
        else:
            raise errors.UsageError(_NO_MODEL)
        kept = folder or (output and output.parent)
        evaluator = _make_evaluator(given, given.tasks, kept and kept / 'responses')
        evaluate_model(evaluator, source, output, folder, parity=given.parity)
        return
    output = output or folder
    if not output:
        raise errors.UsageError('--output=DIR, where the results go, is missing.')
    models: dict[str, _Source] = dict(_named(given.models or ([given.model] if given.model else [])))
    if not (models or workdir):
        raise errors.UsageError(_NO_MODEL)
    evaluator = _make_evaluator(given, given.tasks or tuple(results.TABLES[given.table or 2]), output / 'responses')
    shown = results.TABLES[given.table or 2]
    if others := [task for task in given.tasks if task not in shown]:
        flag = f'--table={given.table}' if given.table else '--figure=2'
        raise errors.UsageError(
            f'--tasks: {", ".join(others)}: not in {flag}, which shows {", ".join(shown)}; leave them out.'
        )
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise errors.UsageError(f'--output={output} cannot be made a folder: {error.strerror}.') from None
    if given.table:
        if workdir:
            models[workdir.resolve().name] = opening.Run(workdir, given.step, config)
        make_table(evaluator, given.table, models, output)
    else:
        make_figure(evaluator, _by_tokens(models, workdir, config), output)


def _check_flags(flags: Flags, workdir: pathlib.Path | None) -> None:
    """Raises UsageError for flags that contradict each other, or whose value is not possible."""
    several = flags.table or flags.figure
    if flags.parity and several:
        raise errors.UsageError('--parity compares one model; give it without --table and --figure.')
    if flags.limit is not None and flags.limit < 1:
        raise errors.UsageError(f'--limit={flags.limit}: give a number of examples, 1 or more.')
    if flags.models and not several:
        raise errors.UsageError('--models=[NAME=]FOLDER,... belongs to --table or --figure; give --model=FOLDER.')
    if flags.model and workdir and not several:
        raise errors.UsageError(
            f'--workdir={workdir} and --model={flags.model} are two models; give one, or --table=2.'
        )
    if flags.step is not None and not workdir:
        raise errors.UsageError(f"--step={flags.step} is a checkpoint of a run; give the run's --workdir.")
    if flags.output and pathlib.Path(flags.output).is_dir() and not several:
        raise errors.UsageError(f'--output={flags.output} is a folder; give a file to write, FILE.json.')
    if flags.table and flags.figure:
        raise errors.UsageError('--table and --figure are made one at a time; leave one out.')
    if flags.table and flags.table not in results.TABLES:
        raise errors.UsageError(f'--table={flags.table}: only tables {" and ".join(map(str, results.TABLES))} exist.')
    if flags.figure and flags.figure != 2:
        raise errors.UsageError(f'--figure={flags.figure}: only figure 2 exists.')


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Evaluates every model on the same tasks in the same way."""

    protocol: protocols.Protocol
    backend: str | None
    tasks: Sequence[str]
    options: Mapping[str, Any]  # of evaluate.evaluate
    kept: pathlib.Path | None  # the folder that keeps the models' answers

    def evaluate(self, source: _Source, *, backend: str | None = None, label: str = '', **options) -> dict[str, Any]:
        """Evaluates one model and returns the result, whose protocol has the `label` if there is one."""
        with contextlib.ExitStack() as stack:
            opened = stack.enter_context(source.open(self.protocol, backend or self.backend))
            model = opened.model
            if self.kept:
                key = {name: opened.identity[name] for name in _ANSWERS_DEPEND_ON} | {'protocol': self.protocol.name}
                model = responses.Remembering(opened.model, responses.path(self.kept, key))
                stack.callback(model.close)
            identity = opened.identity | ({'label': label} if label else {})
            options = {**self.options, **options}
            return evaluate.evaluate(model, self.tasks, protocol=self.protocol, identity=identity, **options)

    def compare(self, source: _Source) -> dict[str, Any]:
        """Evaluates one model with both backends; returns the first's result, with their differences under `parity`."""
        result = self.evaluate(source, log_samples=True)
        other = 'hf' if result['protocol']['backend'] == 'jax' else 'jax'
        result['parity'] = parity_lib.compare(result, self.evaluate(source, log_samples=True, backend=other))
        if not self.options['log_samples']:
            del result['samples']
        return result


def _make_evaluator(flags: Flags, tasks: Sequence[str], kept: pathlib.Path | None) -> Evaluator:
    """Checks the tasks before a model is opened, so that a mistyped name costs no time."""
    manager = listing.task_manager(tasks, flags.include_path)
    unsafe = flags.confirm_run_unsafe_code
    evaluate.check_tasks(tasks, manager, task_data=flags.task_data, confirm_run_unsafe_code=unsafe)
    options = {name: getattr(flags, name) for name in ('include_path', 'task_data', 'limit', 'log_samples')}
    options |= {'confirm_run_unsafe_code': unsafe, 'manager': manager}
    return Evaluator(protocols.PROTOCOLS[flags.protocol], flags.backend, tasks, options, kept)


def evaluate_model(
    evaluator: Evaluator,
    source: _Source,
    output: pathlib.Path | None,
    folder: pathlib.Path | None,
    *,
    parity: bool = False,
) -> None:
    """Evaluates one model and prints its scores; with `parity`, compares the other backend's answers.

    The result goes to the file `output`, else to `folder` (`_keep`). Raises RunError if parity does not hold.
    """
    source.check_model(for_parity=parity)
    result = evaluator.compare(source) if parity else evaluator.evaluate(source)
    if output:
        evaluate.write(output, result)
    elif folder:
        output = _keep(folder, f'step-{result["protocol"]["step"]}', evaluator.tasks, result)
    print(describe_result(result))
    if output:
        print(f'result: {output}')
    if parity:
        print(parity_lib.describe(result['parity']))
        parity_lib.require(result['parity'])


def _keep(folder: pathlib.Path, name: str, tasks: Sequence[str], result: dict[str, Any]) -> pathlib.Path:
    """Writes a result to NAME.json in `folder`, and returns the path.

    If that file holds other tasks, or was measured in another way, it stays: the new one is named by tasks and settings
    too.
    """

    def settings(result: Mapping[str, Any]) -> list[Any]:
        return [sorted(result['results']), *(result['protocol'].get(field) for field in ('limit', 'name', 'backend'))]

    path = folder / f'{name}.json'
    try:
        same = not path.exists() or settings(json.loads(path.read_text(encoding='utf-8'))) == settings(result)
    except (ValueError, KeyError, TypeError, AttributeError):  # not a result
        same = False
    if not same:
        stamp, listed = result['protocol'], re.sub(r'[^\w.,+-]', '_', ','.join(tasks))
        if len(listed) > _LONGEST_NAME:
            listed = f'{listed[:_LONGEST_NAME]}-{hashlib.sha256(listed.encode()).hexdigest()[:8]}'
        parts = [name, listed, stamp['name'], stamp['backend'], *([f'first{stamp["limit"]}'] if stamp['limit'] else [])]
        path = folder / f'{"-".join(parts)}.json'
    evaluate.write(path, result)
    return path


def make_table(evaluator: Evaluator, table: int, models: Mapping[str, _Source], output: pathlib.Path) -> None:
    """Evaluates `models` (name -> model), writes their results and the paper's table into `output`, and prints it."""
    for source in models.values():  # before the first is evaluated, which takes long
        source.check_model()
    rows = {}
    for number, (name, source) in enumerate(models.items(), start=1):
        print(f'[{number}/{len(models)}] {name}', flush=True)
        result = evaluator.evaluate(source, label=name)
        _keep(output, f'{name}-table{table}', evaluator.tasks, result)
        rows[name] = results.scores(table, result, name)
    with _writing(output):
        print(results.write_table(output, table, rows))


def make_figure(evaluator: Evaluator, models: _ModelsByTokens, output: pathlib.Path) -> None:
    """Evaluates `models`, and writes their results and Figure 2 into `output`."""
    if not models:
        raise errors.UsageError('--figure=2: the run has no checkpoint yet; give --models=NAME=FOLDER,... or train it.')
    for _, source in models.values():  # before the first is evaluated, which takes long
        source.check_model()
    points = {}
    for number, (tokens, (name, source)) in enumerate(sorted(models.items()), start=1):
        print(f'[{number}/{len(models)}] {name}, {tokens:,.0f} tokens', flush=True)
        result = evaluator.evaluate(source, label=name)
        _keep(output, name, evaluator.tasks, result)
        points[tokens] = results.scores(2, result, name)
    with _writing(output):
        print(f'figure: {results.write_figure(output, points)}')


@contextlib.contextmanager
def _writing(folder: pathlib.Path) -> Iterator[None]:
    """Raises RunError naming the file, or `folder`, that could not be written."""
    try:
        yield
    except OSError as error:
        raise errors.RunError(f'{error.filename or folder} could not be written: {error.strerror}.') from None


def _named(models: Sequence[str]) -> dict[str, opening.Folder]:
    """Parses [NAME=]FOLDER into name -> folder; the folder's own name is the default."""
    folders: dict[str, opening.Folder] = {}
    for entry in models:
        name, separator, folder = entry.rpartition('=')
        path = pathlib.Path(folder)
        name = name if separator else path.resolve().name
        if name in folders:
            raise errors.UsageError(f'--models: {name} is given twice; choose other names: --models=NAME=FOLDER.')
        folders[name] = opening.Folder(path)
    return folders


def _by_tokens(folders: Mapping[str, _Source], workdir: pathlib.Path | None, config: Config | None) -> _ModelsByTokens:
    """Returns a run's checkpoints and the folders, whose names must end with their training tokens (-105b, -1T)."""
    models: _ModelsByTokens = {}
    if workdir:
        run = workdir_lib.read_config(workdir)
        tokens_per_step = run.train.global_batch_size * run.model.seq_len
        for step in checkpoint.Checkpointer(workdir / 'checkpoints', read_only=True).steps():
            models[step * tokens_per_step] = f'step-{step}', opening.Run(workdir, step, config)
    for name, source in folders.items():
        match = _TOKENS.search(name)
        if not match:
            raise errors.UsageError(
                f'--models: {name} does not end with its training tokens, as -105b or -1T; name it so: '
                '--models=105b=FOLDER.'
            )
        tokens = float(match[1]) * {'b': 1e9, 't': 1e12}[match[2].lower()]
        if tokens in models:
            raise errors.UsageError(f'--models: {models[tokens][0]} and {name} have the same training tokens.')
        models[tokens] = name, source
    return models
