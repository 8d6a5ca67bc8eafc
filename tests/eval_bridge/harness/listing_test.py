"""Listing tasks: what lm-eval builds, in every form that a group can have; files that cannot be used are named."""

import json
import re

import pytest

from eval_bridge import evaluate
from eval_bridge.harness import listing
from tests.support.scripted import PLAIN, Scripted
from tinyllama_jax import errors

pytestmark = pytest.mark.filterwarnings('ignore')  # lm-eval and datasets give warnings of their own

FILES = {
    'one': {'task': 'one', 'tag': ['tagged', 'other'], **PLAIN},
    'two': {'task': 'two', 'tag': 'tagged', 'include': 'base'},
    'inner': {'group': 'inner', 'task': ['two'], 'description': 'inner '},
    'plain': {'group': 'plain', 'task': ['one', {'task': 'two', 'task_alias': 'second'}]},
    'tags': {'group': 'tags', 'task': ['tagged'], 'target_delimiter': '-'},
    'inline': {'group': 'inline', 'task': [{'task': 'new', **PLAIN}]},
    'subgroup': {'group': 'subgroup', 'task': [{'group': 'sub', 'task': ['one', {'task': 'new', **PLAIN}]}]},
    'deep': {'group': 'deep', 'task': [
        {'group': 'a', 'task': [{'group': 'b', 'description': 'b ', 'task': [{'task': 'new', **PLAIN}, 'one']}]},
        {'group': 'inner', 'description': 'changed '},
    ]},
    'defined': {'group': 'defined', 'task': ['fresh'], **PLAIN},
}  # fmt: skip


def _write(root, files):
    for name, content in files.items():
        (root / f'{name}.yaml').write_text(json.dumps(content))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp('listing')
    _write(root, FILES)
    (root / 'base').write_text(json.dumps(PLAIN))
    (root / 'data.jsonl').write_text('{"q": "1", "a": "2"}\n')
    return root


@pytest.mark.parametrize('name', [*FILES, 'tagged'])
def test_every_form_of_a_group_is_listed_as_lm_eval_builds_it(folder, name, monkeypatch):
    monkeypatch.chdir(folder)
    manager = listing.task_manager([name], folder)
    built = {task: each.config for task, each in manager.load([name])['tasks'].items()}
    found = {task.name: task.config for task in listing.declared([name], manager, resolve=True)}
    assert list(found) == list(built)
    for task, config in found.items():
        ours = {field: value for field, value in config.items() if field != 'fewshot_config'}
        assert ours == {field: getattr(built[task], field) for field in ours}


def test_a_task_in_a_group_s_file_has_that_file(folder):
    tasks = listing.declared(['deep'], listing.task_manager(['deep'], folder))
    files = {task.name: task.file.name for task in tasks if task.file}
    assert files == {'deep::a::b::new': 'deep.yaml', 'one': 'one.yaml', 'two': 'two.yaml'}


def test_our_files_are_enough_and_official_folders_are_found(folder):
    own = listing.task_manager(('deep', 'tagged'), folder)
    ours = set(listing.task_manager(('instructeval_drop',), None).task_index)
    assert set(own.task_index) - ours == {*FILES, 'tagged', 'other'}
    mixed = listing.task_manager(('one', 'hellaswag', 'blimp'), folder)
    assert {'one', 'hellaswag', 'blimp', 'blimp_adjunct_island'} <= set(mixed.all_tasks)
    assert len(mixed.all_tasks) < 1_000
    tags = listing.task_manager(('ai2_arc', 'mmlu'), None).task_index
    assert tags['ai2_arc'].tags == {'arc_easy', 'arc_challenge'}
    assert sum(len(entry.tags) for name, entry in tags.items() if re.fullmatch('mmlu_.*_tasks', name)) == 57
    assert len(tags) < 1_000


@pytest.mark.parametrize('resolve', [False, True])
def test_a_group_s_own_function_of_its_scores_is_no_fault(tmp_path, resolve):
    (tmp_path / 'utils.py').write_text('def middle(values, sizes=None, weighted=True):\n    return sorted(values)[0]\n')
    scores = [{'metric': 'exact_match', 'aggregation': 'FUNCTION'}]
    groups = {'group': 'g', 'task': [{'group': 'sub', 'task': ['one'], 'aggregate_metric_list': scores}]}
    _write(tmp_path, {'one': {'task': 'one', **PLAIN}, 'g': groups | {'aggregate_metric_list': scores}})
    text = (tmp_path / 'g.yaml').read_text()
    (tmp_path / 'g.yaml').write_text(text.replace('"FUNCTION"', '!function utils.middle'))
    manager = listing.task_manager(['g'], tmp_path)
    assert [task.name for task in listing.declared(['g'], manager, resolve=resolve)] == ['one']


def test_official_tasks_are_found_wherever_a_group_names_them(tmp_path):
    _write(tmp_path, {'mine': {'group': 'mine', 'task': [{'group': 'sub', 'task': [{'task': 'piqa'}, 'ai2_arc']}]}})
    manager = listing.task_manager(['mine'], tmp_path)
    found = {task.name: task.config['dataset_path'] for task in listing.declared(['mine'], manager)}
    assert found == {'piqa': 'baber/piqa', 'arc_easy': 'allenai/ai2_arc', 'arc_challenge': 'allenai/ai2_arc'}


