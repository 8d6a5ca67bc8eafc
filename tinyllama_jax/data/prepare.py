"""Makes a complete store from raw corpora: lists the tasks, runs those that are left, writes the manifest.

A task turns one input (a file, or a group of plain text files) into its own stream
of the store, so the store's bytes depend neither on the number of workers nor on
restarts. The manifest is written last.
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

from tinyllama_jax import errors
from tinyllama_jax import tokenizer as tokenizer_lib
from tinyllama_jax.config import Config, DataConfig
from tinyllama_jax.data import corpus, readers, store, tasks
from tinyllama_jax.process import signals
from tinyllama_jax.settings import tree

_LISTED_RECORDS = 100  # bad records listed per source; all are counted
_SAMPLE_CHARACTERS = 4_000_000  # for training a tokenizer
_SAMPLE_FILES = 256  # of each source, for the same
_LINE_SECONDS = 10.0  # between lines of progress

Inputs = Mapping[str, Mapping[str, list[readers.Input]]]  # source -> split -> inputs


def prepare_run(config: Config, workdir: Path) -> None:
    """Makes the store that a run reads; see `prepare`."""
    prepare(config.data, config.data.store_path(workdir))


def prepare(config: DataConfig, path: str | Path) -> dict[str, Any]:
    """Makes the store `path` from the sources of `config` and returns its manifest.

    Resumes an interrupted call; leaves a complete store of the same settings as it
    is. Raises UsageError for unusable sources, files or settings and for too many
    bad files, RunError when the store cannot be written; it writes no manifest then.
    """
    path = Path(path).absolute()
    if not config.sources:
        raise errors.UsageError('config.data.sources is empty; give --config.data.sources.NAME.path=DIR.')
    if config.tokenizer is None and config.tokenizer_pieces is None:
        raise errors.UsageError(
            'no tokenizer is set; give --config.data.tokenizer=FILE, a SentencePiece .model file '
            '(or --config.data.tokenizer_pieces=N to train one).'
        )
    if config.python_corpus:
        config = dataclasses.replace(config, sources=corpus.with_paths(config.sources, path.parent / 'corpus'))
    inputs = {name: readers.find_inputs(name, source) for name, source in config.sources.items()}
    settings = _settings(config, inputs)
    manifest = store.read_manifest(path)
    if manifest is not None:
        _check_unchanged(manifest, settings, inputs, path)
        _say(f'{path} is complete.')
    else:
        listed = [
            tasks.Task(name, split, index, source, tuple(config.sources[name].drop_sets))
            for name, splits in inputs.items()
            for split, sources in splits.items()
            for index, source in enumerate(sources)
        ]
        task_list = tasks.TaskList(tuple(listed), config.bos, config.eos_per_document)
        executor = _begin(path, config, task_list, settings)
        _run(executor, task_list, config.max_bad_share)
        manifest = _manifest(path, task_list, settings)
        for lock in path.rglob('*.__lock'):  # left by a write that was killed
            lock.unlink()
        store.write_json(path / store.MANIFEST, manifest)  # makes the store complete
        shutil.rmtree(path / tasks.PROGRESS)
    _print_table(manifest)
    return manifest


def _settings(config: DataConfig, inputs: Inputs) -> dict[str, Any]:
    """Returns what decides the store's bytes, besides the contents of the inputs."""
    if config.tokenizer:
        tokenizer = {'sha256': tokenizer_lib.Tokenizer(config.tokenizer).sha256}
    else:
        tokenizer = {'pieces': config.tokenizer_pieces}
    sources = {}
    for name, splits in inputs.items():
        names = {split: [[i.format, i.text_field, *i.names] for i in listed] for split, listed in splits.items()}
        digests = {split: hashlib.sha256(json.dumps(listed).encode()).hexdigest() for split, listed in names.items()}
        sources[name] = {'drop_sets': sorted(config.sources[name].drop_sets), 'inputs': digests}
    return {
        'tokenizer': tokenizer,
        'bos': config.bos,
        'eos_per_document': config.eos_per_document,
        'sources': sources,
    }


def _check_unchanged(manifest: dict[str, Any], settings: dict[str, Any], inputs: Inputs, path: Path) -> None:
    """Raises UsageError when a complete store was prepared with other settings, or from files of another size."""
    differing = sorted(tree.differences(manifest['settings'], settings))
    if not differing:
        differing = [
            f'the size of {name}/{file["name"]}'
            for name, splits in inputs.items()
            for split, listed in splits.items()
            for file, source in zip(manifest['sources'][name]['splits'][split]['files'], listed, strict=True)
            if file['bytes'] != _total_size(tasks.input_stamp(source))
        ]
    if differing:
        raise errors.UsageError(
            f'{path} is complete, but was prepared with other settings or inputs (differing: {", ".join(differing[:5])}'
            '); choose another folder with --config.data.store=DIR, or delete this one.'
        )


