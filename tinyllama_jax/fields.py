"""What the annotation of a setting allows, and the check of a value against it.

int, float                        a finite number > 0
Annotated[float, '>= 0', '< 1']   a finite number within these bounds instead
Literal['cosine', 'wsd']          one of these
Annotated[str, TABLE]             one of the keys of a table
Path                              a file or folder of this machine; ~ is expanded
... | None                        none too
"""

import dataclasses
import math
import operator
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

from tinyllama_jax import errors

_PATH = 'path'
Path = Annotated[str, _PATH]


class Kind(NamedTuple):
    """What a field's annotation allows."""

    type: type
    optional: bool
    choices: Sequence[Any] = ()  # empty: any value of the type
    bounds: Sequence[str] = ()  # of a number
    is_path: bool = False


def kind_of(annotation: Any) -> Kind:
    """Returns what the annotation of a field that is neither a group nor a mapping allows."""
    optional = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    if optional:
        annotation = next(part for part in typing.get_args(annotation) if part is not types.NoneType)
    choices: Sequence[Any] = ()
    bounds: Sequence[str] = ()
    notes: Sequence[Any] = ()
    if typing.get_origin(annotation) is Annotated:
        annotation, *notes = typing.get_args(annotation)
    if typing.get_origin(annotation) is Literal:
        choices = typing.get_args(annotation)
        annotation = type(choices[0])
    elif notes and isinstance(notes[0], Mapping):
        choices = tuple(notes[0])
    elif annotation in (int, float):
        bounds = notes or ('> 0',)
    return Kind(typing.get_origin(annotation) or annotation, optional, choices, bounds, is_path=_PATH in notes)


# Type of a field -> (types of its values, in words).
KINDS = {
    int: ((int,), 'a whole number'),
    float: ((int, float), 'a number'),
    bool: ((bool,), 'true or false'),
    str: ((str,), 'a text'),
    tuple: ((tuple, list), 'a list'),
}
_COMPARISONS = {'>': operator.gt, '>=': operator.ge, '<': operator.lt, '!=': operator.ne}


def check(group: Any, path: str) -> None:
    """Raises UsageError for the first value in a tree of dataclasses that its annotation does not allow.

    `path` names the tree in messages.
    """
    for name, annotation in typing.get_type_hints(type(group), include_extras=True).items():
        value, field = getattr(group, name), f'{path}.{name}'
        if dataclasses.is_dataclass(value):
            check(value, field)
        elif isinstance(value, Mapping):
            for key, entry in value.items():
                check(entry, f'{field}.{key}')
        else:
            _check_value(value, field, kind_of(annotation))


def _check_value(value: Any, field: str, kind: Kind) -> None:
    if value is None and kind.optional:
        return
    if kind.choices:
        if value not in kind.choices:
            listed = ', '.join(['none'] * kind.optional + [str(choice) for choice in kind.choices])
            raise errors.usage(field, f'{value!r} is not one of {listed}')
        return
    types, wanted = KINDS[kind.type]
    if not isinstance(value, types) or (isinstance(value, bool) and kind.type is not bool):
        raise errors.usage(field, f'must be {wanted}, got {value!r}')
    if isinstance(value, int | float) and kind.type is not bool:
        limits = [bound.split() for bound in kind.bounds]
        if isinstance(value, int) and abs(value) >= 2**63:
            raise errors.usage(field, f'must be below 2**63, got {value}')
        if not math.isfinite(value) or not all(_COMPARISONS[sign](value, float(limit)) for sign, limit in limits):
            raise errors.usage(field, f'must be a finite number {" and ".join(kind.bounds)}, got {value}')
