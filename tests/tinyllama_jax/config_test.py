"""Validation of the configuration: the field, its value, and what it allows."""

import itertools

import pytest

from tinyllama_jax import config as config_lib
from tinyllama_jax import errors
from tinyllama_jax.config import Config, DataConfig, SourceConfig
from tinyllama_jax.settings import experiment

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
        ('data.max_bad_share', '1', 'config.data.max_bad_share: must be a finite number >= 0 and < 1, got 1.0'),
        (
            'data.restart_positions',
            'true',
            'config.data.restart_positions: is true; set --config.data.document_mask=true',
        ),
        ('optimizer.beta2', '1.5', 'config.optimizer.beta2: must be a finite number >= 0 and < 1, got 1.5'),
        ('optimizer.beta1', '-0.5', 'config.optimizer.beta1: must be'),
        ('optimizer.final_learning_rate', '1', 'is above peak_learning_rate'),
        ('optimizer.schedule', 'wsd', 'decay_steps'),
        ('seed', str(2**63), f'config.seed: must be below .*got {2**63}'),
        ('train.num_steps', '9' * 400, 'config.train.num_steps: must be below'),
        ('mesh.data', '-1', r'config.mesh: at most one axis is -1 .*, got data and fsdp'),
        ('mesh.fsdp', '0', 'config.mesh.fsdp: must be a finite number >= -1 and != 0, got 0'),
        ('mesh.tensor', '-2', 'config.mesh.tensor: must be'),
        ('mesh.zero', '2', 'config.mesh.zero: 2 is not one of 1, 3'),
        ('train.micro_batch_size', '3', 'not a multiple of micro_batch_size = 3'),
        ('train.remat', 'some', "config.train.remat: 'some' is not one of none, names, attention, full"),
    ],
)
def test_validation_names_the_field_and_its_value(path, text, message):
    with pytest.raises(errors.UsageError, match=message):
        config_lib.validated(experiment.override(CONFIG, path, text))


@pytest.mark.parametrize('bound', ['optimizer.beta2', 'data.holdout_share', 'optimizer.warmup_steps', 'seed'])
def test_zero_is_allowed_where_a_field_says_so(bound):
    config_lib.validated(experiment.override(CONFIG, bound, '0'))


@pytest.mark.parametrize('variant', ['', ':original'])
def test_the_paper_s_experiment_is_valid(variant):
    config = config_lib.validated(experiment.load_experiment(f'configs/tinyllama_1b.py{variant}'))
    assert config.train.num_steps * config.train.global_batch_size * config.model.seq_len > 2.9e12
    assert config.optimizer.micro_steps_per_step == (8 if variant else 1)


def test_remat_policies_are_ordered_by_what_they_save():
    everything, *others = config_lib.REMAT.values()
    assert everything is None and others[-1] == ()
    assert all(set(less) < set(more) for more, less in itertools.pairwise(others))
