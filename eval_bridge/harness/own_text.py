"""Keeps the texts of local data files as they are written: the readers of `datasets` guess types from them.

JSON's reader takes texts that look like dates for points in time, and beside numbers texts that are JSON for what they
say. CSV's takes NA and None for nothing, and drops zeros and digits of what looks like numbers.
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
from datasets.utils import json as json_lib

from eval_bridge.harness import patches


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """A context in which `datasets` reads texts as texts; a CSV column stays a number if its text shows all of it."""
    arrow = {**vars(json.paj), 'read_json': _without_times(json.paj.read_json)}
    frames = {**vars(csv.pd), 'read_csv': functools.partial(_read_csv, csv.pd.read_csv)}
    encode = functools.partial(_encode, json_lib.json_encode_field)
    with (  # only in the readers: a task's own functions may use these libraries too
        patches.replaced(json, 'paj', types.SimpleNamespace(**arrow)),
        patches.replaced(json, 'json_encode_field', encode),
        patches.replaced(json_lib, 'json_encode_field', encode),
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


def _encode(original: Callable, example: Any, json_field_path: list) -> Any:
    return json_lib.ujson_dumps(example) if isinstance(example, str) else original(example, json_field_path)


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
        for kind, dtype in ((int, 'Int64'), (_number, 'Float64')):  # which have whole numbers beside missing ones
            with contextlib.suppress(ValueError, OverflowError):
                if len(texts) and all(str(kind(text)) == text for text in texts):
                    table[name] = texts.map(kind).astype(dtype).reindex(column.index)
                    break
    return [table]


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError
    return number
