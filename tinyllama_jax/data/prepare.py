"""Makes a complete store from raw corpora: lists the tasks, runs those that are left, writes the manifest.

A task turns one input (a file, or a group of small files) into its own stream of
the store, so the store's bytes depend neither on the number of workers nor on
restarts. The manifest is written last.
"""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tqdm

from tinyllama_jax import errors
from tinyllama_jax.config import Config, DataConfig
from tinyllama_jax.data import corpus, inputs, manifest, readers, roundtrip, store, tasks
from tinyllama_jax.process import signals
from tinyllama_jax.settings import tree
from tinyllama_jax.tokenizer import loading, spm

_SAMPLE_CHARACTERS = 4_000_000  # for training a tokenizer
_COMPARED_CHARACTERS = 400_000  # encoded and decoded before anything is written
_SAMPLE_FILES = 256  # of each source, for both
_LINE_SECONDS = 10.0  # between lines of progress
_SNAPSHOT = re.compile('(?:^|/)snapshots/([^/]+)/')  # a revision in a cache of the Hugging Face hub


def prepare_run(config: Config, workdir: Path) -> None:
    """Makes the store that a run reads; see `prepare`."""
    prepare(config.data, config.data.store_path(workdir), workdir=workdir, seq_len=config.model.seq_len)


def prepare(
    config: DataConfig, path: str | Path, *, workdir: Path | None = None, seq_len: int | None = None
) -> dict[str, Any]:
    """Makes the store `path` from the sources of `config` and returns its manifest.

    Resumes an interrupted call; leaves a complete store of the same settings as it
    is. `workdir` is never read as a part of a source. With `seq_len`, says which share
    of the tokens no row holds. Raises UsageError for unusable sources, files or settings
    and for too many bad files or records, RunError when the store cannot be written; it
    writes no manifest then.
    """
    path = Path(path).absolute()
    if not config.sources:
        raise errors.UsageError('config.data.sources is empty; give --config.data.sources.NAME.path=DIR.')
    if config.tokenizer is None and config.tokenizer_pieces is None:
        raise errors.UsageError(
            'no tokenizer is set; give --config.data.tokenizer=FILE, a SentencePiece .model file or a tokenizer.json '
            '(or --config.data.tokenizer_pieces=N to train one).'
        )
    if config.python_corpus:
        config = dataclasses.replace(config, sources=corpus.with_paths(config.sources, path.parent / 'corpus'))
    complete = store.read_manifest(path)
    share = complete is None or complete['version'] == store.SHARED_VERSION
    own = [path] if workdir is None else [path, workdir]
    found = {name: inputs.find_inputs(name, source, own=own, share=share) for name, source in config.sources.items()}
    settings = _settings(config, found)
    _say_splits(found)
    if complete is not None:
        _check_unchanged(complete, settings, found, path)
        _say(f'{path} is complete.')
    else:
        listed = [
            tasks.Task(name, split, index, source, tuple(config.sources[name].drop_sets))
            for name, listing in found.items()
            for split, sources in listing.splits.items()
            for index, source in enumerate(sources)
        ]
        task_list = tasks.TaskList(tuple(listed), config.bos, config.eos_per_document)
        executor = _begin(path, config, task_list, settings)
        _run(executor, task_list, config.max_bad_share)
        complete = manifest.make_manifest(path, config, task_list, settings, found, seq_len)
        for lock in path.rglob('*.__lock'):  # left by a write that was killed
            lock.unlink()
        store.write_json(path / store.MANIFEST, complete)  # makes the store complete
        shutil.rmtree(path / tasks.PROGRESS)
    for line in manifest.table(complete, seq_len):
        _say(line)
    return complete


def _say_splits(found: Mapping[str, inputs.Found]) -> None:
    """Says which files go to which split."""
    for name, listing in found.items():
        for split, listed in listing.splits.items():
            files = [file for each in listed for file in each.names]
            _say(f'{name}: {split} reads {manifest.shown(files)}')
            revisions = {match.group(1) for file in files if (match := _SNAPSHOT.search(file))}
            if len(revisions) > 1:
                _say(f'{name}: these are {len(revisions)} snapshots of one repository; give the path of one')


def _settings(config: DataConfig, found: Mapping[str, inputs.Found]) -> dict[str, Any]:
    """Returns what decides the store's bytes, besides the contents of the inputs."""
    if config.tokenizer:
        tokenizer = {'sha256': loading.load(config.tokenizer).sha256}
    else:
        tokenizer = {'pieces': config.tokenizer_pieces}
    sources = {}
    for name, listing in found.items():
        names = {
            split: [[i.format, i.text_fields[0] if i.text_fields else None, *i.names] for i in listed]
            for split, listed in listing.splits.items()
        }
        digests = {split: hashlib.sha256(json.dumps(listed).encode()).hexdigest() for split, listed in names.items()}
        sources[name] = {'drop_sets': sorted(config.sources[name].drop_sets), 'inputs': digests}
    return {
        'tokenizer': tokenizer,
        'bos': config.bos,
        'eos_per_document': config.eos_per_document,
        'sources': sources,
    }


