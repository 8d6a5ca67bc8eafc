"""InstructEval's tasks: their prompts word for word, judging, means, few-shot examples that don't fit."""

import json

import pytest

from eval_bridge import evaluate
from eval_bridge.harness import listing
from eval_bridge.tasks import instructeval
from tests.support.scripted import Scripted

pytestmark = pytest.mark.filterwarnings('ignore')  # lm-eval and datasets give warnings of their own

_BBH = {'word_sorting': 6, 'navigate': 13}  # examples


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """A folder of data as local_data.py reads it."""
    root = tmp_path_factory.mktemp('eval')
    for name in ('mmlu', 'bbh', 'drop'):
        (root / name).mkdir()
    for split, count in (('dev', 5), ('test', 3)):
        _write(root / f'mmlu/high_school_physics_{split}.jsonl', [_question(split, number) for number in range(count)])
    for task, count in _BBH.items():
        examples = [{'input': f'{task} {number}?', 'target': f'({number})'} for number in range(count)]
        (root / f'bbh/{task}.json').write_text(json.dumps({'canary': 'x', 'examples': examples}))
    _write(root / 'drop/validation.jsonl', [_passage(number) for number in range(12)])
    return root


def _write(path, examples):
    path.write_text('\n'.join(map(json.dumps, examples)))


def _question(split, number):
    return {
        'question': f'{split} {number}?', 'subject': 'high_school_physics', 'answer': number % 4,
        'choices': [f'{split}{number}{letter}' for letter in 'wxyz'],
    }  # fmt: skip


def _passage(number):
    """Question 5 has two answers, 7 no validated one, 8 a date, 9 a number."""
    none = {'number': '', 'date': {'day': '', 'month': '', 'year': ''}, 'spans': []}
    spans = none | {'spans': [f' answer {number} ']}
    second = none | {'spans': ['another']} if number == 5 else spans
    first = {8: none | {'date': {'day': '3', 'month': 'May', 'year': '1900'}}, 9: none | {'number': '42'}}.get(number)
    many = [] if number == 7 else [first] if first else [spans, second]
    return {
        'section_id': '', 'query_id': str(number), 'passage': f' Passage {number}. ', 'question': f'Question {number}?',
        'answer': first or spans,
        'validated_answers': {name: [answer[name] for answer in many] for name in none},
    }  # fmt: skip


def _run(data, tasks, answer=lambda prompt: '', **options):
    model = Scripted(answer, **options)
    result = evaluate.evaluate(model, tasks, task_data=data, log_samples=True)
    return result, model.asked


def test_mmlu_asks_five_examples_and_two_tokens(data):
    result, asked = _run(data, ['instructeval_mmlu_high_school_physics'], lambda prompt: ' B. because')
    shots = ''.join(
        f'dev {n}?\nA. dev{n}w\nB. dev{n}x\nC. dev{n}y\nD. dev{n}z\nAnswer: {"ABCDA"[n]}\n\n' for n in range(5)
    )
    prompt, options = asked[0]
    assert prompt == (
        'The following are multiple choice questions (with answers) about  high school physics.\n\n'
        + shots
        + 'test 0?\nA. test0w\nB. test0x\nC. test0y\nD. test0z\nAnswer:'
    )
    assert options == {'until': [], 'max_gen_toks': 2, 'do_sample': False}
    scores = result['results']['instructeval_mmlu_high_school_physics']
    assert scores['acc,none'] == pytest.approx(1 / 3) and scores['acc_stderr,none'] > 0  # of A, B, C
    assert result['protocol']['num_fewshot'] == {'instructeval_mmlu_high_school_physics': 5}


def test_few_shot_examples_that_do_not_fit_are_dropped_from_the_last_on(data):
    task = 'instructeval_mmlu_high_school_physics'
    whole = len(_run(data, [task])[1][0][0])
    prompt = _run(data, [task], max_length=whole + 1)[1][0][0]  # two new tokens would be one too many
    assert 'dev 3?' in prompt and 'dev 4?' not in prompt and prompt.endswith('D. test0z\nAnswer:')
    prompt = _run(data, [task], max_length=10)[1][0][0]
    assert 'dev' not in prompt and prompt.startswith('The following') and 'test 0?' in prompt
    assert instructeval.InstructEval.fits('x' * 10_000, 1)  # as before


def test_bbh_takes_its_first_three_as_few_shot_examples(data):
    result, asked = _run(data, ['instructeval_bbh_word_sorting'], lambda prompt: '\n(4), I think')
    shots = ''.join(f'word_sorting {n}?\nAnswer: ({n})\n\n' for n in range(3))
    assert [prompt for prompt, _ in asked] == [f'{shots}word_sorting {n}?\nAnswer:' for n in (3, 4, 5)]
    assert asked[0][1]['max_gen_toks'] == 32
    assert result['results']['instructeval_bbh_word_sorting']['acc,none'] == pytest.approx(1 / 3)


def test_the_score_of_bbh_is_the_plain_mean_over_tasks(data, tmp_path):
    names = listing.task_manager(['instructeval_bbh'], None).task_index['instructeval_bbh'].cfg['task']
    assert len(names) == 27
    (tmp_path / 'two.yaml').write_text(
        'group: two\ntask: [instructeval_bbh_word_sorting, instructeval_bbh_navigate]\n'
        'aggregate_metric_list: [{metric: acc, weight_by_size: false}]\n'
    )
    model = Scripted(lambda prompt: '(3)')  # right once in 3 and once in 10
    result = evaluate.evaluate(model, ['two'], task_data=data, include_path=tmp_path)
    assert result['results']['two']['acc,none'] == pytest.approx((1 / 3 + 1 / 10) / 2)


def test_the_means_are_those_of_instructeval():
    index = listing.task_manager(['instructeval_mmlu', 'instructeval_bbh'], None).task_index
    members = index['instructeval_mmlu'].cfg['task']
    assert len(members) == len(set(members)) == 57
    for name, weighted in {'mmlu': True, 'bbh': False}.items():
        assert index[f'instructeval_{name}'].cfg['aggregate_metric_list'] == [
            {'metric': 'acc', 'weight_by_size': weighted}
        ]


def test_drop_asks_questions_with_one_answer_and_no_passage_of_an_example(data):
    result, asked = _run(data, ['instructeval_drop'], lambda prompt: ' answer 1 and more')
    head = asked[0][0].split('\n\n')[:3]
    shots = [int(text.split()[1].strip('.')) for text in head]
    numbers = [int(prompt.split('\n\n')[3].split()[1].strip('.')) for prompt, _ in asked]
    assert numbers == [number for number in range(12) if number != 5 and number not in shots]
    assert shots == [7, 11, 0]  # random.seed(0); random.sample([n for n in range(12) if n != 5], 3), as in InstructEval
    labels = {number: f'answer {number}' for number in range(12)} | {8: '3 May 1900', 9: '42'}
    shown = ''.join(f'Passage {n}. Question {n}?\nAnswer: {labels[n]}\n\n' for n in shots)
    assert [prompt for prompt, _ in asked] == [f'{shown}Passage {n}. Question {n}?\nAnswer:' for n in numbers]
    assert asked[0][1]['max_gen_toks'] == 8
    right = sum(labels[number] == 'answer 1' for number in numbers)
    assert result['results']['instructeval_drop']['acc,none'] == pytest.approx(right / len(numbers))
