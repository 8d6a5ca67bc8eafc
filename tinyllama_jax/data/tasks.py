"""Prepare's datatrove pipeline: a task reads one input, drops records, tokenises the rest and writes a stream.

An unfinished store keeps its state in STORE/.progress: the list of tasks, datatrove's
completion marks, and one result per task, from which the manifest is made.
"""

import concurrent.futures
import concurrent.futures.process
import contextlib
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import loguru
from datatrove.data import Document
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep

from tinyllama_jax import errors
from tinyllama_jax.data import readers, store
from tinyllama_jax.tokenizer import loading
from tinyllama_jax.tokenizer.base import BaseTokenizer

PROGRESS = '.progress'
DIGEST = 16  # characters of the digest of a group's file
_LISTED_RECORDS = 20  # bad records listed per task; all are counted


@dataclasses.dataclass(frozen=True)
class Task:
    """One input and the stream it becomes: stream `index` of a source's split."""

    source: str
    split: str
    index: int
    input: readers.Input
    drop_sets: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class TaskList:
    """All tasks of a store, by rank, and the special tokens around each document."""

    tasks: tuple[Task, ...]
    bos: bool
    eos_per_document: int


def write_task_list(path: Path, task_list: TaskList) -> None:
    """Saves `task_list` for the workers of the store `path`. Raises RunError when the store cannot be written."""
    store.write_json(path / PROGRESS / 'plan.json', dataclasses.asdict(task_list))
    _task_list.cache_clear()
    _tokenizer.cache_clear()


@functools.lru_cache(maxsize=1)
def _task_list(path: Path) -> TaskList:
    values = json.loads((path / PROGRESS / 'plan.json').read_text())
    tasks = [
        Task(task['source'], task['split'], task['index'], readers.Input(**task['input']), tuple(task['drop_sets']))
        for task in values['tasks']
    ]
    return TaskList(tuple(tasks), values['bos'], values['eos_per_document'])


@functools.lru_cache(maxsize=1)
def _tokenizer(path: Path) -> BaseTokenizer:
    return loading.load(loading.kept(path))


class _Step(PipelineStep):
    """A step of the pipeline that makes the store `path`."""

    def __init__(self, path: Path):
        super().__init__()
        self.path = path


