"""Evaluation in training: unchanged losses, the same steps after a resume, files, refusals."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal

import jax
import pytest

from eval_bridge import evaluate, in_training
from tests.support import tiny_experiment
from tinyllama_jax import errors, sharding, train
from tinyllama_jax.cluster import members as cluster
from tinyllama_jax.cluster import place
from tinyllama_jax.process import signals
from tinyllama_jax.run import records, workdir

pytestmark = pytest.mark.filterwarnings('ignore')  # lm-eval and datasets give warnings of their own

CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: data/questions.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: [" one", " x"]
doc_to_target: answer
metric_list: [{metric: acc}]
"""
TEXT = """
task: tiny_text
dataset_path: json
dataset_kwargs: {data_files: {test: data/questions.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{context}}"
doc_to_target: " one"
generation_kwargs: {until: ["."], max_gen_toks: 4}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope='module')
def task_files(tmp_path_factory):
    root = tmp_path_factory.mktemp('in_training')
    for folder in ('data', 'tasks'):
        (root / folder).mkdir()
    examples = [{'context': f'zero one {word}', 'answer': number % 2} for number, word in enumerate('abcdef')]
    (root / 'data' / 'questions.jsonl').write_text('\n'.join(map(json.dumps, examples)))
    long = TEXT.replace(': 4}', ': 32}').replace('tiny_text', 'tiny_long')
    hidden = [{'task': 'hidden', 'unsafe_code': True, 'dataset_path': 'json'}]
    inline = json.dumps({'group': 'tiny_inline', 'task': [{'group': 'inner', 'task': hidden}]})
    for name, text in (('choice', CHOICE), ('text', TEXT), ('long', long), ('inline', inline)):
        (root / 'tasks' / f'{name}.yaml').write_text(text)
    return root / 'tasks'


@pytest.fixture(scope='module')
def config(tiny_store, task_files):
    """Eight steps on eight devices; evaluated every third."""
    config = tiny_experiment.get_config('8')
    fields = {'micro_batch_size': 1, 'checkpoint_every_steps': 2, 'eval_every_steps': 4, 'evaluate_every_steps': 3}
    fields |= {'evaluate_tasks': ('tiny_choice', 'tiny_text'), 'evaluate_limit': 4}
    fields |= {'evaluate_include_path': str(task_files)}
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, store=str(tiny_store)),
        train=dataclasses.replace(config.train, **fields),
    )


def _losses(folder):
    return [entry['loss'] for entry in records.read_entries(folder / 'metrics.jsonl')]


def _members(count):
    return cluster.Members(place.Place('here', num_processes=count), None)


def _train(config, folder):
    train.train(config, folder, hooks=in_training.hooks(config, folder, _members(1)))


@pytest.fixture(scope='module')
def evaluated(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp('evaluated')
    _train(config, folder)
    return folder


def test_scores_are_written(evaluated):
    entries = records.read_entries(evaluated / 'evaluation.jsonl')
    assert [entry['step'] for entry in entries] == [3, 6, 8]
    assert set(entries[0]['tasks']) == {'tiny_choice', 'tiny_text'}
    assert {'acc', 'acc_stderr', 'gold_bits_per_byte'} <= set(entries[0]['tasks']['tiny_choice'])
    gold = [entry['tasks']['tiny_choice']['gold_bits_per_byte'] for entry in entries]
    assert gold[-1] < gold[0]  # it learns
    assert list((evaluated / 'tensorboard' / 'evaluation').iterdir())
    files = sorted((evaluated / 'eval' / 'training').iterdir())
    assert [path.name for path in files] == ['step-3.json', 'step-6.json', 'step-8.json']
    result = json.loads(files[-1].read_text())
    assert result['n-samples']['tiny_text'] == {'original': 6, 'effective': 4}
    assert (result['protocol']['name'], result['protocol']['step'], result['protocol']['limit']) == ('paper', 8, 4)


def test_losses_are_the_same_digits_without_it(config, evaluated, tmp_path):
    train.train(config, tmp_path)
    assert _losses(tmp_path) == _losses(evaluated)
    assert [entry['step'] for entry in records.read_entries(tmp_path / 'validation.jsonl')] == [4, 8]


def test_an_interrupted_run_evaluates_the_same_steps_to_the_same_values(config, evaluated, tmp_path):
    class Killed(BaseException):
        pass

    def killed(step, params):
        if step == 3:
            raise Killed

    hooks = (*in_training.hooks(config, tmp_path, _members(1)), killed)
    with pytest.raises(Killed):
        train.train(config, tmp_path, hooks=hooks)
    assert [entry['step'] for entry in records.read_entries(tmp_path / 'evaluation.jsonl')] == [3]
    _train(config, tmp_path)  # from step 2 on
    assert _losses(tmp_path) == _losses(evaluated)
    assert (tmp_path / 'evaluation.jsonl').read_text() == (evaluated / 'evaluation.jsonl').read_text()


@pytest.mark.parametrize('kind', [OverflowError, SystemExit])
def test_an_evaluation_that_fails_comes_after_the_checkpoint_and_does_not_end_the_run(
    config, evaluated, tmp_path, monkeypatch, capsys, kind
):
    saved = {}

    def failing(model, tasks, *, identity, output, **_):
        saved[identity['step']] = sorted(int(path.name.partition('.')[0]) for path in tmp_path.glob('checkpoints/*'))
        raise kind('math range error\nand more')

    hooks = in_training.hooks(config, tmp_path, _members(1))
    monkeypatch.setattr(evaluate, 'evaluate', failing)
    train.train(config, tmp_path, hooks=hooks)
    assert _losses(tmp_path) == _losses(evaluated)
    assert set(saved) == {3, 6, 8} and all(step in saved[step] for step in (6, 8)), 'a checkpoint comes before'
    assert f'step 6: not evaluated ({kind.__name__}: math range error)\n' in capsys.readouterr().err
    monkeypatch.undo()
    _train(config, tmp_path)  # there is nothing left to train, but the last step was not evaluated
    newest = records.read_entries(evaluated / 'evaluation.jsonl')[-1]
    assert records.read_entries(tmp_path / 'evaluation.jsonl') == [newest]


def test_a_stop_signal_ends_an_evaluation_and_the_next_start_makes_it_up(config, evaluated, tmp_path, capsys):
    folder = shutil.copytree(evaluated, tmp_path / 'run')
    (evaluation,) = in_training.hooks(config, folder, members := _members(1))
    entries = records.cut_entries(folder / 'evaluation.jsonl', 6)
    params = workdir.load(folder).params
    params = jax.device_put(params, sharding.shardings(params, sharding.make_mesh(config.mesh)))
    with signals.StopSignals():
        os.kill(os.getpid(), signal.SIGTERM)
        evaluation(8, params)
        assert 'step 8: told to stop; the next start evaluates this step' in capsys.readouterr().err
    before = members._mark[0]
    evaluation(8, params)
    assert records.read_entries(folder / 'evaluation.jsonl')[-1:] == entries
    done = members._mark[0]
    assert done > before, 'the watchdog hears of each batch'
    evaluation(8, params)
    assert members._mark[0] == done, 'what has been evaluated is not evaluated again'


def _refused(config, message, processes=1, **fields):
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, **fields))
    with pytest.raises(errors.UsageError, match=message):
        in_training.hooks(config, pathlib.Path('nowhere'), _members(processes))


def test_what_cannot_be_evaluated_is_refused_before_training(config):
    _refused(
        config,
        'config.train.evaluate_tasks: only a run of one process can evaluate while it trains, and this one has 2',
        processes=2,
    )
    _refused(config, "evaluate_tasks: .*no task 'tiny_chioce'; the nearest is", evaluate_tasks=('tiny_chioce',))
    _refused(config, 'evaluate_tasks: a task wants 32 new tokens, but seq_len is 32', evaluate_tasks=('tiny_long',))
    _refused(config, 'evaluate_tasks: --include_path=none is not a folder', evaluate_include_path='none')
    _refused(config, 'humaneval: programs that the model wrote do not run while', evaluate_tasks=('humaneval',))
    _refused(config, '::hidden: programs that the model wrote do not run while', evaluate_tasks=('tiny_inline',))


def test_without_tasks_there_is_no_hook(config):
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, evaluate_tasks=()))
    assert in_training.hooks(config, pathlib.Path('nowhere'), _members(2)) == ()
