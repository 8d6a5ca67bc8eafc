"""Annotations of settings: what each allows."""

import dataclasses
from typing import Annotated, Literal

import pytest

from tinyllama_jax import errors, fields
from tinyllama_jax.fields import Kind


@pytest.mark.parametrize(
    ('annotation', 'kind'),
    [
        (int, Kind(int, False, bounds=('> 0',))),
        (str | None, Kind(str, True)),
        (tuple[str, ...], Kind(tuple, False)),
        (Literal[1, 3], Kind(int, False, (1, 3))),
        (Literal['a', 'b'] | None, Kind(str, True, ('a', 'b'))),
        (Annotated[float, '>= 0', '< 1'] | None, Kind(float, True, bounds=('>= 0', '< 1'))),
        (Annotated[str, {'a': (), 'b': None}], Kind(str, False, ('a', 'b'))),
        (fields.Path | None, Kind(str, True, is_path=True)),
    ],
)
def test_an_annotation_says_what_a_field_allows(annotation, kind):
    found = fields.kind_of(annotation)
    assert found._replace(choices=tuple(found.choices), bounds=tuple(found.bounds)) == kind


@dataclasses.dataclass(frozen=True)
class Group:
    """A group of settings with one of each kind."""

    count: int = 1
    share: Annotated[float, '>= 0', '< 1'] = 0.0
    flag: bool = False
    name: str | None = None


@pytest.mark.parametrize(
    ('value', 'message'),
    [
        (Group(count=0), 'x.count: must be a finite number > 0, got 0'),
        (Group(count=2**63), 'x.count: must be below'),
        (Group(count=True), 'x.count: must be a whole number, got True'),
        (Group(share=1.0), 'x.share: must be a finite number >= 0 and < 1, got 1.0'),
        (Group(share=float('nan')), 'x.share: must be a finite number'),
        (Group(flag=1), 'x.flag: must be true or false, got 1'),
        (Group(name=1), 'x.name: must be a text, got 1'),
    ],
)
def test_a_value_that_is_not_allowed_is_named(value, message):
    fields.check(Group(), 'x')
    with pytest.raises(errors.UsageError, match=message):
        fields.check(value, 'x')
