"""Experiment files, command-line overrides, and a workdir's own settings."""

import pytest

from tests.conftest import ROOT
from tinyllama_jax import config as config_lib
from tinyllama_jax import errors
from tinyllama_jax.config import Config, DataConfig, SourceConfig
from tinyllama_jax.settings import experiment

CONFIG = Config(data=DataConfig(sources={'web': SourceConfig(path='web', weight=2.0)}))


@pytest.mark.parametrize(
    ('path', 'text', 'value'),
    [
        ('model.num_kv_heads', '8', 8),
        ('optimizer.peak_learning_rate', '1e-3', 1e-3),
        ('model.scan_layers', 'false', False),
        ('model.compute_dtype', 'bfloat16', 'bfloat16'),
        ('train.keep_every_steps', '5000', 5000),
        ('data.store', 'gs://bucket/store', 'gs://bucket/store'),
        ('seed', '7', 7),
        ('mesh.zero', '1', 1),
        ('optimizer.beta2', '0.9', 0.9),
        ('optimizer.warmup_steps', '0', 0),
        ('train.remat', 'none', 'none'),
        ('model.compute_dtype', 'none', None),
    ],
)
def test_override_sets_a_field_of_the_right_type(path, text, value):
    node = experiment.override(CONFIG, path, text)
    for name in path.split('.'):
        node = getattr(node, name)
    assert node == value and type(node) is type(value)


def test_none_resets_an_optional_field_and_only_that():
    config = experiment.override(CONFIG, 'train.keep_every_steps', '5000')
    assert experiment.override(config, 'train.keep_every_steps', 'none').train.keep_every_steps is None
    with pytest.raises(errors.UsageError, match='train.num_steps: expects a whole number'):
        experiment.override(config, 'train.num_steps', 'none')


def test_sources_are_made_changed_and_removed_by_name():
    config = experiment.override(CONFIG, 'data.sources.books.path', '/books')
    config = experiment.override(config, 'data.sources.web.weight', '3')
    config = experiment.override(config, 'data.sources.books.drop_sets', 'A, B')
    assert config.data.sources == {
        'web': SourceConfig(path='web', weight=3.0),
        'books': SourceConfig(path='/books', drop_sets=('A', 'B')),
    }
    assert list(experiment.override(config, 'data.sources.web', 'none').data.sources) == ['books']
    assert CONFIG.data.sources == {'web': SourceConfig(path='web', weight=2.0)}


@pytest.mark.parametrize(
    ('path', 'text', 'message'),
    [
        ('model.num_kv_head', '2', "no field 'num_kv_head'; the nearest is 'num_kv_heads'"),
        ('modle.num_heads', '2', "no field 'modle'; the nearest is 'model'"),
        ('model.num_layers', 'many', "config.model.num_layers: expects a whole number, got 'many'"),
        ('model.num_layers', '2.5', 'expects a whole number'),
        ('optimizer.eps', 'tiny', 'expects a number'),
        ('model.scan_layers', '1', 'expects true or false'),
        ('model', '3', 'model is a group'),
        ('seed.x', '3', 'has no fields below it'),
        ('data.sources.web', '3', 'name an entry and one of its fields'),
        ('data.sources.web.wieght', '3', "the nearest is 'weight'"),
    ],
)
def test_a_bad_override_names_the_field_and_the_remedy(path, text, message):
    with pytest.raises(errors.UsageError, match=message):
        experiment.override(CONFIG, path, text)


def test_split_overrides_takes_both_spellings():
    rest, overrides = experiment.split_overrides(['train', '--config.seed=3', '--workdir=w', '--config.a.b', '4'])
    assert rest == ['train', '--workdir=w'] and overrides == [('seed', '3'), ('a.b', '4')]


@pytest.mark.parametrize('file', sorted((ROOT / 'configs').glob('*.py')), ids=lambda file: file.stem)
def test_every_experiment_is_valid(file):
    assert experiment.resolve(str(file), None, []) == config_lib.validated(experiment.load_experiment(str(file)))


