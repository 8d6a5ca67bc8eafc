"""Tasks from local files: every task of Tables 2 and 3, missing and malformed data, splits that may be missing."""

import gzip
import json
import os

import pytest

from eval_bridge import evaluate
from eval_bridge.tables import results
from tests.support.scripted import Scripted
from tinyllama_jax import errors

pytestmark = pytest.mark.filterwarnings('ignore')  # lm-eval and datasets give warnings of their own

CHOICES = {'text': ['one', 'two'], 'label': ['A', 'B']}
NO_ANSWER = {'number': '', 'date': {'day': '', 'month': '', 'year': ''}, 'spans': []}
EXAMPLES = {
    'hellaswag/validation.jsonl': {
        'ind': 0, 'activity_label': 'Work', 'ctx_a': 'A man', 'ctx_b': 'he', 'endings': ['runs.', 'sits.'],
        'label': '1',
    },
    'openbookqa/test.jsonl': {'question_stem': 'What?', 'choices': CHOICES, 'answerKey': 'A'},
    'winogrande/validation.jsonl': {'sentence': 'a _ b', 'option1': 'x', 'option2': 'y', 'answer': '2'},
    'arc_easy/test.jsonl': {'question': 'Which?', 'choices': CHOICES, 'answerKey': 'B'},
    'arc_challenge/test.jsonl': {'question': 'Which?', 'choices': CHOICES, 'answerKey': 'B'},
    'boolq/validation.jsonl': {'passage': 'text', 'question': 'is it', 'label': 1},
    'piqa/validation.jsonl': {'goal': 'go', 'sol1': 'a', 'sol2': 'bb', 'label': 0},
    'drop/validation.jsonl': {
        'query_id': '1', 'section_id': '', 'passage': 'p', 'question': 'q?', 'answer': NO_ANSWER | {'spans': ['s']},
        'validated_answers': {'number': [''], 'date': [NO_ANSWER['date']], 'spans': [['s']]},
    },
}  # fmt: skip

HELLASWAG = EXAMPLES['hellaswag/validation.jsonl']
MMLU = {'question': 'Why?', 'subject': 'astronomy', 'choices': ['a', 'b', 'c', 'd'], 'answer': 0}


def _write(root, path, examples):
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    text = '\n'.join(map(json.dumps, examples))
    file.write_bytes(gzip.compress(text.encode()) if file.suffix == '.gz' else text.encode())


@pytest.fixture
def data(tmp_path):
    for number, (path, example) in enumerate(EXAMPLES.items()):
        many = [example | {'question': f'{index}?'} if 'question' in example else example for index in range(4)]
        _write(tmp_path / 'eval', f'{path}.gz' if number % 2 else path, many)
    _write(tmp_path / 'eval', 'mmlu/astronomy_test.jsonl', [MMLU])
    return tmp_path / 'eval'


def test_every_task_of_table_2_runs_from_files(data):
    model = Scripted()
    result = evaluate.evaluate(model, list(results.TABLES[2]), task_data=data)
    assert len(results.scores(2, result, 'any')) == len(results.TABLES[2]) + 1  # and the average
    assert {pair for pair in model.asked if pair[0].startswith('Question: go')} == {
        ('Question: go\nAnswer:', ' a'), ('Question: go\nAnswer:', ' bb'),
    }  # fmt: skip
    stamp = result['protocol']['task_data']['arc_easy']['test']
    assert stamp['file'] == 'arc_easy/test.jsonl.gz' and len(stamp['sha256']) == 64


def test_without_a_training_split_few_shot_examples_come_from_validation_and_that_is_printed(data, capsys):
    result = evaluate.evaluate(Scripted(), ['drop'], task_data=data, limit=1)
    assert result['protocol']['shots_from_validation'] == ['drop']
    assert f'no training split of drop in {data}: few-shot examples are from validation' in capsys.readouterr().err
    _write(data, 'drop/train.jsonl', [EXAMPLES['drop/validation.jsonl'] | {'passage': 'training'}] * 4)
    model = Scripted()
    result = evaluate.evaluate(model, ['drop'], task_data=data, limit=1)
    assert model.asked[0][0].count('training') == 3
    assert result['protocol']['shots_from_validation'] == []
    assert set(result['protocol']['task_data']['drop']) == {'train', 'validation'}


