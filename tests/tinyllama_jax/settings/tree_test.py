"""Configurations as plain dictionaries: read back, completed, compared."""

import dataclasses
import json

import pytest

from tinyllama_jax import config as config_lib
from tinyllama_jax import errors
from tinyllama_jax.config import Config, DataConfig, SourceConfig
from tinyllama_jax.settings import tree

CONFIG = Config(data=DataConfig(sources={'web': SourceConfig(path='web', weight=2.0, drop_sets=('A', 'B'))}))


def test_round_trip_through_json():
    assert tree.from_dict(json.loads(json.dumps(config_lib.to_dict(CONFIG)))) == CONFIG


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        ({'model': {'num_experts': 8}}, "ModelConfig has no field 'num_experts'"),
        ({'data': {'sources': {'web': {'url': 'x'}}}}, "SourceConfig has no field 'url'"),
    ],
)
def test_a_field_of_another_version_is_refused(values, message):
    with pytest.raises(errors.UsageError, match=message):
        tree.from_dict(values)


def test_a_saved_tree_gets_the_defaults_of_newer_fields():
    saved = config_lib.to_dict(CONFIG)
    del saved['mesh']['zero'], saved['kernels'], saved['data']['sources']['web']['format']
    assert tree.completed(saved) == config_lib.to_dict(CONFIG)


def test_differences_name_dotted_leaves():
    other = dataclasses.replace(CONFIG, seed=1, model=dataclasses.replace(CONFIG.model, num_layers=2))
    differences = tree.differences(config_lib.to_dict(CONFIG), config_lib.to_dict(other), 'config')
    assert differences == {'config.seed': (3407, 1), 'config.model.num_layers': (22, 2)}
    without = config_lib.to_dict(dataclasses.replace(CONFIG, data=DataConfig()))
    assert tree.differences(config_lib.to_dict(CONFIG)['data'], without['data']).keys() == {'sources.web'}
