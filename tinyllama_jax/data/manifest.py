"""Makes a store's manifest from the results of prepare's tasks, and the table that prepare prints."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinyllama_jax import errors
from tinyllama_jax.config import DataConfig, SourceConfig
from tinyllama_jax.data import inputs, store, tasks
from tinyllama_jax.tokenizer import loading

_LISTED_RECORDS = 100  # bad records listed per source; all are counted
_LISTED_NAMES = 8  # files named in a line, and lines about copies
_NO_TOKENS = hashlib.sha256().hexdigest()


def make_manifest(
    path: Path,
    config: DataConfig,
    task_list: tasks.TaskList,
    settings: dict[str, Any],
    found: Mapping[str, inputs.Found],
    seq_len: int | None,
) -> dict[str, Any]:
    """Returns the manifest of the store `path`, all of whose tasks are done.

    Raises UsageError for a source with nothing to train on, too many bad records, or drop_sets
    that nothing could be compared with.
    """
    tokenizer = loading.load(loading.kept(path))
    results = {task: tasks.read_result(path, rank) for rank, task in enumerate(task_list.tasks)}
    sources: dict[str, dict[str, Any]] = {}
    for name, listing in found.items():
        own = {task: result for task, result in results.items() if task.source == name}
        compared = _compared(name, config.sources[name], list(own.values()))
        sources[name] = {**_source_entry(name, own, listing, config.max_bad_share), **compared}
        if seq_len:
            for entry in sources[name]['splits'].values():
                entry['in_no_row'] = {'seq_len': seq_len, 'tokens': unused_tokens(entry['files'], seq_len)}
    return {
        'version': store.SHARED_VERSION if any(each.shares_streams for each in found.values()) else store.VERSION,
        'tokenizer_sha256': tokenizer.sha256,
        'vocab_size': tokenizer.vocab_size,
        'dtype': tokenizer.dtype.name,
        'bos': settings['bos'],
        'eos_per_document': settings['eos_per_document'],
        'settings': settings,
        'sources': sources,
    }


def _compared(name: str, source: SourceConfig, results: list[dict[str, Any]]) -> dict[str, int]:
    """Returns how many records are in a set of `drop_sets`, and how many name no set; nothing if that is as usual.

    Raises UsageError if `drop_sets` was set for a source whose records name no set.
    """
    is_set = source.drop_sets and source.drop_sets != SourceConfig().drop_sets
    if is_set and not any(result.get('labelled', True) for result in results):
        raise errors.UsageError(
            f'--config.data.sources.{name}.drop_sets={",".join(source.drop_sets)} has nothing to compare with: no '
            'record has a field with a string besides its text, and no file or folder has such a name; name the set '
            'in a field, or set drop_sets to an empty value.'
        )
    read = [result for result in results if 'labelled' in result]  # not in bad files
    in_sets = sum(result['unwanted'] for result in read)
    if not is_set and not in_sets:
        return {}
    nameless = sum(result['documents'] + result['dropped'] - result['labelled'] for result in read)
    return {'in_drop_sets': in_sets, 'without_set': max(nameless, 0)}


def _source_entry(
    name: str, results: Mapping[tasks.Task, dict[str, Any]], listing: inputs.Found, max_bad_share: float
) -> dict[str, Any]:
    """Returns a source's manifest entry: the counts of its training split, its faults, all splits with their files."""
    files: dict[str, list[dict[str, Any]]] = {}
    bad_files, bad_records, ignored = [], [], dict(listing.ignored)
    for task, result in results.items():
        names = task.input.names
        files.setdefault(task.split, []).append(_file_entry(names, result))
        ignored |= {names[file]: reason for file, reason, bad in result.get('skipped', []) if not bad}
        bad_files += [{'file': names[i], 'record': None, 'reason': reason} for i, reason in tasks.bad_files(result)]
        for fault in result.get('faults', []):
            file, record, reason = [0, *fault][-3:]  # earlier versions wrote no file
            bad_records.append({'file': names[file], 'record': record, 'reason': reason})
    totals = {split: _totals(entries) for split, entries in files.items()}
    train = totals['train']
    if not train['documents']:
        listed = '; '.join(f'{file}: {reason}' for file, reason in list(ignored.items())[:3])
        raise errors.UsageError(
            f'source {name} has no document to train on ({train["dropped"]} dropped, {train["bad"]["records"]} bad '
            f'records{f"; {listed}" if listed else ""}); check --config.data.sources.{name}.path.'
        )
    bad = sum(total['bad']['records'] for total in totals.values())
    records = bad + sum(total['documents'] + total['dropped'] for total in totals.values())
    if bad > max_bad_share * records:
        first = bad_records[0]
        raise errors.UsageError(
            f'source {name}: {bad:,} of {records:,} records are bad (the first: {first["file"]}, record '
            f'{first["record"]}, {first["reason"]}), more than config.data.max_bad_share={max_bad_share:g} allows; '
            'mend the files or raise --config.data.max_bad_share, and run prepare again.'
        )
    return {
        **train,
        'faults': bad_files + bad_records[:_LISTED_RECORDS],
        'ignored': [{'file': file, 'reason': reason} for file, reason in sorted(ignored.items())],
        'splits': {split: {**totals[split], 'files': entries} for split, entries in files.items()},
    }


