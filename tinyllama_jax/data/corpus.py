"""The corpus that is always there: the Python installation itself, in the published corpora's own formats.

Natural language is the language reference's topics and the docstrings of the
standard library, written as SlimPajama is; code is the standard library's source,
written as StarCoderData is. Only the standard library counts, so the corpus is
the same for everyone with the same Python.
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
from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow
import pyarrow.parquet
import zstandard

from tinyllama_jax import errors
from tinyllama_jax.config import SourceConfig

# Tests and tables, what differs between machines, and what isn't part of Python.
_LEFT_OUT = {
    'site-packages', 'dist-packages', '__pycache__', 'test', 'tests', 'idle_test', 'encodings', 'pydoc_data',
    'lib2to3', 'turtledemo', '_bundled', 'lib-dynload', 'sitecustomize.py',
}  # fmt: skip
_LEFT_OUT_PREFIXES = ('config-', '_sysconfigdata')
_TRAIN_FILES = 4
_CODE_FILES = 2
_VALIDATION_PARTS = 20  # one document in so many validates


def with_paths(sources: Mapping[str, SourceConfig], folder: Path) -> dict[str, SourceConfig]:
    """Gives every source without a path one below `folder`, and writes its corpus there unless it is there.

    A source of format parquet is code, any other natural language.
    """
    completed = {}
    for name, source in sources.items():
        if source.path is None:
            path = folder / name
            if not path.exists():
                _write_whole(path, _write_code if source.format == 'parquet' else _write_language)
            source = dataclasses.replace(source, path=str(path))
        completed[name] = source
    return completed


def _write_whole(path: Path, write) -> None:
    """Calls `write(folder)` for a folder that becomes `path` when it is complete."""
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
    documents = sorted(_topics() | _docstrings(), key=_digest)
    validation = [document for document in documents if _validates(document)]
    train = [document for document in documents if not _validates(document)]
    for i in range(_TRAIN_FILES):
        _write_jsonl(folder / 'train' / 'chunk1' / f'example_train_{i}.jsonl.zst', train[i::_TRAIN_FILES])
    _write_jsonl(folder / 'validation' / 'chunk1' / 'example_holdout_0.jsonl.zst', validation)


def _write_code(folder: Path) -> None:
    # The docstrings of a module that validates must not be trained on as part of its code.
    texts = [text for text in _modules() if not _validates(('PythonDocstrings', _module_docstrings(text)))]
    texts.sort(key=lambda text: _digest(('', text)))
    (folder / 'python').mkdir()
    for i in range(_CODE_FILES):
        table = pyarrow.table({'content': pyarrow.array(texts[i::_CODE_FILES], pyarrow.string())})
        pyarrow.parquet.write_table(table, folder / 'python' / f'train-{i:05d}-of-{_CODE_FILES:05d}.parquet')


def _write_jsonl(path: Path, documents: list[tuple[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({'text': text, 'meta': {'redpajama_set_name': kind}}) + '\n' for kind, text in documents)
    path.write_bytes(zstandard.ZstdCompressor().compress(''.join(lines).encode()))


def _digest(document: tuple[str, str]) -> str:
    return hashlib.sha256(document[1].encode(errors='replace')).hexdigest()


def _validates(document: tuple[str, str]) -> bool:
    return int(_digest(document), 16) % _VALIDATION_PARTS == 0


def _topics() -> set[tuple[str, str]]:
    """The chapters of the language reference behind `help('topics')`."""
    from pydoc_data import topics  # large, and needed here only

    return {('PythonTopics', text.strip()) for text in topics.topics.values() if text.strip()}


def _docstrings() -> set[tuple[str, str]]:
    texts = map(_module_docstrings, _modules())
    return {('PythonDocstrings', text) for text in texts if text}


def _modules() -> Iterator[str]:
    """The source of every module of the standard library that is UTF-8, by path."""
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
    """Every docstring of a module in order, a blank line between them."""
    try:
        with warnings.catch_warnings(action='ignore'):
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return ''
    return '\n\n'.join(_docs(tree))


def _docs(node: ast.AST) -> Iterator[str]:
    holders = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    text = ast.get_docstring(node, clean=False)
    if text and text.strip():
        yield inspect.cleandoc(text).strip()
    for child in node.body:
        if isinstance(child, holders):
            yield from _docs(child)