@pytest.mark.parametrize(
    ('files', 'message'),
    [
        ({'g': {'group': 'g', 'task': ['nothing']}}, r"g\.yaml: there is no task 'nothing'"),
        (
            {'g': {'group': 'g', 'task': [{'dataset_path': 'x'}]}},
            "group g is not one .*must have 'task' or 'group' key",
        ),
        ({'g': {'group': 'g', 'task': 'one'}}, "group g is not one .*the group g has no list of tasks, but 'one'"),
        (
            {'g': {'group': 'g', 'task': [{'group': 'sub', 'task': []}]}},
            r'group g is not one .*the group g::sub has no list of tasks, but \[\]',
        ),
        ({'g': {'group': 'g', 'task': [7]}}, 'group g is not one that lm-eval can build .*7'),
        ({'g': {'group': 'g', 'task': ['g']}}, 'group g is not one that lm-eval can build .*recursion'),
        ({'g': {'task': 'g', 'doc_to_txt': 'x', **PLAIN}}, "group g is not one .*'doc_to_txt'"),
        ({'h': {'task': 'h', **PLAIN}, 'g': {'group': 'g', 'task': ['h']}}, 'h belongs to both g and h'),
    ],
)
def test_a_file_that_lm_eval_cannot_build_is_named(tmp_path, files, message):
    _write(tmp_path, files)
    with pytest.raises(errors.UsageError, match=message):
        listing.declared(['g', 'h'], listing.task_manager(['g'], tmp_path))


def test_the_official_group_without_names_is_named():
    with pytest.raises(errors.UsageError, match='group t0_eval is not one that lm-eval can build'):
        listing.task_manager(['t0_eval'], None)


def test_a_task_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / 'broken.yaml').write_text('task: mine\n  dataset_path: [')
    with pytest.raises(errors.UsageError, match=r"no task 'mine', and the task file .*broken\.yaml cannot be read"):
        listing.task_manager(['mine'], tmp_path)


@pytest.mark.parametrize(
    ('code', 'message'),
    [
        ('import nowhere_to_be_found', 'the task mine needs the package nowhere_to_be_found, which is not installed'),
        ('raise ModuleNotFoundError("pip install x")', r'mine: .* imported \(ModuleNotFoundError: pip install x\)'),
        ('raise OSError("no data")', r'mine: what .*mine\.yaml names cannot be imported \(OSError: no data\)'),
        ('raise SystemExit("get x")', r'mine: what .* names cannot be imported \(SystemExit: get x\)'),
        ('other = 1', r'mine: what .* names cannot be imported \(AttributeError: '),
    ],
)
def test_a_module_that_cannot_be_imported_is_named(tmp_path, code, message):
    (tmp_path / 'utils.py').write_text(code)
    text = ''.join(f'{name}: {json.dumps(value)}\n' for name, value in PLAIN.items())
    (tmp_path / 'mine.yaml').write_text(f'task: mine\n{text}process_docs: !function utils.score\n')
    manager = listing.task_manager(['mine'], tmp_path)
    assert [task.name for task in listing.declared(['mine'], manager)] == ['mine']
    with pytest.raises(errors.UsageError, match=message):
        listing.declared(['mine'], manager, resolve=True)


def test_a_package_that_is_missing_only_when_the_task_is_built_is_named(tmp_path):
    (tmp_path / 'utils.py').write_text('def docs(dataset):\n    import nowhere_to_be_found\n')
    (tmp_path / 'data.jsonl').write_text('{"q": "1", "a": "2"}\n')
    text = ''.join(f'{name}: {json.dumps(value)}\n' for name, value in PLAIN.items())
    (tmp_path / 'mine.yaml').write_text(f'task: mine\n{text}process_docs: !function utils.docs\n')
    with pytest.raises(errors.UsageError, match='one of the tasks mine needs the package nowhere_to_be_found'):
        evaluate.evaluate(Scripted(), ['mine'], include_path=tmp_path)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'metric_list': [{'metric': 'rough'}]}, "metric 'rough'"),
        ({'metric_list': [{'metric': 'f1', 'hf_evaluate': True}]}, "metric 'f1' of the package evaluate"),
        ({'metric_list': [{'metric': 'exact_match', 'aggregation': 'meen'}]}, "aggregation 'meen'"),
        ({'metric_list': {'metric': 'exact_match'}}, 'such form of metric_list or filter_list'),
        ({'filter_list': [{'name': 'f', 'filter': [{'function': 'regexx'}]}]}, "filter 'regexx'"),
        ({'filter_list': [{'name': 'f', 'filter': ['regex']}]}, 'such form of metric_list or filter_list'),
    ],
)
def test_what_lm_eval_would_miss_only_when_it_scores_is_named_before(tmp_path, changes, message):
    (tmp_path / 'mine.yaml').write_text(json.dumps({'task': 'mine', **PLAIN, **changes}))
    with pytest.raises(errors.UsageError, match=f'the task mine: there is no {message} here; correct its file'):
        evaluate.check_tasks(['mine'], listing.task_manager(['mine'], tmp_path))


@pytest.mark.parametrize(
    'changes',
    [
        {'process_results': 'f'},
        {'output_type': 'multiple_choice'},
        {'class': 'C'},
        {'metric_list': [{'metric': print, 'aggregation': print}]},
        {'metric_list': None, 'filter_list': [{'name': 'f', 'filter': [{'function': print}]}]},
    ],
)
def test_metrics_that_a_task_computes_and_functions_need_no_name(changes):
    assert listing.unknown({**PLAIN, 'metric_list': [{'metric': 'own', 'aggregation': 'mean'}], **changes}) is None