def _file_entry(names: tuple[str, ...], result: dict[str, Any]) -> dict[str, Any]:
    """Returns the manifest entry of a stream, which is called a file there."""
    counts = ('documents', 'dropped', 'tokens', 'bad_records', 'sha256', 'digests', 'first_records', 'bad')
    entry: dict[str, Any] = {'name': names[0], 'bytes': total_size(result['stamp'])}
    entry |= {key: result[key] for key in counts if key in result}
    if len(names) > 1:
        entry['names'] = list(names)
        if 'bad' not in result and (bad := tasks.bad_files(result)):
            entry['bad_files'] = [names[file] for file, _ in bad]
    return entry


def total_size(stamp: list[list[int]]) -> int:
    """Returns the bytes of an input's files."""
    return sum(size for size, _ in stamp)


def _totals(files: list[dict[str, Any]]) -> dict[str, Any]:
    counts = {key: sum(file[key] for file in files) for key in ('documents', 'dropped', 'tokens')}
    bad = sum(('bad' in file) + len(file.get('bad_files', [])) for file in files)
    return {**counts, 'bad': {'files': bad, 'records': sum(file['bad_records'] for file in files)}}


def unused_tokens(files: list[dict[str, Any]], seq_len: int) -> int:
    """Returns how many tokens of a split's streams no row of seq_len + 1 tokens holds: those at each stream's end."""
    return sum(file['tokens'] % (seq_len + 1) for file in files)


def table(manifest: dict[str, Any], seq_len: int | None) -> list[str]:
    """Returns the lines that prepare prints about a store."""
    lines = [['source', 'split', 'files', 'documents', 'dropped', 'tokens', 'bad files', 'bad records', 'in no row']]
    notes = []
    for name, source in manifest['sources'].items():
        for split, entry in source['splits'].items():
            files = sum(len(file.get('names', [0])) for file in entry['files'])
            counts = [files, *(entry[key] for key in ('documents', 'dropped', 'tokens')), *entry['bad'].values()]
            share = unused_tokens(entry['files'], seq_len) / max(entry['tokens'], 1) if seq_len else 0
            lines.append([name, split, *(f'{n:,}' for n in counts), f'{share:.2%}'])
        notes += _notes(name, source)
    if not seq_len:
        lines = [line[:-1] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [[cell.rjust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    for line, plain in zip(aligned, lines, strict=True):
        line[:2] = plain[0].ljust(widths[0]), plain[1].ljust(widths[1])
    return ['  '.join(line) for line in aligned] + notes


def _notes(name: str, source: dict[str, Any]) -> list[str]:
    """Returns lines about files that are not read, drop_sets that miss, and streams that are equal."""
    reasons: dict[str, list[str]] = {}
    for ignored in source.get('ignored', []):
        reasons.setdefault(ignored['reason'], []).append(ignored['file'])
    notes = [f'{name}: not read ({reason}): {shown(names)}' for reason, names in reasons.items()]
    if source.get('in_drop_sets') == 0:
        notes.append(f'{name}: no record is in a set of drop_sets; check how they are spelled')
    if source.get('without_set'):
        notes.append(
            f'{name}: {source["without_set"]:,} records have no field that could name a set; of them only files and '
            'folders were compared with drop_sets'
        )
    equal: dict[str, list[str]] = {}
    for entry in source['splits'].values():
        for file in entry['files']:
            digests = zip(file.get('names', [file['name']]), file.get('digests', [file.get('sha256')]), strict=False)
            for each, digest in digests:
                if digest and not _NO_TOKENS.startswith(digest):
                    equal.setdefault(digest[: tasks.DIGEST], []).append(each)
    copies = [names for names in equal.values() if len(names) > 1]
    notes += [f'{name}: the same documents in {shown(names)}' for names in copies[:_LISTED_NAMES]]
    if len(copies) > _LISTED_NAMES:
        notes.append(f'{name}: and {len(copies) - _LISTED_NAMES:,} more sets of files with the same documents')
    return notes


def shown(names: list[str]) -> str:
    """Returns the names, of many only the first few and the last, with their number."""
    if len(names) <= _LISTED_NAMES:
        return ', '.join(names)
    return f'{", ".join(names[: _LISTED_NAMES - 2])}, ..., {names[-1]} ({len(names):,} files)'