def _check_unchanged(
    complete: dict[str, Any], settings: dict[str, Any], found: Mapping[str, inputs.Found], path: Path
) -> None:
    """Raises UsageError when a complete store was prepared with other settings, or from files of another size."""
    differing = sorted(tree.differences(complete['settings'], settings))
    if not differing:
        differing = [
            f'the size of {name}/{file["name"]}'
            for name, listing in found.items()
            for split, listed in listing.splits.items()
            for file, source in zip(complete['sources'][name]['splits'][split]['files'], listed, strict=True)
            if file['bytes'] != manifest.total_size(tasks.input_stamp(source))
        ]
    if differing:
        raise errors.UsageError(
            f'{path} is complete, but was prepared with other settings or inputs (differing: {", ".join(differing[:5])}'
            '); choose another folder with --config.data.store=DIR, or delete this one.'
        )


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
            loading.keep(config.tokenizer, path)
        elif config.tokenizer_pieces and not (path / store.TOKENIZER).exists():
            _say(f'Training a tokenizer of {config.tokenizer_pieces:,} pieces.')
            sample = _sample(config, task_list, _SAMPLE_CHARACTERS, for_training=True)
            spm.train(sample, path / store.TOKENIZER, config.tokenizer_pieces)
    except OSError as error:
        raise store.write_error(path, error) from None
    tokenizer = loading.load(loading.kept(path))
    # Raises UsageError now if the tokenizer lacks BOS or EOS.
    tokenizer.encode_document('', bos=config.bos, eos_per_document=config.eos_per_document)
    sample = _sample(config, task_list, _COMPARED_CHARACTERS, for_training=False)
    for line in roundtrip.report(loading.kept(path), sample, bos=config.bos):
        _say(line)
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
        if outdated or tasks.bad_files(result):
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
    tokenizer = {store.TOKENIZER, loading.FOLDER, f'{loading.FOLDER}.tmp'}
    others = set(present) - {'tokens', 'documents', tasks.PROGRESS} - tokenizer - temporary
    if others or (present and tasks.PROGRESS not in present):
        raise errors.UsageError(
            f'--config.data.store={path} holds other files ({", ".join(present[:3])}) and no manifest; '
            'choose a new folder, or empty this one.'
        )
    # .progress goes last: if this is interrupted, the rest still counts as an unfinished store.
    for name in sorted(present, key=lambda name: name == tasks.PROGRESS):
        entry = path / name
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _sample(config: DataConfig, task_list: tasks.TaskList, characters: int, *, for_training: bool) -> list[str]:
    """Returns texts of the training splits, some `characters` in all, in proportion to the sources' weights.

    They are from files spread evenly over each source. Raises UsageError for a source without any, if they are to train
    a tokenizer on.
    """
    total = sum(source.weight for source in config.sources.values())
    texts: list[str] = []
    for name, source in config.sources.items():
        train = [task for task in task_list.tasks if (task.source, task.split) == (name, 'train')]
        train = train[:: -(-len(train) // _SAMPLE_FILES)]
        if not for_training:  # a named pipe can be read only once
            train = [task for task in train if all(path.is_file() for path in task.input.paths())]
        quota = int(characters * source.weight / total / max(1, len(train))) + 1
        before, reasons = len(texts), []
        for task in train:
            texts += _head(task, quota, reasons)
        if for_training and len(texts) == before:
            reason = f'{train[0].input.paths()[0]} {reasons[0]}' if reasons else 'its documents are empty or dropped'
            raise errors.UsageError(
                f'source {name} has no text to train a tokenizer on ({reason}); check --config.data.sources.{name}.path'
                f' and --config.data.sources.{name}.text_field.'
            )
    return texts


def _head(task: tasks.Task, characters: int, reasons: list[str]) -> Iterator[str]:
    """Yields about the first `characters` characters of a task's documents; appends why there are no more."""
    try:
        for record in readers.read_records(task.input):
            if isinstance(record, readers.Skipped):
                reasons.append(record.reason)
                continue
            if record.fault:
                reasons.append(record.fault)
                continue
            if not record.text or tasks.is_unwanted(record, task):
                continue
            yield record.text[:characters]
            characters -= len(record.text)
            if characters <= 0:
                return
    except readers.BadFile as reason:
        reasons.append(str(reason))  # the task itself will report it


def _run(executor: tasks.Executor, task_list: tasks.TaskList, max_bad_share: float) -> None:
    progress = _Progress(len(executor.get_incomplete_ranks()))
    files: dict[str, int] = {}
    for task in task_list.tasks:
        files[task.source] = files.get(task.source, 0) + len(task.input.names)
    bad = dict.fromkeys(files, 0)

    def on_done(rank: int) -> None:
        result, task = tasks.read_result(executor.path, rank), task_list.tasks[rank]
        progress.add(result)
        for file, reason in tasks.bad_files(result):
            bad[task.source] += 1
            if bad[task.source] > max_bad_share * files[task.source]:
                raise errors.UsageError(
                    f'source {task.source}: {task.input.paths()[file]} is a bad file ({reason}). That makes '
                    f'{bad[task.source]} of {files[task.source]} files, more than '
                    f'config.data.max_bad_share={max_bad_share:g} allows. Replace or remove the file or raise '
                    '--config.data.max_bad_share, and run prepare again.'
                )

    try:
        with signals.keyboard_interrupts():
            executor.run(on_done)
    except KeyboardInterrupt:
        raise errors.Stopped('prepare was stopped; run it again to resume.', signal.SIGINT) from None
    finally:
        progress.close()


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
