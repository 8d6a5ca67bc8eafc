"""From raw corpora to a complete store: what to do, what is left to do, the manifest.

One task is one input (a jsonl or parquet file, or a group of text files) and owns
its stream of the store, so the store's bytes depend neither on the number of
workers nor on restarts. The manifest is written last.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tqdm

from tinyllama_jax import errors, tokenizer
from tinyllama_jax.config import DataConfig, SourceConfig
from tinyllama_jax.data import corpus, readers, store, tasks
from tinyllama_jax.process import signals
from tinyllama_jax.settings import tree

_LISTED_RECORDS = 100  # bad records of a source that are listed; all are counted
_SAMPLE_CHARACTERS = 4_000_000  # a tokenizer is trained on
_SAMPLE_FILES = 256
_LINE_SECONDS = 10.0

Inputs = Mapping[str, Mapping[str, list[readers.Input]]]  # source -> split -> inputs


def prepare(config: DataConfig, path: str | Path) -> dict[str, Any]:
    """Makes the store `path` from the sources of `config` and returns its manifest.

    An interrupted call is continued by the next; a complete store of the same
    settings is left as it is. Raises UsageError for sources, files or settings that
    can't be used and for too many bad files, RunError when the store can't be
    written; there is no manifest then.
    """
    path = Path(path).absolute()
    config = _with_sources(config, path)
    inputs = {name: readers.find_inputs(name, source) for name, source in config.sources.items()}
    settings = _settings(config, inputs)
    if (manifest := store.read_manifest(path)) is not None:
        _check_same(manifest, settings, inputs, path)
        _say(f'{path} is complete.')
    else:
        plan = _plan(config, inputs)
        executor = _begin(path, config, plan, settings)
        _run(executor, plan, config.max_bad_share)
        manifest = _manifest(path, plan, settings)
        _finish(path, manifest)
    _print_table(manifest)
    return manifest


def _with_sources(config: DataConfig, path: Path) -> DataConfig:
    if not config.sources:
        raise errors.UsageError('config.data.sources is empty; give --config.data.sources.NAME.path=DIR.')
    if config.tokenizer is None and config.tokenizer_pieces is None:
        raise errors.UsageError('no tokenizer is set; give --config.data.tokenizer=FILE, a SentencePiece .model file '
                                '(or --config.data.tokenizer_pieces=N to train one).')  # fmt: skip
    if not config.python_corpus:
        return config
    return dataclasses.replace(config, sources=corpus.with_paths(config.sources, path.parent / 'corpus'))


def _settings(config: DataConfig, inputs: Inputs) -> dict[str, Any]:
    """What decides the store's bytes, besides the inputs' contents."""
    if config.tokenizer:
        model = {'sha256': tokenizer.Tokenizer(config.tokenizer).sha256}
    else:
        model = {'pieces': config.tokenizer_pieces}
    return {
        'tokenizer': model,
        'bos': config.bos,
        'eos_per_document': config.eos_per_document,
        'sources': {name: _source_settings(config.sources[name], inputs[name]) for name in inputs},
    }


def _source_settings(source: SourceConfig, splits: Mapping[str, list[readers.Input]]) -> dict[str, Any]:
    names = {
        split: hashlib.sha256(json.dumps([[i.format, i.text_field, *i.names] for i in listed]).encode()).hexdigest()
        for split, listed in splits.items()
    }
    return {'drop_sets': sorted(source.drop_sets), 'inputs': names}


def _check_same(manifest: dict[str, Any], settings: dict[str, Any], inputs: Inputs, path: Path) -> None:
    differing = sorted(tree.differences(manifest['settings'], settings))
    if not differing:
        made = manifest['sources']
        differing = [
            f'the size of {source}/{file["name"]}'
            for source, splits in inputs.items()
            for split, listed in splits.items()
            for file, entry in zip(made[source]['splits'][split]['files'], listed, strict=True)
            if file['bytes'] != _bytes(entry)
        ]
    if differing:
        raise errors.UsageError(
            f'{path} is complete, but was prepared with other settings or inputs (differing: {", ".join(differing[:5])}'
            '); choose another folder with --config.data.store=DIR, or delete this one.'
        )


def _bytes(source: readers.Input) -> int:
    return sum(size for size, _ in tasks.input_stamp(source))


def _plan(config: DataConfig, inputs: Inputs) -> tasks.Plan:
    listed = [
        tasks.Task(name, split, index, source, tuple(config.sources[name].drop_sets))
        for name, splits in inputs.items()
        for split, sources in splits.items()
        for index, source in enumerate(sources)
    ]
    return tasks.Plan(tuple(listed), config.bos, config.eos_per_document)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def _begin(path: Path, config: DataConfig, plan: tasks.Plan, settings: dict[str, Any]) -> tasks.Executor:
    """Lays the store out, or takes up what an interrupted run with the same settings left."""
    progress, workers = path / tasks.PROGRESS, config.workers or _cores()
    executor = tasks.Executor(path, num_tasks=len(plan.tasks), workers=workers)
    try:
        if not _can_continue(path, plan, settings, executor, trained=config.tokenizer is None):
            _clear(path)
            progress.joinpath('results').mkdir(parents=True)
            store.write_json(progress / 'settings.json', settings)
        tasks.write_plan(path, plan)
        _put_tokenizer(path, config, plan)
    except OSError as error:
        raise store.write_error(path, error) from None
    model = tokenizer.Tokenizer(path / store.TOKENIZER)
    model.encode_document('', bos=config.bos, eos_per_document=config.eos_per_document)  # has it these pieces?
    for (source, split), count in _counts(plan).items():
        store.create_arrays(path, source, split, num_files=count, dtype=model.dtype)
    return executor


def _counts(plan: tasks.Plan) -> dict[tuple[str, str], int]:
    """Number of inputs of each (source, split)."""
    counts: dict[tuple[str, str], int] = {}
    for task in plan.tasks:
        counts[task.source, task.split] = task.index + 1
    return counts


def _can_continue(path: Path, plan: tasks.Plan, settings: dict, executor: tasks.Executor, *, trained: bool) -> bool:
    """Whether an interrupted run with these settings is there; its outdated or bad tasks are to run again."""
    saved = path / tasks.PROGRESS / 'settings.json'
    if not saved.exists() or json.loads(saved.read_text()) != settings:
        return False
    incomplete = set(executor.get_incomplete_ranks())
    for rank in set(range(len(plan.tasks))) - incomplete:
        result = tasks.read_result(path, rank)
        outdated = result['stamp'] != tasks.input_stamp(plan.tasks[rank].input)
        if outdated and trained:
            return False  # the tokenizer would be another
        if outdated or 'bad' in result:
            executor.forget(rank)
            incomplete.add(rank)
    if done := len(plan.tasks) - len(incomplete):
        _say(f'Continuing: {done} of {len(plan.tasks)} files are done.')
    return True


def _clear(path: Path) -> None:
    """Removes an unfinished store. Raises UsageError if the folder holds anything else."""
    ours = {'tokens', 'documents', store.TOKENIZER, f'{store.TOKENIZER}.part', f'{store.MANIFEST}.part', tasks.PROGRESS}
    if path.exists() and not path.is_dir():
        raise errors.UsageError(f'--config.data.store={path} is not a folder; choose another.')
    present = sorted(entry.name for entry in path.iterdir()) if path.exists() else []
    strange = [name for name in present if name not in ours]
    if strange or (present and tasks.PROGRESS not in present):
        raise errors.UsageError(f'--config.data.store={path} holds other files ({", ".join(present[:3])}) and no '
                                'manifest; choose a new folder, or empty this one.')  # fmt: skip
    # The progress goes last, so that an interruption here is seen as an unfinished store.
    for name in sorted(present, key=lambda name: name == tasks.PROGRESS):
        entry = path / name
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _put_tokenizer(path: Path, config: DataConfig, plan: tasks.Plan) -> None:
    target = path / store.TOKENIZER
    if config.tokenizer:
        shutil.copyfile(config.tokenizer, target)
    elif not target.exists():
        _say(f'Training a tokenizer of {config.tokenizer_pieces:,} pieces.')
        tokenizer.train_tokenizer(_sample(config, plan), target, config.tokenizer_pieces)


def _sample(config: DataConfig, plan: tasks.Plan) -> Iterator[str]:
    """Texts of the training splits by the sources' weights, from files spread evenly over each."""
    total = sum(source.weight for source in config.sources.values())
    for name, source in config.sources.items():
        listed = [task for task in plan.tasks if (task.source, task.split) == (name, 'train')]
        listed = listed[:: -(-len(listed) // _SAMPLE_FILES)]
        quota = int(_SAMPLE_CHARACTERS * source.weight / total / len(listed)) + 1
        for task in listed:
            yield from _head(task, quota)


def _head(task: tasks.Task, characters: int) -> Iterator[str]:
    try:
        for record in readers.read_records(task.input):
            if record.fault or tasks.is_dropped(record.text, record.set_name, task.drop_sets):
                continue
            yield record.text[:characters]
            characters -= len(record.text)
            if characters <= 0:
                return
    except readers.BadFile:
        return  # the task that reads it all reports it


def _run(executor: tasks.Executor, plan: tasks.Plan, max_bad_share: float) -> None:
    progress = _Progress(len(executor.get_incomplete_ranks()))
    bad: dict[str, int] = {}

    def on_done(rank: int) -> None:
        result, task = tasks.read_result(executor.path, rank), plan.tasks[rank]
        progress.add(result)
        if 'bad' in result:
            bad[task.source] = bad.get(task.source, 0) + 1
            _check_bad_share(plan, task, result['bad'], bad[task.source], max_bad_share)

    try:
        with signals.keyboard_interrupts():
            executor.run(on_done)
    except KeyboardInterrupt:
        raise errors.Stopped('prepare was stopped; run it again to go on where it was.', signal.SIGINT) from None
    finally:
        progress.close()


def _check_bad_share(plan: tasks.Plan, task: tasks.Task, reason: str, bad: int, limit: float) -> None:
    files = sum(other.source == task.source for other in plan.tasks)
    if bad > limit * files:
        raise errors.UsageError(
            f'source {task.source}: {Path(task.input.root, task.input.names[0])} is a bad file ({reason}). That makes '
            f'{bad} of {files} files, more than config.data.max_bad_share={limit:g} allows. Replace or remove the file '
            f'or raise --config.data.max_bad_share, and run prepare again.'
        )


def _manifest(path: Path, plan: tasks.Plan, settings: dict[str, Any]) -> dict[str, Any]:
    model = tokenizer.Tokenizer(path / store.TOKENIZER)
    entries: dict[str, dict[str, list]] = {}
    faults: dict[str, list] = {task.source: [] for task in plan.tasks}
    for rank, task in enumerate(plan.tasks):
        result = tasks.read_result(path, rank)
        entries.setdefault(task.source, {}).setdefault(task.split, []).append(_file_entry(task, result))
        faults[task.source] += _listed_faults(task, result)
    return {
        'version': store.VERSION,
        'tokenizer_sha256': model.sha256,
        'vocab_size': model.vocab_size,
        'dtype': model.dtype.name,
        'bos': settings['bos'],
        'eos_per_document': settings['eos_per_document'],
        'settings': settings,
        'sources': {name: _source_entry(name, splits, faults[name]) for name, splits in entries.items()},
    }


def _file_entry(task: tasks.Task, result: dict[str, Any]) -> dict[str, Any]:
    entry = {'name': task.input.names[0], 'bytes': sum(size for size, _ in result['stamp'])}
    entry |= {key: result[key] for key in ('documents', 'dropped', 'tokens', 'bad_records', 'sha256') if key in result}
    if len(task.input.names) > 1:
        entry['names'] = list(task.input.names)
    return entry | ({'bad': result['bad']} if 'bad' in result else {})


def _listed_faults(task: tasks.Task, result: dict[str, Any]) -> list[dict[str, Any]]:
    name = task.input.names[0]
    whole = [{'file': name, 'record': None, 'reason': result['bad']}] if 'bad' in result else []
    return whole + [{'file': name, 'record': record, 'reason': why} for record, why in result.get('faults', [])]


def _source_entry(name: str, splits: dict[str, list], faults: list[dict[str, Any]]) -> dict[str, Any]:
    """A source of the manifest: the counts of its training split, its faults, and every split with its files."""
    totals = {split: _total(files) for split, files in splits.items()}
    if not totals['train']['documents']:
        raise errors.UsageError(f'source {name} has no document to train on ({totals["train"]["dropped"]} dropped, '
                                f'{totals["train"]["bad"]["records"]} bad records); check '
                                f'--config.data.sources.{name}.path.')  # fmt: skip
    whole = [fault for fault in faults if fault['record'] is None]
    records = [fault for fault in faults if fault['record'] is not None][:_LISTED_RECORDS]
    listed = {split: {**totals[split], 'files': files} for split, files in splits.items()}
    return {**totals['train'], 'faults': whole + records, 'splits': listed}


def _total(files: list[dict[str, Any]]) -> dict[str, Any]:
    bad = {'files': sum('bad' in file for file in files), 'records': sum(file['bad_records'] for file in files)}
    return {key: sum(file[key] for file in files) for key in ('documents', 'dropped', 'tokens')} | {'bad': bad}


def _finish(path: Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest, after which the store counts, and removes what only the making needed."""
    for lock in path.rglob('*.__lock'):  # left by a write that was killed
        lock.unlink()
    store.write_json(path / store.MANIFEST, manifest)
    shutil.rmtree(path / tasks.PROGRESS)


class _Progress:
    """A bar on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, todo: int):
        self._files, self._done, self._tokens = todo, 0, 0
        self._start = self._last = time.monotonic()
        self._bar = tqdm.tqdm(total=self._files, unit='file', disable=not sys.stderr.isatty())

    def add(self, result: dict[str, Any]) -> None:
        """Counts one task that was done now."""
        self._done += 1
        self._tokens += result['tokens']
        now = time.monotonic()
        self._bar.set_postfix_str(f'{self._tokens / 1e6:.1f} M tokens', refresh=False)
        self._bar.update()
        if self._bar.disable and now - self._last >= _LINE_SECONDS:
            rate = self._tokens / (now - self._start)
            _say(f'{self._done} of {self._files} files, {self._tokens / 1e6:.1f} M tokens, {rate / 1e6:.2f} M tokens/s')
            self._last = now

    def close(self) -> None:
        """Ends the bar."""
        self._bar.close()


def _say(line: str) -> None:
    print(f'prepare: {line}', flush=True)


def _print_table(manifest: dict[str, Any]) -> None:
    heads = ('source', 'split', 'files', 'documents', 'dropped', 'tokens', 'bad files', 'bad records')
    lines = [heads]
    for name, source in manifest['sources'].items():
        for split, entry in source['splits'].items():
            counts = [len(entry['files']), *(entry[key] for key in ('documents', 'dropped', 'tokens'))]
            lines.append((name, split, *(f'{n:,}' for n in [*counts, *entry['bad'].values()])))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        aligned = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        _say('  '.join([line[0].ljust(widths[0]), line[1].ljust(widths[1]), *aligned[2:]]))
