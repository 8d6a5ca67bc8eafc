"""Keeps the texts of local data files as they are written: the readers of `datasets` guess types from them.

JSON's reader takes texts that look like dates for points in time. CSV's takes NA and None for nothing, and drops zeros
and digits of what looks like numbers.
"""

import contextlib
import functools
import math
import types
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow
import pyarrow.json
from datasets.packaged_modules.csv import csv
from datasets.packaged_modules.json import json

from eval_bridge.harness import patches


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """A context in which `datasets` reads texts as texts; a CSV column stays a number if its text shows all of it."""
    arrow = {**vars(json.paj), 'read_json': _without_times(json.paj.read_json)}
    frames = {**vars(csv.pd), 'read_csv': functools.partial(_read_csv, csv.pd.read_csv)}
    with (  # only in the readers: a task's own functions may use these libraries too
        patches.replaced(json, 'paj', types.SimpleNamespace(**arrow)),
        patches.replaced(json, 'pandas_read_json', functools.partial(json.pandas_read_json, dtype=False)),
        patches.replaced(csv, 'pd', types.SimpleNamespace(**frames)),
    ):
        yield


def _without_times(original: Callable) -> Callable:
    def read_json(source, **options):
        table = original(source, **options)
        schema = pyarrow.schema([field.with_type(_as_text(field.type)) for field in table.schema])
        if schema == table.schema:
            return table
        source.seek(0)
        return original(source, **options, parse_options=pyarrow.json.ParseOptions(explicit_schema=schema))

    return read_json


def _as_text(kind: pyarrow.DataType) -> pyarrow.DataType:
    """Returns an Arrow type with text in the place of times."""
    if pyarrow.types.is_temporal(kind):
        return pyarrow.string()
    if pyarrow.types.is_list(kind):
        return pyarrow.list_(_as_text(kind.value_type))
    if pyarrow.types.is_struct(kind):
        return pyarrow.struct([field.with_type(_as_text(field.type)) for field in kind])
    return kind


def _read_csv(original: Callable, file: Any, *, dtype=None, na_values=None, keep_default_na=True, **options) -> Any:
    """Stands in for pandas.read_csv where datasets calls it: an empty field is missing, and nothing else is."""
    if dtype is not None or na_values is not None:  # the task's file says what is what
        return original(file, dtype=dtype, na_values=na_values, keep_default_na=keep_default_na, **options)
    options |= {'iterator': False, 'chunksize': None}
    table = original(file, dtype=str, na_values=[''], keep_default_na=False, **options)
    for name, column in table.items():
        texts = column.dropna()
        for kind in (int, _number):
            with contextlib.suppress(ValueError):
                if len(texts) and all(str(kind(text)) == text for text in texts):
                    table[name] = column.map(kind, na_action='ignore')
                    break
    return [table]


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError
    return number