def test_a_group_with_missing_members_is_refused_and_the_rest_named(data):
    row = {'question': '?', 'subject': 'astronomy', 'choices': list('wxyz'), 'answer': 2}
    for split in ('dev', 'test'):
        _write(data, f'mmlu/astronomy_{split}.jsonl', [row] * 5)
    with pytest.raises(errors.UsageError) as caught:
        evaluate.evaluate(Scripted(), ['mmlu'], task_data=data)
    said = str(caught.value)
    assert 'lacks the data of 56 of 57 tasks, and a mean over the others is another number' in said
    assert 'mmlu/virology_test.jsonl, mmlu/virology_dev.jsonl' in said and 'mmlu/astronomy_test' not in said
    assert 'JSON lines, or .gz of it, its examples with question, subject, choices, answer' in said
    assert said.endswith('or name only tasks whose data is there: --tasks=mmlu_astronomy.')
    result = evaluate.evaluate(Scripted(), ['mmlu_astronomy'], task_data=data)
    assert result['n-shot']['mmlu_astronomy'] == 5
    with pytest.raises(errors.UsageError, match=r'lacks the data of 27 of 27 tasks.*bbh/navigate.json.*list examples'):
        evaluate.evaluate(Scripted(), ['instructeval_bbh'], task_data=data)


@pytest.mark.parametrize(
    ('task', 'path', 'examples', 'message'),
    [
        ('piqa', 'piqa/validation.jsonl', None, r'lacks the data of 1 of 1 tasks.*piqa/validation\.jsonl'),
        ('arc_easy', 'arc_easy/test.jsonl.gz', [], r'arc_easy cannot be loaded .*test\.jsonl'),
        ('boolq', 'boolq/validation.jsonl.gz', [{'passage': 'a', 'question': 'b'}],
         r'validation\.jsonl\.gz, example 1: label is None, which is not a number'),
        ('boolq', 'boolq/validation.jsonl.gz', [{'passage': 'a', 'question': 'b', 'label': 0}, {'passage': None}],
         'example 2: passage is None, which is not a text'),
        ('hellaswag', 'hellaswag/validation.jsonl', [EXAMPLES['hellaswag/validation.jsonl'] | {'endings': 'runs.'}],
         "hellaswag/validation.jsonl, example 1: endings is 'runs.', which is not a list"),
        ('piqa', 'piqa/validation.jsonl', [EXAMPLES['piqa/validation.jsonl'] | {'label': 2}],
         'example 1: label is 2, which is none of 0, 1'),
        ('piqa', 'piqa/validation.jsonl', [EXAMPLES['piqa/validation.jsonl'], {'goal': {}}],
         r'example 2: goal is \{\}, which is not a text'),
        ('hellaswag', 'hellaswag/validation.jsonl', [HELLASWAG | {'label': 'x'}],
         "label is 'x', which is none of 0, 1"),
        ('hellaswag', 'hellaswag/validation.jsonl', [HELLASWAG, HELLASWAG | {'endings': ['a', '']}],
         r"example 2: endings is \['a', ''\], and each must be a text that is not empty"),
        ('arc_easy', 'arc_easy/test.jsonl.gz', [EXAMPLES['arc_easy/test.jsonl'] | {'answerKey': 'Z'}],
         "example 1: answerKey is 'Z', which is none of A, B"),
        ('openbookqa', 'openbookqa/test.jsonl.gz', [
            EXAMPLES['openbookqa/test.jsonl'] | {'choices': {'text': ['a'], 'label': ['A', 'B']}},
        ], 'example 1: choices has 1 texts and 2 labels'),
        ('winogrande', 'winogrande/validation.jsonl', [EXAMPLES['winogrande/validation.jsonl'] | {'answer': '3'}],
         "answer is '3', which is none of 1, 2"),
        ('winogrande', 'winogrande/validation.jsonl', [EXAMPLES['winogrande/validation.jsonl'] | {'sentence': 'a b'}],
         'has no gap _'),
        ('winogrande', 'winogrande/validation.jsonl', [EXAMPLES['winogrande/validation.jsonl'] | {'option1': ''}],
         "example 1: option1 is '', and it must be a text that is not empty"),
        ('boolq', 'boolq/validation.jsonl.gz', [EXAMPLES['boolq/validation.jsonl'] | {'label': -1}],
         'label is -1, which is none of 0, 1'),
        ('drop', 'drop/validation.jsonl.gz', [EXAMPLES['drop/validation.jsonl'] | {'answer': {'number': '1'}}],
         'example 1: answer is .* which must have texts: number, date'),
        ('drop', 'drop/validation.jsonl.gz', [EXAMPLES['drop/validation.jsonl'] | {
            'validated_answers': {'number': ['1', '2'], 'date': [NO_ANSWER['date']], 'spans': [[]]},
        }], 'must be lists number, date and spans of one length'),
        ('instructeval_drop', 'drop/validation.jsonl.gz', [EXAMPLES['drop/validation.jsonl']] * 3,
         'has 3 usable examples: 3 are few-shot examples, and no question is left'),
        ('mmlu_astronomy', 'mmlu/astronomy_dev.jsonl', [MMLU | {'answer': 4}] * 5, 'answer is 4, which is none of'),
        ('mmlu_astronomy', 'mmlu/astronomy_dev.jsonl', [MMLU | {'choices': ['a', 'b']}] * 5, 'which are not 4 texts'),
        ('mmlu_astronomy', 'mmlu/astronomy_dev.jsonl', [MMLU] * 4, 'has 4 examples, and 5 are needed'),
        ('instructeval_bbh_navigate', 'bbh/navigate.json', {'examples': [{'input': 'a', 'target': 'b'}] * 3},
         'has 3 usable examples: 3 are few-shot examples'),
        ('bbh_fewshot_navigate', 'bbh/navigate.json', {'examples': [{'input': 'a', 'target': ''}]},
         "example 1: target is '', and it must be a text that is not empty"),
        ('piqa', 'piqa/validation.jsonl', ['text'], r'piqa cannot be loaded .*validation\.jsonl'),
    ],
)  # fmt: skip
def test_data_that_is_missing_or_malformed_is_named(data, task, path, examples, message):
    if examples is None:
        (data / path).unlink()
    else:
        _write(data, path, [examples] if isinstance(examples, dict) else examples)
    with pytest.raises(errors.UsageError, match=message):
        evaluate.evaluate(Scripted(), [task], task_data=data)