class ReadRecords(_Step):
    """Yields a Document per record or skipped file, which is in its `metadata`."""

    type, name = 'READER', 'records'

    def run(self, data: None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Yields what the readers make of the input of task `rank`."""
        source = _task_list(self.path).tasks[rank].input
        for record in readers.read_records(source):
            text, number = (record.text, record.number) if isinstance(record, readers.Record) else ('', 'skipped')
            yield Document(text, f'{source.names[record.file]}/{number}', metadata={'record': record})


class MarkDropped(_Step):
    """Sets `unwanted` in the metadata of each document: whether its record is in one of drop_sets."""

    type, name = 'FILTER', 'unwanted'

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Yields the documents of `data`, marked."""
        task = _task_list(self.path).tasks[rank]
        for document in data:
            record = document.metadata['record']
            if isinstance(record, readers.Record):
                document.metadata['unwanted'] = is_unwanted(record, task)
            yield document


def is_unwanted(record: readers.Record, task: Task) -> bool:
    """Returns whether a record is in one of the task's drop_sets.

    It is if one of its fields besides the text is the set's name, or a dictionary in which the name is
    quoted, or if its file (up to a shard's number) or a folder of the file has this name. Raises BadFile if its
    set is a number.
    """
    if not task.drop_sets:
        return False
    if readers.UNKNOWN_SET in record.labels:
        raise readers.BadFile(
            'names the sets of its records by numbers; write names, or set drop_sets to an empty value'
        )
    *folders, file = task.input.names[record.file].split('/')
    places = {*folders, re.split(r'[-_](?=\d|train|valid)|\.', file)[0], file.split('.')[0]}
    return any(
        name in places or any(name == label or _quotes(label, name) for label in record.labels)
        for name in task.drop_sets
    )


def _quotes(label: str, name: str) -> bool:
    return label.lstrip()[:1] in ('{', '[') and any(f'{mark}{name}{mark}' in label for mark in '\'"')


class WriteStream(_Step):
    """Tokenises documents and writes the task's stream, then its result."""

    type, name = 'WRITER', 'stream'

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> None:
        """Writes the stream and result of task `rank`; a bad file leaves only its reason."""
        task = _task_list(self.path).tasks[rank]
        writer = store.StreamWriter(self.path, task.source, task.split, task.index)
        stamp = input_stamp(task.input)
        writer.erase()
        try:
            result = self._write(data, writer, task.input)
        except (readers.BadFile, OverflowError) as fault:
            writer.erase()
            result = {'documents': 0, 'dropped': 0, 'tokens': 0, 'bad_records': 0, 'bad': str(fault)}
        store.write_json(result_path(self.path, rank), {**result, 'stamp': stamp})

    def _write(self, data: Iterable[Document], writer: store.StreamWriter, source: readers.Input) -> dict[str, Any]:
        task_list, tokenizer = _task_list(self.path), _tokenizer(self.path)
        special = {'bos': task_list.bos, 'eos_per_document': task_list.eos_per_document}
        counts = {'dropped': 0, 'bad_records': 0, 'unwanted': 0, 'labelled': 0}
        kept, faults, skipped = 0, [], []
        firsts: list[int | None] = [None] * len(source.names)  # place of each file's first record
        hashes = [hashlib.sha256() for _ in source.names]  # of each file's ids
        for document in data:
            record = document.metadata['record']
            if isinstance(record, readers.Skipped):
                skipped.append([record.file, record.reason, record.bad])
                continue
            if firsts[record.file] is None:
                firsts[record.file] = record.place - record.number
            unwanted = document.metadata['unwanted']
            counts['unwanted'] += unwanted
            counts['labelled'] += unwanted or bool(record.labels)
            if record.fault:
                faults.append([record.file, record.number, record.fault])
            elif unwanted or not document.text:
                counts['dropped'] += 1
            else:
                tokens = tokenizer.encode_document(document.text, **special)
                writer.append(tokens, record.place)
                hashes[record.file].update(tokens.tobytes())
                kept += 1
        if faults and not kept + counts['dropped']:
            raise readers.BadFile(readers.every_record_is_bad(*faults[0][1:]))
        counts['bad_records'] = len(faults)
        result = {**writer.close(), **counts, 'faults': faults[:_LISTED_RECORDS], 'skipped': skipped}
        if len(source.names) > 1:
            result['digests'] = [each.hexdigest()[:DIGEST] for each in hashes]
            if source.format != 'text':
                result['first_records'] = firsts
        return result


def input_stamp(source: readers.Input) -> list[list[int]]:
    """Returns [size, modification time] of each file of an input; a result is valid only for the same stamp."""
    stamps = []
    for path in source.paths():
        try:
            stat = path.stat()
            stamps.append([stat.st_size, stat.st_mtime_ns])
        except OSError:
            stamps.append([0, 0])
    return stamps


def result_path(path: Path, rank: int) -> Path:
    """Returns the path of the result of task `rank` of the store `path`."""
    return path / PROGRESS / 'results' / f'{rank:08d}.json'


def bad_files(result: dict[str, Any]) -> list[tuple[int, str]]:
    """Returns (file, reason) of the bad files of a task."""
    if 'bad' in result:
        return [(0, result['bad'])]
    return [(file, reason) for file, reason, bad in result.get('skipped', []) if bad]


def read_result(path: Path, rank: int) -> dict[str, Any]:
    """Returns the result of a finished task: its counts, sha256, faults and skipped files, and as `bad` why all is bad.

    `faults` lists [file, record, reason], `skipped` [file, reason, whether it is bad]; a file is
    a number in the input's names.
    """
    return json.loads(result_path(path, rank).read_text())


class Executor(LocalPipelineExecutor):
    """Runs datatrove's tasks, with its completion marks, in a process pool of our own.

    datatrove's pool waits for ever for a worker that was killed, and its workers
    outlive a killed parent and would write into the store of the next run.
    """

    def __init__(self, path: Path, *, num_tasks: int, workers: int):
        # datatrove's log of every task would drown the progress line; faults are in the results.
        loguru.logger.disable('datatrove')
        steps: list[PipelineStep | Callable] = [ReadRecords(path), MarkDropped(path), WriteStream(path)]
        super().__init__(steps, num_tasks, workers, logging_dir=str(path / PROGRESS / 'datatrove'))
        self.path = path

    def forget(self, rank: int) -> None:
        """Deletes the completion mark of a task, so that it runs again."""
        (self.path / PROGRESS / 'datatrove' / 'completions' / f'{rank:05d}').unlink(missing_ok=True)

    def run(self, on_done: Callable[[int], None] = lambda rank: None) -> None:
        """Runs every incomplete task and calls `on_done(rank)` after each."""
        ranks = self.get_incomplete_ranks()
        if self.workers == 1 or len(ranks) < 2:
            for rank in ranks:
                self.run_one(rank)
                on_done(rank)
        else:
            self._run_in_processes(ranks, on_done)

    def run_one(self, rank: int) -> None:
        """Runs one task in this process. Raises RunError when the store cannot be written."""
        try:
            self._run_for_rank(rank)
        except OSError as error:  # from a mark or a log: reading errors have become a bad file
            raise store.write_error(self.path, error) from None

    def _run_in_processes(self, ranks: list[int], on_done: Callable[[int], None]) -> None:
        context = multiprocessing.get_context('forkserver')
        leash, holder = context.Pipe(duplex=False)
        workers = min(self.workers, len(ranks))
        try:
            with concurrent.futures.ProcessPoolExecutor(workers, context, _follow, (leash,)) as pool:
                try:
                    with _hold_back_ctrl_c():
                        futures = {pool.submit(_run_rank, self.path, self.tasks, rank): rank for rank in ranks}
                    for future in concurrent.futures.as_completed(futures):
                        future.result()
                        on_done(futures[future])
                except BaseException:
                    holder.close()
                    raise
        except concurrent.futures.process.BrokenProcessPool:
            raise errors.RunError(
                'A worker of prepare was killed, perhaps because memory ran out; run prepare again to resume, with a '
                'smaller --config.data.workers if it happens again.'
            ) from None
        finally:
            holder.close()


@contextlib.contextmanager
def _hold_back_ctrl_c() -> Iterator[None]:
    """Delivers Ctrl-C after this context. Processes started in it never get it: their parent ends them."""
    received = []
    handler = signal.signal(signal.SIGINT, lambda number, _: received.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited by new processes
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
    for number in received:
        signal.raise_signal(number)


def _run_rank(path: Path, num_tasks: int, rank: int) -> None:
    Executor(path, num_tasks=num_tasks, workers=1).run_one(rank)


def _follow(leash) -> None:
    """Ends this worker at once when its parent closes the other end of the pipe, or dies."""

    def wait() -> None:
        leash.poll(None)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
