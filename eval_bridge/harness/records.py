"""What the records of the tasks' datasets must hold, beyond the types of their fields.

Each function takes a record, whose fields have the types of local_data.py's layouts, and returns what is wrong with it,
or None: a task would end with a traceback at such a record, or ask something that is no question.
"""

from collections.abc import Mapping
from typing import Any

Record = Mapping[str, Any]


def hellaswag(record: Record) -> str | None:
    """Endings, and the number of the right one."""
    return _texts('endings', record['endings']) or _index('label', record['label'], len(record['endings']))


def lettered(record: Record) -> str | None:
    """OpenBookQA and ARC: texts and labels of the choices, and the right one's label."""
    texts, labels = (record['choices'].get(name) for name in ('text', 'label'))
    fault = _texts('choices.text', texts) or _texts('choices.label', labels)
    if fault:
        return fault
    if len(texts) != len(labels):
        return f'choices has {len(texts)} texts and {len(labels)} labels'
    return _one_of('answerKey', record['answerKey'], labels)


def winogrande(record: Record) -> str | None:
    """A sentence with a gap, two options for it, and the number of the right one."""
    if '_' not in record['sentence']:
        return f'sentence is {record["sentence"]!r}, which has no gap _'
    return _texts('option1 and option2', [record['option1'], record['option2']]) or _one_of(
        'answer', record['answer'], ['1', '2']
    )


def boolq(record: Record) -> str | None:
    """0 or 1."""
    return _index('label', record['label'], 2)


def piqa(record: Record) -> str | None:
    """Two solutions, and the number of the right one."""
    return _texts('sol1 and sol2', [record['sol1'], record['sol2']]) or _index('label', record['label'], 2)


def mmlu(record: Record) -> str | None:
    """Four choices, and the number of the right one."""
    if len(record['choices']) != 4 or not all(isinstance(choice, str) for choice in record['choices']):
        return f'choices is {record["choices"]!r}, which are not four texts'
    return _index('answer', record['answer'], 4)


def bbh(record: Record) -> str | None:
    """A question and its answer, which every text would begin with if it were empty."""
    return _texts('input and target', [record['input'], record['target'].strip()])


def drop(record: Record) -> str | None:
    """An answer, and lists of the parts of those that validated it."""
    many = record['validated_answers']
    parts = [many.get(name) for name in ('number', 'date', 'spans')]
    if not all(isinstance(part, list) for part in parts) or len({len(part) for part in parts}) > 1:
        return f'validated_answers is {many!r}, which are not lists number, date and spans of one length'
    answers = [dict(zip(('number', 'date', 'spans'), answer, strict=True)) for answer in zip(*parts, strict=True)]
    names = ['answer', *['validated_answers'] * len(answers)]
    return next(filter(None, map(_answer, names, [record['answer'], *answers])), None)


def _answer(name: str, answer: Record) -> str | None:
    number, date, spans = (answer.get(part) for part in ('number', 'date', 'spans'))
    dated = isinstance(date, dict) and all(isinstance(date.get(part), str) for part in ('day', 'month', 'year'))
    if isinstance(number, str) and dated and isinstance(spans, list) and all(isinstance(span, str) for span in spans):
        return None
    return f'{name} has {answer!r}, which is no number, date {{day, month, year}} and spans, all of them texts'


def _texts(name: str, values: Any) -> str | None:
    if isinstance(values, list) and values and all(isinstance(value, str) and value for value in values):
        return None
    return f'{name} is {values!r}, and each must be a text that is not empty'


def _index(name: str, value: int | str, count: int) -> str | None:
    return _one_of(name, value, [str(number) for number in range(count)])


def _one_of(name: str, value: int | str, known: list[str]) -> str | None:
    return None if str(value) in known else f'{name} is {value!r}, which is none of {", ".join(known)}'
