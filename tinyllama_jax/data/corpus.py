"""Writes a corpus from the Python installation itself, in the formats of the published corpora.

Natural language is the topics of the language reference and the docstrings of the
standard library, written like SlimPajama; code is the source of the standard
library, written like StarCoderData. Nothing else is read, so the corpus is the
same for everyone with the same Python.
"""

import ast
import dataclasses
import hashlib
import inspect
import json
import os
import shutil
import sysconfig
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pyarrow
import pyarrow.parquet
import zstandard

from tinyllama_jax import errors
from tinyllama_jax.config import SourceConfig

# Tests, tables, files that differ between machines, and files that are not part of Python.
_LEFT_OUT = {
    'site-packages', 'dist-packages', '__pycache__', 'test', 'tests', 'idle_test', 'encodings', 'pydoc_data',
    'lib2to3', 'turtledemo', '_bundled', 'lib-dynload', 'sitecustomize.py',
}  # fmt: skip
_LEFT_OUT_PREFIXES = ('config-', '_sysconfigdata')
_TRAIN_FILES = 4
_CODE_FILES = 2
_VALIDATION_PARTS = 20  # one document in 20 validates


def with_paths(sources: Mapping[str, SourceConfig], folder: Path) -> dict[str, SourceConfig]:
    """Returns `sources` with a path below `folder` for each that has none; writes the corpora that are missing.

    A source of format parquet gets code, any other natural language. Raises RunError when a corpus cannot be written.
    """
    completed = {}
    for name, source in sources.items():
        if source.path is None:
            path = folder / name
            if not path.exists():
                _write_corpus(path, _write_code if source.format == 'parquet' else _write_language)
            source = dataclasses.replace(source, path=str(path))
        completed[name] = source
    return completed


def _write_corpus(path: Path, write: Callable[[Path], None]) -> None:
    """Calls `write(folder)` and renames the folder to `path` when it is complete."""
    partial = path.with_name(path.name + '.part')
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write(partial)
        partial.rename(path)
    except OSError as error:
        raise errors.RunError(
            f'The corpus {path} cannot be written ({error.strerror}); make room and run prepare again.'
        ) from None


def _write_language(folder: Path) -> None:
    docstrings = {('PythonDocstrings', text) for text in map(_module_docstrings, _modules()) if text}
    documents = sorted(_topics() | docstrings, key=lambda document: _digest(document[1]))
    validation = [(kind, text) for kind, text in documents if _validates(text)]
    train = [(kind, text) for kind, text in documents if not _validates(text)]
    for i in range(_TRAIN_FILES):
        _write_jsonl(folder / 'train' / 'chunk1' / f'example_train_{i}.jsonl.zst', train[i::_TRAIN_FILES])
    _write_jsonl(folder / 'validation' / 'chunk1' / 'example_holdout_0.jsonl.zst', validation)


def _write_code(folder: Path) -> None:
    # A module's code holds its docstrings: where they validate, the code must not train.
    texts = sorted((text for text in _modules() if not _validates(_module_docstrings(text))), key=_digest)
    (folder / 'python').mkdir()
    for i in range(_CODE_FILES):
        table = pyarrow.table({'content': pyarrow.array(texts[i::_CODE_FILES], pyarrow.string())})
        pyarrow.parquet.write_table(table, folder / 'python' / f'train-{i:05d}-of-{_CODE_FILES:05d}.parquet')


def _write_jsonl(path: Path, documents: list[tuple[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({'text': text, 'meta': {'redpajama_set_name': kind}}) + '\n' for kind, text in documents)
    path.write_bytes(zstandard.ZstdCompressor().compress(''.join(lines).encode()))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors='replace')).hexdigest()


def _validates(text: str) -> bool:
    return int(_digest(text), 16) % _VALIDATION_PARTS == 0


def _topics() -> set[tuple[str, str]]:
    """Returns the chapters of the language reference behind `help('topics')`."""
    from pydoc_data import topics  # large, and needed only here

    return {('PythonTopics', text.strip()) for text in topics.topics.values() if text.strip()}


def _modules() -> Iterator[str]:
    """Yields the source of every module of the standard library, ordered by path; skips files that are not UTF-8."""
    for parent, folders, files in os.walk(sysconfig.get_path('stdlib')):
        folders[:] = sorted(filter(_wanted, folders))
        for name in sorted(filter(_wanted, files)):
            if name.endswith('.py'):
                try:
                    text = Path(parent, name).read_text(encoding='utf-8')
                except (UnicodeDecodeError, OSError):
                    continue
                if text.strip():
                    yield text


def _wanted(name: str) -> bool:
    return name not in _LEFT_OUT and not name.startswith(_LEFT_OUT_PREFIXES)


def _module_docstrings(source: str) -> str:
    """Returns all docstrings of a module in order, with a blank line between them."""
    try:
        with warnings.catch_warnings(action='ignore'):
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return ''
    return '\n\n'.join(_docs(tree))


def _docs(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    text = ast.get_docstring(node, clean=False)
    if text and text.strip():
        yield inspect.cleandoc(text).strip()
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docs(child)