def _total_size(stamp: list[list[int]]) -> int:
    return sum(size for size, _ in stamp)


def _begin(path: Path, config: DataConfig, task_list: tasks.TaskList, settings: dict[str, Any]) -> tasks.Executor:
    """Creates the empty store with its tokenizer, or resumes an interrupted run of the same settings."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    executor = tasks.Executor(path, num_tasks=len(task_list.tasks), workers=config.workers or cores)
    try:
        if not _can_resume(executor, task_list, settings, trained=config.tokenizer is None):
            _clear(path)
            (path / tasks.PROGRESS / 'results').mkdir(parents=True)
            store.write_json(path / tasks.PROGRESS / 'settings.json', settings)
        tasks.write_task_list(path, task_list)
        if config.tokenizer:
            shutil.copyfile(config.tokenizer, path / store.TOKENIZER)
        elif config.tokenizer_pieces and not (path / store.TOKENIZER).exists():
            _say(f'Training a tokenizer of {config.tokenizer_pieces:,} pieces.')
            sample = _sample(config, task_list)
            tokenizer_lib.train_tokenizer(sample, path / store.TOKENIZER, config.tokenizer_pieces)
    except OSError as error:
        raise store.write_error(path, error) from None
    tokenizer = tokenizer_lib.Tokenizer(path / store.TOKENIZER)
    # Raises UsageError now if the tokenizer lacks BOS or EOS.
    tokenizer.encode_document('', bos=config.bos, eos_per_document=config.eos_per_document)
    num_files = {(task.source, task.split): task.index + 1 for task in task_list.tasks}
    for (source, split), count in num_files.items():
        store.create_arrays(path, source, split, num_files=count, dtype=tokenizer.dtype)
    return executor


def _can_resume(
    executor: tasks.Executor, task_list: tasks.TaskList, settings: dict[str, Any], *, trained: bool
) -> bool:
    """Returns whether an interrupted run with these settings exists; its outdated or bad tasks are set to run again."""
    saved = executor.path / tasks.PROGRESS / 'settings.json'
    if not saved.exists() or json.loads(saved.read_text()) != settings:
        return False
    incomplete = set(executor.get_incomplete_ranks())
    for rank in set(range(len(task_list.tasks))) - incomplete:
        result = tasks.read_result(executor.path, rank)
        outdated = result['stamp'] != tasks.input_stamp(task_list.tasks[rank].input)
        if outdated and trained:
            return False  # another tokenizer would be trained
        if outdated or 'bad' in result:
            executor.forget(rank)
            incomplete.add(rank)
    if complete := len(task_list.tasks) - len(incomplete):
        _say(f'Resuming: {complete} of {len(task_list.tasks)} files are done.')
    return True


def _clear(path: Path) -> None:
    """Removes an unfinished store. Raises UsageError if the folder holds anything else."""
    if path.exists() and not path.is_dir():
        raise errors.UsageError(f'--config.data.store={path} is not a folder; choose another.')
    present = sorted(entry.name for entry in path.iterdir()) if path.exists() else []
    # A killed run may leave temporary files; earlier versions named them .part.
    temporary = {f'{name}{suffix}' for name in (store.TOKENIZER, store.MANIFEST) for suffix in ('.tmp', '.part')}
    others = set(present) - {'tokens', 'documents', store.TOKENIZER, tasks.PROGRESS} - temporary
    if others or (present and tasks.PROGRESS not in present):
        raise errors.UsageError(
            f'--config.data.store={path} holds other files ({", ".join(present[:3])}) and no manifest; '
            'choose a new folder, or empty this one.'
        )
    # .progress goes last: if this is interrupted, the rest still counts as an unfinished store.
    for name in sorted(present, key=lambda name: name == tasks.PROGRESS):
        entry = path / name
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _sample(config: DataConfig, task_list: tasks.TaskList) -> Iterator[str]:
    """Yields texts of the training splits in proportion to the sources' weights, from files spread evenly over each."""
    total = sum(source.weight for source in config.sources.values())
    for name, source in config.sources.items():
        train = [task for task in task_list.tasks if (task.source, task.split) == (name, 'train')]
        train = train[:: -(-len(train) // _SAMPLE_FILES)]
        quota = int(_SAMPLE_CHARACTERS * source.weight / total / len(train)) + 1
        for task in train:
            yield from _head(task, quota)


def _head(task: tasks.Task, characters: int) -> Iterator[str]:
    """Yields about the first `characters` characters of a task's documents."""
    try:
        for record in readers.read_records(task.input):
            if record.fault or tasks.is_dropped(record.text, record.set_name, task.drop_sets):
                continue
            yield record.text[:characters]
            characters -= len(record.text)
            if characters <= 0:
                return
    except readers.BadFile:
        return  # the task itself will report it


def _run(executor: tasks.Executor, task_list: tasks.TaskList, max_bad_share: float) -> None:
    progress = _Progress(len(executor.get_incomplete_ranks()))
    bad: dict[str, int] = {}

    def on_done(rank: int) -> None:
        result, task = tasks.read_result(executor.path, rank), task_list.tasks[rank]
        progress.add(result)
        if 'bad' in result:
            bad[task.source] = bad.get(task.source, 0) + 1
            files = sum(other.source == task.source for other in task_list.tasks)
            if bad[task.source] > max_bad_share * files:
                raise errors.UsageError(
                    f'source {task.source}: {task.input.paths()[0]} is a bad file ({result["bad"]}). That makes '
                    f'{bad[task.source]} of {files} files, more than config.data.max_bad_share={max_bad_share:g} '
                    'allows. Replace or remove the file or raise --config.data.max_bad_share, and run prepare again.'
                )

    try:
        with signals.keyboard_interrupts():
            executor.run(on_done)
    except KeyboardInterrupt:
        raise errors.Stopped('prepare was stopped; run it again to resume.', signal.SIGINT) from None
    finally:
        progress.close()


def _manifest(path: Path, task_list: tasks.TaskList, settings: dict[str, Any]) -> dict[str, Any]:
    tokenizer = tokenizer_lib.Tokenizer(path / store.TOKENIZER)
    entries: dict[str, dict[str, list]] = {}
    faults: dict[str, list] = {task.source: [] for task in task_list.tasks}
    for rank, task in enumerate(task_list.tasks):
        result = tasks.read_result(path, rank)
        entry: dict[str, Any] = {'name': task.input.names[0], 'bytes': _total_size(result['stamp'])}
        counts = ('documents', 'dropped', 'tokens', 'bad_records', 'sha256')
        entry |= {key: result[key] for key in counts if key in result}
        if len(task.input.names) > 1:
            entry['names'] = list(task.input.names)
        bad = result.get('faults', [])
        if 'bad' in result:
            entry['bad'], bad = result['bad'], [(None, result['bad'])]
        entries.setdefault(task.source, {}).setdefault(task.split, []).append(entry)
        faults[task.source] += [{'file': entry['name'], 'record': record, 'reason': reason} for record, reason in bad]
    return {
        'version': store.VERSION,
        'tokenizer_sha256': tokenizer.sha256,
        'vocab_size': tokenizer.vocab_size,
        'dtype': tokenizer.dtype.name,
        'bos': settings['bos'],
        'eos_per_document': settings['eos_per_document'],
        'settings': settings,
        'sources': {name: _source_entry(name, splits, faults[name]) for name, splits in entries.items()},
    }


def _source_entry(name: str, splits: dict[str, list], faults: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns a source's manifest entry: the counts of its training split, its faults, all splits with their files."""
    totals: dict[str, dict[str, Any]] = {}
    for split, files in splits.items():
        bad = {'files': sum('bad' in file for file in files), 'records': sum(file['bad_records'] for file in files)}
        counts = {key: sum(file[key] for file in files) for key in ('documents', 'dropped', 'tokens')}
        totals[split] = {**counts, 'bad': bad}
    if not totals['train']['documents']:
        raise errors.UsageError(
            f'source {name} has no document to train on ({totals["train"]["dropped"]} dropped, '
            f'{totals["train"]["bad"]["records"]} bad records); check --config.data.sources.{name}.path.'
        )
    bad_files = [fault for fault in faults if fault['record'] is None]
    bad_records = [fault for fault in faults if fault['record'] is not None][:_LISTED_RECORDS]
    listed = {split: {**totals[split], 'files': files} for split, files in splits.items()}
    return {**totals['train'], 'faults': bad_files + bad_records, 'splits': listed}


class _Progress:
    """Shows progress: a bar on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, todo: int):
        self._files, self._done, self._tokens = todo, 0, 0
        self._start = self._last = time.monotonic()
        self._bar = tqdm.tqdm(total=self._files, unit='file', disable=not sys.stderr.isatty())

    def add(self, result: dict[str, Any]) -> None:
        """Counts one more finished task."""
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
    lines = [['source', 'split', 'files', 'documents', 'dropped', 'tokens', 'bad files', 'bad records']]
    for name, source in manifest['sources'].items():
        for split, entry in source['splits'].items():
            counts = [len(entry['files']), *(entry[key] for key in ('documents', 'dropped', 'tokens'))]
            lines.append([name, split, *(f'{n:,}' for n in [*counts, *entry['bad'].values()])])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        aligned = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        _say('  '.join([line[0].ljust(widths[0]), line[1].ljust(widths[1]), *aligned[2:]]))
