"""The command `evaluate`: one model on given tasks, or the paper's tables and figure of several."""

import contextlib
import dataclasses
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from lm_eval.utils import make_table

from eval_bridge import evaluate, opening, protocols
from eval_bridge import parity as parity_lib
from eval_bridge.harness import responses
from eval_bridge.tables import results
from tinyllama_jax import checkpoint, errors
from tinyllama_jax.config import Config
from tinyllama_jax.run import workdir

_TOKENS = re.compile(r'(?:^|[-_])(\d+(?:\.\d+)?)([bt])$', re.IGNORECASE)
_OF_ANSWERS = ('weights_sha256', 'tokenizer_sha256', 'backend', 'dtype', 'add_bos', 'max_length')


@dataclasses.dataclass(frozen=True)
class _How:
    """What the flags say of every model alike; `kept` is where its answers are kept, None for nowhere."""

    protocol: protocols.Protocol
    backend: str | None
    tasks: Sequence[str]
    options: dict[str, Any]  # of evaluate.evaluate
    kept: pathlib.Path | None


def evaluate_run(
    folder: pathlib.Path | None,
    config: Config | None,
    *,
    model: str | None = None,
    models: Sequence[str] = (),
    step: int | None = None,
    tasks: Sequence[str] = (),
    table: int | None = None,
    figure: int | None = None,
    protocol: str = 'paper',
    backend: str | None = None,
    parity: bool = False,
    include_path: str | None = None,
    task_data: str | None = None,
    confirm_run_unsafe_code: bool = False,
    limit: int | None = None,
    log_samples: bool = False,
    output: str | None = None,
) -> None:
    """Evaluates a workdir's checkpoint, the Hugging Face folder `model`, or several; prints a table.

    The result of one model goes to `output`, by default WORKDIR/eval/step-STEP.json. With `table` (2, 3) or
    `figure` (2) `output` is a folder, of a workdir by default WORKDIR/eval, and each of `models`,
    [NAME=]FOLDER, is evaluated; without them the workdir's checkpoint, or for the figure all of them.

    Raises UsageError for what cannot be evaluated, RunError where parity does not hold.
    """
    _check(folder, model, models, table, figure, output, parity, limit, step)
    tasks = tasks or tuple(results.TABLES.get(table or figure or 0, ()))
    of_tasks = {'task_data': task_data, 'confirm_run_unsafe_code': confirm_run_unsafe_code}
    options = {'include_path': include_path, 'limit': limit, 'log_samples': log_samples, **of_tasks}
    options['manager'] = evaluate.task_manager(tasks, include_path)  # so that a mistyped name costs no time
    evaluate.check_tasks(tasks, options['manager'], **of_tasks)
    how = _How(protocols.PROTOCOLS[protocol], backend, tasks, options, None)
    if table or figure:
        place = pathlib.Path(output) if output else folder / 'eval'
        how = dataclasses.replace(how, kept=place / 'responses')
        _check_shown(tasks, table)
        _make_folder(place)
        sources = _named(models or ([model] if model else []))
        if table and folder:
            sources[folder.resolve().name] = opening.Run(folder, step, config)
        points = {} if table else _by_tokens(sources, _checkpoints(folder, config) if folder else {})
        for each in sources.values():  # before the first is evaluated, which takes long
            each.check()
        print(_table(how, place, sources, table) if table else f'figure: {_figure(how, place, points)}')
        return
    source = opening.Folder(pathlib.Path(model)) if model else opening.Run(folder, step, config)
    source.check(compared=parity)
    if folder or output:
        how = dataclasses.replace(how, kept=(folder / 'eval' if folder else pathlib.Path(output).parent) / 'responses')
    result = _evaluated(how, source, compared=parity)
    if not output and not model:
        output = folder / 'eval' / f'step-{result["protocol"]["step"]}.json'
    if output:
        evaluate.write(pathlib.Path(output), result)
    print(make_table(result))
    if parity:
        print(parity_lib.describe(result['parity']))
        parity_lib.require(result['parity'])


def _check(folder, model, models, table, figure, output, parity, limit, step) -> None:
    if parity and (table or figure):
        raise errors.UsageError('--parity compares one model; give it without --table and --figure.')
    if limit is not None and limit < 1:
        raise errors.UsageError(f'--limit={limit}: give a number of examples, 1 or more.')
    if models and not (table or figure):
        raise errors.UsageError('--models=[NAME=]FOLDER,... belongs to --table or --figure; give --model=FOLDER.')
    if model and folder and not (table or figure):
        raise errors.UsageError(f'--workdir={folder} and --model={model} are two models; give one, or --table=2.')
    if step is not None and not folder:
        raise errors.UsageError(f'--step={step} is of a run; give its --workdir.')
    if output and pathlib.Path(output).is_dir() and not (table or figure):
        raise errors.UsageError(f'--output={output} is a folder; give a file to write, FILE.json.')
    if table and figure:
        raise errors.UsageError('--table and --figure are made one at a time.')
    if table and table not in results.TABLES:
        raise errors.UsageError(f'--table={table}: the tables are {", ".join(map(str, results.TABLES))}.')
    if figure and figure != 2:
        raise errors.UsageError(f'--figure={figure}: the figure is 2.')
    if (table or figure) and not (output or folder):
        raise errors.UsageError('--output=DIR, where the results go, is missing.')