def test_a_file_that_is_not_text_or_has_no_lines_is_named(data):
    for content in (b'\xff\xfe{"goal": 1}', b'\n\n\n'):
        (data / 'piqa/validation.jsonl').write_bytes(content)
        with pytest.raises(errors.UsageError, match=r'piqa.*validation\.jsonl'):
            evaluate.evaluate(Scripted(), ['piqa'], task_data=data)
    text = json.dumps(EXAMPLES['piqa/validation.jsonl']).encode()
    (data / 'piqa/validation.jsonl').write_bytes(text.replace(b'"go"', b'"g\xff"'))
    with pytest.raises(errors.UsageError, match='the data of piqa is not valid UTF-8'):
        evaluate.evaluate(Scripted(), ['piqa'], task_data=data)


def test_a_file_cut_short_is_named(data):
    path = data / 'piqa/validation.jsonl'
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(errors.UsageError, match='piqa cannot be loaded'):
        evaluate.evaluate(Scripted(), ['piqa'], task_data=data)


def test_task_files_find_their_data_beside_the_folder(data, tmp_path):
    (tmp_path / 'tasks').mkdir()
    (tmp_path / 'tasks' / 'group.yaml').write_text(
        'group: mine\ntask:\n- task: piqa\n  dataset_path: json\n  training_split: null\n'
        '  dataset_kwargs: {data_files: {validation: eval/piqa/validation.jsonl}}\n'
    )
    elsewhere = tmp_path / 'a' / 'b'
    elsewhere.mkdir(parents=True)
    (tmp_path / 'tasks').rename(elsewhere / 'tasks')
    result = evaluate.evaluate(Scripted(), ['mine'], include_path=elsewhere / 'tasks', task_data=data, limit=1)
    assert result['n-samples']['piqa']['effective'] == 1


TEXT = {
    'task': 'mine', 'dataset_path': 'json', 'dataset_kwargs': {'data_files': {'test': 'mine.jsonl'}},
    'test_split': 'test', 'output_type': 'generate_until', 'doc_to_text': 'q', 'doc_to_target': 'a',
    'metric_list': [{'metric': 'exact_match', 'aggregation': 'mean', 'higher_is_better': True}],
}  # fmt: skip


