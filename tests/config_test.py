"""Overrides, validation and round trips of the configuration tree."""

import dataclasses
import json

import pytest

from tinyllama_jax import config as config_lib
from tinyllama_jax import errors
from tinyllama_jax.config import Config, DataConfig, SourceConfig

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
    ],
)
def test_override_sets_a_field_of_the_right_type(path, text, value):
    node = config_lib.override(CONFIG, path, text)
    for name in path.split('.'):
        node = getattr(node, name)
    assert node == value and type(node) is type(value)


def test_none_resets_an_optional_field_and_only_that():
    config = config_lib.override(CONFIG, 'train.keep_every_steps', '5000')
    assert config_lib.override(config, 'train.keep_every_steps', 'none').train.keep_every_steps is None
    with pytest.raises(errors.UsageError, match='train.num_steps: expects a whole number'):
        config_lib.override(config, 'train.num_steps', 'none')


def test_sources_are_made_changed_and_removed_by_name():
    config = config_lib.override(CONFIG, 'data.sources.books.path', '/books')
    config = config_lib.override(config, 'data.sources.web.weight', '3')
    config = config_lib.override(config, 'data.sources.books.drop_sets', 'A, B')
    assert config.data.sources == {
        'web': SourceConfig(path='web', weight=3.0),
        'books': SourceConfig(path='/books', drop_sets=('A', 'B')),
    }
    assert list(config_lib.override(config, 'data.sources.web', 'none').data.sources) == ['books']
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
def test_override_names_the_field_and_the_mend(path, text, message):
    with pytest.raises(errors.UsageError, match=message):
        config_lib.override(CONFIG, path, text)


@pytest.mark.parametrize(
    ('path', 'text', 'message'),
    [
        ('model.num_kv_heads', '5', '5 does not divide num_heads = 32'),
        ('model.head_dim', '63', 'must be even'),
        ('model.num_layers', '0', 'config.model.num_layers: must be a finite number > 0'),
        ('model.compute_dtype', 'float16', "'float16' is not one of none, bfloat16, float32"),
        ('data.sources.web.weight', '-5', 'config.data.sources.web.weight: must be a finite number > 0, got -5.0'),
        ('data.sources.web.weight', 'nan', 'must be a finite number'),
        ('data.sources.web.format', 'csv', "'csv' is not one of auto, jsonl"),
        ('data.sources.a b.path', 'x', 'a source name has letters'),
        ('data.max_bad_share', '1', 'a share below 1'),
        ('optimizer.beta2', '1', 'betas must be below 1'),
        ('optimizer.final_learning_rate', '1', 'is above peak_learning_rate'),
        ('optimizer.schedule', 'wsd', 'decay_steps'),
        ('mesh.data', '-1', 'at most one is -1'),
        ('train.micro_batch_size', '3', 'not a multiple of micro_batch_size = 3'),
        ('train.remat', 'some', 'is not one of full, none'),
    ],
)
def test_validation_names_the_field_and_its_value(path, text, message):
    with pytest.raises(errors.UsageError, match=message):
        config_lib.validated(config_lib.override(CONFIG, path, text))


def test_round_trip_through_json():
    config = config_lib.override(CONFIG, 'data.sources.web.drop_sets', 'A,B')
    assert config_lib.from_dict(json.loads(json.dumps(config_lib.to_dict(config)))) == config


def test_from_dict_refuses_a_field_of_another_version():
    with pytest.raises(errors.UsageError, match="ModelConfig has no field 'num_experts'"):
        config_lib.from_dict({'model': {'num_experts': 8}})


def test_differences_name_dotted_leaves():
    other = dataclasses.replace(CONFIG, seed=1, model=dataclasses.replace(CONFIG.model, num_layers=2))
    found = config_lib.differences(config_lib.to_dict(CONFIG), config_lib.to_dict(other), 'config')
    assert found == {'config.seed': (3407, 1), 'config.model.num_layers': (22, 2)}


def test_split_overrides_takes_both_spellings():
    rest, overrides = config_lib.split_overrides(['train', '--config.seed=3', '--workdir=w', '--config.a.b', '4'])
    assert rest == ['train', '--workdir=w'] and overrides == [('seed', '3'), ('a.b', '4')]


@pytest.mark.parametrize('variant', ['', ':original'])
def test_the_paper_s_experiment_is_valid(variant):
    config = config_lib.validated(config_lib.load_experiment(f'configs/tinyllama_1b.py{variant}'))
    assert config.train.num_steps * config.train.global_batch_size * config.model.seq_len > 2.9e12
    assert config.optimizer.micro_steps_per_step == (8 if variant else 1)


@pytest.mark.parametrize('spec', ['configs/nothing.py', 'configs/tinyllama_1b.py:modern'])
def test_an_unknown_experiment_is_one_clear_line(spec):
    with pytest.raises(errors.UsageError, match='--config=configs/'):
        config_lib.load_experiment(spec)
