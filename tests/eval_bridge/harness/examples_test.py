"""Rules for examples: real examples break none, and a fault names the field and its value."""

import gzip
import json
import re

import pytest

from eval_bridge.harness import examples, local_data

FILES = {
    'hellaswag/validation.jsonl': 'Rowan/hellaswag', 'arc_challenge/test.jsonl': 'allenai/ai2_arc/ARC-Challenge',
    'boolq/validation.jsonl': 'aps/super_glue/boolq', 'piqa/validation.jsonl': 'baber/piqa',
    'drop/validation.jsonl': 'EleutherAI/drop', 'mmlu/astronomy_dev.jsonl': 'cais/mmlu',
    'mmlu/astronomy_test.jsonl': 'cais/mmlu', 'bbh/word_sorting.json': 'SaylorTwift/bbh',
}  # fmt: skip


@pytest.mark.parametrize('path', FILES)
def test_real_examples_break_no_rule(test_data_dir, path):
    file = test_data_dir / 'eval' / path
    text = file.read_bytes() if file.exists() else gzip.decompress(file.with_name(f'{file.name}.gz').read_bytes())
    real = json.loads(text)['examples'] if path.endswith('.json') else list(map(json.loads, text.splitlines()))
    rules = local_data.DATASETS[FILES[path]].rules
    assert real and rules and not [fault for example in real for rule in rules if (fault := rule(example))]


CHOICES = {'text': ['one', 'two'], 'label': ['A', 'B']}
NOTHING = {'number': '', 'date': {'day': '', 'month': '', 'year': ''}, 'spans': []}


@pytest.mark.parametrize(
    ('rule', 'good', 'bad', 'fault'),
    [
        (examples.non_empty('a', 'b'), {'a': 'x', 'b': 'y'}, {'b': ''}, "b is '', and it must be a text"),
        (examples.non_empty('a'), {'a': ['x']}, {'a': []}, r'a is \[\], and each must be a text'),
        (examples.non_empty('a'), {'a': ['x']}, {'a': ['x', None]}, r"a is \['x', None\], and each must be a text"),
        (examples.non_blank('a'), {'a': ' x'}, {'a': ' '}, "a is '', and it must be a text that is not empty"),
        (examples.texts('a', 2), {'a': ['', 'x']}, {'a': ['x']}, r"a is \['x'\], which are not 2 texts"),
        (examples.gap('a'), {'a': 'x _'}, {'a': 'x'}, "a is 'x', which has no gap _"),
        (examples.one_of('a', '1', '2'), {'a': 2}, {'a': '3'}, "a is '3', which is none of 1, 2"),
        (examples.index('a', 2), {'a': '1'}, {'a': 2}, 'a is 2, which is none of 0, 1'),
        (examples.index('a', 'b'), {'a': 1, 'b': ['x', 'y']}, {'b': ['x']}, 'a is 1, which is none of 0'),
        (examples.lettered, {'choices': CHOICES, 'answerKey': 'B'}, {'answerKey': 'C'}, 'C.* none of A, B'),
        (
            examples.lettered,
            {'choices': CHOICES, 'answerKey': 'B'},
            {'choices': {}},
            'choices.text is None, which is not',
        ),
        (examples.lettered, {'choices': CHOICES, 'answerKey': 'B'}, {'choices': {'text': 'ab'}}, "text is 'ab', which"),
        (
            examples.drop,
            {'answer': NOTHING, 'validated_answers': {name: [part] for name, part in NOTHING.items()}},
            {'validated_answers': {'number': [1], 'date': [NOTHING['date']], 'spans': [[]]}},
            "validated_answers is {'number': 1, .* which must have texts",
        ),
    ],
)
def test_a_rule_passes_what_is_right_and_names_what_is_wrong(rule, good, bad, fault):
    assert rule(good) is None
    assert re.search(fault, rule(good | bad))