@pytest.mark.parametrize('name', ['mine.jsonl', 'mine.jsonl.gz', 'mine.csv'])
def test_answers_that_look_like_dates_are_the_file_s_and_files_replaced_in_place_are_read_anew(tmp_path, name):
    folder = tmp_path / 'tasks' / 'deeper'
    folder.mkdir(parents=True)
    kind = 'csv' if name.endswith('csv') else 'json'
    task = TEXT | {'dataset_path': kind, 'dataset_kwargs': {'data_files': {'test': name}}}
    (folder / 'mine.yaml').write_text(json.dumps(task))  # its data is beside it
    for answer in ('2020-01-01', '2021-12-31'):
        text = f'q,a\nday?,{answer}\n' if kind == 'csv' else json.dumps({'q': 'day?', 'a': answer})
        (folder / name).write_bytes(gzip.compress(text.encode(), mtime=0) if name.endswith('gz') else text.encode())
        os.utime(folder / name, (1e9, 1e9))
        result = evaluate.evaluate(
            Scripted(lambda prompt, answer=answer: answer), ['mine'], include_path=tmp_path / 'tasks'
        )
        assert result['results']['mine']['exact_match,none'] == 1


def _answer(folder, name, answer):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps({'q': 'day?', 'a': answer}))
    os.utime(folder / name, (1e9, 1e9))


def test_a_folder_of_data_beside_its_task_is_found_and_read_anew(tmp_path):
    (tmp_path / 'mine.yaml').write_text(json.dumps(TEXT | {'dataset_path': 'days', 'dataset_kwargs': None}))
    for answer in ('2020-01-01', '2021-12-31'):
        _answer(tmp_path, 'days/test.jsonl', answer)
        result = evaluate.evaluate(Scripted(lambda prompt, answer=answer: answer), ['mine'], include_path=tmp_path)
        assert result['results']['mine']['exact_match,none'] == 1


def test_data_beside_an_included_file_and_a_group_s_file_is_found(tmp_path):
    def kwargs(name):
        return {'dataset_kwargs': {'data_files': {'test': name}}}

    _answer(tmp_path, 'of_template.jsonl', 'x')
    _answer(tmp_path, 'of_group.jsonl', 'y')
    (tmp_path / 'deeper').mkdir()
    (tmp_path / 'template').write_text(json.dumps(TEXT | kwargs('of_template.jsonl')))
    (tmp_path / 'deeper/mine.yaml').write_text(json.dumps({'task': 'mine', 'include': '../template'}))
    group = {'group': 'group', 'task': [{'task': 'mine', **kwargs('of_group.jsonl')}]}
    (tmp_path / 'group.yaml').write_text(json.dumps(group))
    for name, answer in (('mine', 'x'), ('group', 'y')):
        result = evaluate.evaluate(Scripted(lambda prompt, answer=answer: answer), [name], include_path=tmp_path)
        assert result['results']['mine']['exact_match,none'] == 1


def test_what_is_scored_is_what_is_stamped(data):
    seen = set()
    for goal in ('one', 'two'):
        _write(
            data, 'piqa/validation.jsonl', [EXAMPLES['piqa/validation.jsonl'] | {'goal': goal, 'sol1': '2020-01-01'}]
        )
        os.utime(data / 'piqa/validation.jsonl', (1e9, 1e9))
        model = Scripted()
        result = evaluate.evaluate(model, ['piqa'], task_data=data)
        assert model.asked[0] == (f'Question: {goal}\nAnswer:', ' 2020-01-01')
        seen.add(result['protocol']['task_data']['piqa']['validation']['sha256'])
    assert len(seen) == 2


def test_real_data_runs(test_data_dir):
    tasks = ['hellaswag', 'piqa', 'boolq', 'arc_challenge', 'drop', 'mmlu_astronomy', 'bbh_fewshot_word_sorting']
    tasks += [f'instructeval_{name}' for name in ('mmlu_astronomy', 'bbh_word_sorting', 'drop')]
    model = Scripted()
    result = evaluate.evaluate(model, tasks, task_data=test_data_dir / 'eval', limit=1)
    assert set(result['results']) == set(tasks)
