"""Validation and round trips of the configuration tree."""

import dataclasses
import itertools
import json

import pytest

from tinyllama_jax import config as config_lib
from tinyllama_jax import errors
from tinyllama_jax.config import Config, DataConfig, SourceConfig
from tinyllama_jax.settings import experiment, tree

CONFIG = Config(data=DataConfig(sources={'web': SourceConfig(path='web', weight=2.0)}))


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
        (
            'data.restart_positions',
            'true',
            'config.data.restart_positions: is true; set --config.data.document_mask=true',
        ),
        ('optimizer.beta2', '1', 'betas must be below 1'),
        ('optimizer.final_learning_rate', '1', 'is above peak_learning_rate'),
        ('optimizer.schedule', 'wsd', 'decay_steps'),
        ('mesh.data', '-1', 'at most one is -1'),
        ('train.micro_batch_size', '3', 'not a multiple of micro_batch_size = 3'),
        ('train.remat', 'some', 'is not one of full, attention, names, none'),
    ],
)
def test_validation_names_the_field_and_its_value(path, text, message):
    with pytest.raises(errors.UsageError, match=message):
        config_lib.validated(experiment.override(CONFIG, path, text))


def test_round_trip_through_json():
    config = experiment.override(CONFIG, 'data.sources.web.drop_sets', 'A,B')
    assert tree.from_dict(json.loads(json.dumps(config_lib.to_dict(config)))) == config


def test_from_dict_refuses_a_field_of_another_version():
    with pytest.raises(errors.UsageError, match="ModelConfig has no field 'num_experts'"):
        tree.from_dict({'model': {'num_experts': 8}})


def test_differences_name_dotted_leaves():
    other = dataclasses.replace(CONFIG, seed=1, model=dataclasses.replace(CONFIG.model, num_layers=2))
    found = tree.differences(config_lib.to_dict(CONFIG), config_lib.to_dict(other), 'config')
    assert found == {'config.seed': (3407, 1), 'config.model.num_layers': (22, 2)}


@pytest.mark.parametrize('variant', ['', ':original'])
def test_the_paper_s_experiment_is_valid(variant):
    config = config_lib.validated(experiment.load_experiment(f'configs/tinyllama_1b.py{variant}'))
    assert config.train.num_steps * config.train.global_batch_size * config.model.seq_len > 2.9e12
    assert config.optimizer.micro_steps_per_step == (8 if variant else 1)


def test_remat_policies_are_ordered_by_what_they_save():
    everything, *others = config_lib.REMAT.values()
    assert everything is None and others[-1] == ()
    assert all(set(less) < set(more) for more, less in itertools.pairwise(others))