@pytest.mark.parametrize('spec', ['configs/nothing.py', 'configs/tinyllama_1b.py:modern'])
def test_an_unknown_experiment_is_one_clear_line(spec):
    with pytest.raises(errors.UsageError, match='--config=configs/'):
        experiment.load_experiment(spec)


def test_a_workdir_stands_in_for_a_missing_config(tmp_path):
    assert experiment.resolve(None, tmp_path, [], required=False) is None
    with pytest.raises(errors.UsageError, match='--config=FILE is missing'):
        experiment.resolve(None, tmp_path, [])
    (tmp_path / 'config.json').write_text('{"config": {"seed": 5}}')
    assert experiment.resolve(None, tmp_path, [('train.num_steps', '7')]).train.num_steps == 7
    assert experiment.resolve(None, tmp_path, []).seed == 5


def test_a_colon_in_a_path_is_no_argument(tmp_path):
    (tmp_path / 'a:b').mkdir()
    file = tmp_path / 'a:b' / 'x.py'
    file.write_text(
        'from tinyllama_jax.config import Config\n\ndef get_config(arg):\n    return Config(seed=len(arg))\n'
    )
    assert experiment.load_experiment(str(file)).seed == 0
    assert experiment.load_experiment(f'{file}:four').seed == 4


@pytest.mark.parametrize(
    ('name', 'text', 'message'),
    [
        ('config.json', '{"config": {}, "on": true}', 'an experiment is a Python file, .* are read by --workdir='),
        ('x.yaml', 'seed: 1', 'an experiment is a Python file, such as configs/demo.py.$'),
        ('x.py', 'seed = 1', 'x.py has no function get_config'),
        ('x.py', 'def get_config(arg): return 1', 'has no function get_config.* that returns a Config'),
        ('x.py', 'import json\nseed: [', r'SyntaxError: .*line 2'),
        (
            'x.py',
            '1\n2\ndef get_config(arg): return nothing',
            "NameError: name 'nothing' is not defined, line 3 of .*x.py",
        ),
    ],
)
def test_what_is_no_experiment_is_one_line(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(errors.UsageError, match=message) as raised:
        experiment.load_experiment(str(tmp_path / name))
    assert '\n' not in str(raised.value) and str(raised.value).startswith(f'--config={tmp_path}')


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('{"model_type": "llama"}', '--workdir=.*: this is a Hugging Face folder, not a run; evaluate --model='),
        ('{"config": {"seed": 5},}', 'config.json is not valid JSON: .*line 1 column .*; mend it'),
        ('[]', 'config.json: this is not the config.json of a run'),
        ('{"config": {"model": null}}', 'ModelConfig is None, not a group'),
        ('{"config": {"seed": "5"}}', "config.seed: must be a whole number, got '5'"),
        ('{"config": {"train": {"num_steps": 128.0}}}', 'config.train.num_steps: must be a whole number, got 128.0'),
    ],
)
def test_a_workdir_that_holds_no_run_is_named(text, message, tmp_path):
    (tmp_path / 'config.json').write_text(text)
    with pytest.raises(errors.UsageError, match=message):
        experiment.resolve(None, tmp_path, [], required=False)


def test_paths_in_settings_are_of_this_machine(monkeypatch):
    monkeypatch.setenv('HOME', '/elsewhere')
    demo = str(ROOT / 'configs/demo.py')
    paths = [(f'data.{name}', '~/a') for name in ('store', 'tokenizer', 'sources.web.path')]
    config = experiment.resolve(demo, None, [*paths, ('train.evaluate_task_data', '~/b')])
    assert config.data.store == config.data.tokenizer == config.data.sources['web'].path == '/elsewhere/a'
    assert config.train.evaluate_task_data == '/elsewhere/b'
    with pytest.raises(errors.UsageError, match='config.data.sources.web.path: gs://a is an address'):
        experiment.resolve(demo, None, [('data.sources.web.path', 'gs://a')])