def _check_shown(tasks: Sequence[str], table: int | None) -> None:
    """Raises UsageError for tasks that the table, or Figure 2, does not show."""
    shown = results.TABLES[table or 2]
    if others := [task for task in tasks if task not in shown]:
        flag = f'--table={table}' if table else '--figure=2'
        raise errors.UsageError(
            f'--tasks: {", ".join(others)}: not in {flag}, which shows {", ".join(shown)}; evaluate those alone.'
        )


def _make_folder(place: pathlib.Path) -> None:
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise errors.UsageError(f'--output={place} cannot be made a folder: {error.strerror}.') from None


@contextlib.contextmanager
def _writing(place: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise errors.RunError(f'{error.filename or place} could not be written: {error.strerror}.') from None


def _evaluated(how: _How, source, *, compared: bool = False, label: str = '') -> dict[str, Any]:
    """The result of one model, with a parity report if that is wanted."""
    options = dict(how.options)
    if compared:
        options['log_samples'] = True
    result = _asked(how, source, how.backend, options, label)
    if compared:
        other = _asked(how, source, 'hf' if result['protocol']['backend'] == 'jax' else 'jax', options, label)
        result['parity'] = parity_lib.compare(result, other)
        if not how.options['log_samples']:
            del result['samples']
    return result


def _asked(how: _How, source, backend: str | None, options, label: str) -> dict[str, Any]:
    with source.opened(how.protocol, backend) as opened:
        asked = opened.model
        if how.kept:
            identity = {name: opened.identity[name] for name in _OF_ANSWERS} | {'protocol': how.protocol.name}
            asked = responses.Remembering(opened.model, responses.path(how.kept, identity))
        try:
            identity = opened.identity | ({'label': label} if label else {})
            return evaluate.evaluate(asked, how.tasks, protocol=how.protocol, identity=identity, **options)
        finally:
            if how.kept:
                asked.close()


def _named(models: Sequence[str]) -> dict[str, opening.Folder]:
    """[NAME=]FOLDER -> name -> folder; a folder's own name is its default."""
    found: dict[str, opening.Folder] = {}
    for entry in models:
        name, separator, where = entry.rpartition('=')
        path = pathlib.Path(where)
        name = name if separator else path.resolve().name
        if name in found:
            raise errors.UsageError(f'--models: {name} is there twice; name them, as --models=NAME=FOLDER.')
        found[name] = opening.Folder(path)
    return found


def _by_tokens(sources: dict[str, opening.Folder], checkpoints: dict[float, tuple[str, Any]]) -> dict[float, Any]:
    """Training tokens -> name, model: of folders by their names, and of a run's checkpoints."""
    points = dict(checkpoints)
    for name, source in sources.items():
        tokens = _tokens(name)
        if tokens in points:
            raise errors.UsageError(f'--models: {points[tokens][0]} and {name} have the same training tokens.')
        points[tokens] = name, source
    return points


def _table(how: _How, place: pathlib.Path, sources, table: int) -> str:
    rows = {}
    for number, (name, source) in enumerate(sources.items(), start=1):
        print(f'[{number}/{len(sources)}] {name}', flush=True)
        result = _evaluated(how, source, label=name)
        evaluate.write(place / f'{name}-table{table}.json', result)
        rows[name] = results.scores(table, result, name)
    with _writing(place):
        return results.write_table(place, table, rows)


def _figure(how: _How, place: pathlib.Path, sources) -> pathlib.Path:
    """`sources`: training tokens -> name, model."""
    points = {}
    for number, (tokens, (name, source)) in enumerate(sorted(sources.items()), start=1):
        print(f'[{number}/{len(sources)}] {name}, {tokens:,.0f} tokens', flush=True)
        result = _evaluated(how, source, label=name)
        evaluate.write(place / f'{name}.json', result)
        points[tokens] = results.scores(2, result, name)
    with _writing(place):
        return results.write_figure(place, points)


def _checkpoints(folder: pathlib.Path, config: Config | None) -> dict[float, tuple[str, opening.Run]]:
    """Training tokens -> name and model of every checkpoint of a run."""
    run = workdir.read_config(folder)
    tokens_per_step = run.train.global_batch_size * run.model.seq_len
    steps = checkpoint.Checkpointer(folder / 'checkpoints', read_only=True).steps()
    return {step * tokens_per_step: (f'step-{step}', opening.Run(folder, step, config)) for step in steps}


def _tokens(name: str) -> float:
    """Training tokens in a checkpoint's name, as those published have it: ...-105b, ...-1T."""
    match = _TOKENS.search(name)
    if not match:
        raise errors.UsageError(
            f'--models: {name} does not end with its training tokens, as -105b or -1T; name it so: '
            '--models=105b=FOLDER.'
        )
    return float(match[1]) * {'b': 1e9, 't': 1e12}[match[2].lower()]
