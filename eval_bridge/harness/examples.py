"""Rules for the examples of a task's dataset, beyond the types of their fields; local_data.py gives them to datasets.

A `Rule` takes an example whose fields have the right types and returns what is wrong with it, or None. An example that
breaks a rule would end its task with a traceback, or get a score without meaning.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Example = Mapping[str, Any]
Rule = Callable[[Example], str | None]


def non_empty(*fields: str) -> Rule:
    """Returns the rule that each of `fields` is a text that is not empty, or a list of one or more such texts."""

    def fault(example: Example) -> str | None:
        return next(filter(None, (_empty_text(field, example[field]) for field in fields)), None)

    return fault


def non_blank(field: str) -> Rule:
    """Returns the rule that `field` is a text that is more than white space."""
    return lambda example: _empty_text(field, example[field].strip())


def texts(field: str, count: int) -> Rule:
    """Returns the rule that `field` is a list of `count` texts, which may be empty."""

    def fault(example: Example) -> str | None:
        values = example[field]
        right = len(values) == count and all(isinstance(value, str) for value in values)
        return None if right else f'{field} is {values!r}, which are not {count} texts'

    return fault


def gap(field: str) -> Rule:
    """Returns the rule that `field` is a text with a gap, _, to fill in."""
    return lambda example: None if '_' in example[field] else f'{field} is {example[field]!r}, which has no gap _'


def one_of(field: str, *values: str) -> Rule:
    """Returns the rule that `field` is one of `values`, as text or as a number."""
    return lambda example: _unknown(field, example[field], values)


def index(field: str, count: int | str) -> Rule:
    """Returns the rule that `field` is an index below `count`, or into the list in the field that `count` names."""

    def fault(example: Example) -> str | None:
        choices = range(len(example[count]) if isinstance(count, str) else count)
        return _unknown(field, example[field], list(map(str, choices)))

    return fault


def lettered(example: Example) -> str | None:
    """The rule of OpenBookQA and ARC: `choices` has texts and as many labels; `answerKey` is one of the labels."""
    answers, labels = (example['choices'].get(name) for name in ('text', 'label'))
    for name, values in {'text': answers, 'label': labels}.items():
        if not isinstance(values, list):
            return f'choices.{name} is {values!r}, which is not a list'
        if fault := _empty_text(f'choices.{name}', values):
            return fault
    if len(answers) != len(labels):
        return f'choices has {len(answers)} texts and {len(labels)} labels'
    return _unknown('answerKey', example['answerKey'], labels)


def drop(example: Example) -> str | None:
    """The rule of DROP: it has an answer, and the parts of its validated answers are lists of one length."""
    names = ('number', 'date', 'spans')
    many = example['validated_answers']
    parts = [many.get(name) for name in names]
    if not all(isinstance(part, list) for part in parts) or len({len(part) for part in parts}) > 1:
        return f'validated_answers is {many!r}, which must be lists number, date and spans of one length'
    answers = [('answer', example['answer'])]
    answers += [('validated_answers', dict(zip(names, answer, strict=True))) for answer in zip(*parts, strict=True)]
    for field, answer in answers:
        number, date, spans = (answer.get(name) for name in names)
        dated = isinstance(date, dict) and all(isinstance(date.get(part), str) for part in ('day', 'month', 'year'))
        listed = isinstance(spans, list) and all(isinstance(span, str) for span in spans)
        if not (isinstance(number, str) and dated and listed):
            return f'{field} is {answer!r}, which must have texts: number, date {{day, month, year}} and a list spans'
    return None


def _empty_text(field: str, value: Any) -> str | None:
    values = value if isinstance(value, list) else [value]
    if values and all(isinstance(text, str) and text for text in values):
        return None
    return f'{field} is {value!r}, and {"each" if isinstance(value, list) else "it"} must be a text that is not empty'


def _unknown(field: str, value: int | str, known: Sequence[str]) -> str | None:
    return None if str(value) in known else f'{field} is {value!r}, which is none of {", ".join(known)}'
