"""What may change when a run resumes, and which changes must leave its losses equal."""

import dataclasses
import fnmatch
import pathlib

import pytest

from tests.support import tiny
from tinyllama_jax import checkpoint, errors
from tinyllama_jax import config as config_lib
from tinyllama_jax.run import resume

CONFIG = tiny.CONFIG


def _changed(path, value):
    """Returns the tiny configuration with one dotted field changed."""
    group, _, field = path.rpartition('.')
    if not group:
        return dataclasses.replace(CONFIG, **{field: value})
    return dataclasses.replace(CONFIG, **{group: dataclasses.replace(getattr(CONFIG, group), **{field: value})})


def _check(config, tmp_path, *, trained_on='data', reads='data'):
    meta = checkpoint.make_meta(CONFIG, trained_on, {}, None) | {'step': 7}
    resume.check_resume(config, reads, tmp_path / 'run', meta)


@pytest.mark.parametrize(
    ('path', 'value'),
    [
        ('model.num_layers', 9),
        ('model.seq_len', 8),
        ('optimizer.name', 'muon'),
        ('data.document_mask', True),
        ('seed', 2),
        ('train.global_batch_size', 2),
    ],
)
def test_what_decides_the_run_is_refused_with_both_values(path, value, tmp_path):
    with pytest.raises(errors.UsageError) as raised:
        _check(_changed(path, value), tmp_path)
    said = str(raised.value)
    assert said.startswith(f'config.{path} is {value}, but {tmp_path}/run was trained with ')
    assert 'up to step 7. Set it back' in said and f'--workdir={tmp_path}/run-2' in said


@pytest.mark.parametrize(
    ('path', 'value'),
    [
        ('model.compute_dtype', 'bfloat16'),
        ('model.scan_layers', not CONFIG.model.scan_layers),
        ('optimizer.peak_learning_rate', 1e-5),
        ('optimizer.schedule', 'wsd'),
        ('train.num_steps', 10**6),
        ('train.remat', 'attention'),
        ('mesh.tensor', 2),
        ('kernels.rope', 'xla'),
    ],
)
def test_how_it_is_computed_and_for_how_long_may_change(path, value, tmp_path):
    _check(_changed(path, value), tmp_path)


def test_other_data_is_refused(tmp_path):
    with pytest.raises(errors.UsageError, match=r'data \(the store behind it\) is other, but .* was trained with data'):
        _check(CONFIG, tmp_path, reads='other')
    with pytest.raises(errors.UsageError, match='config.data.eos_per_document is 2, but'):
        _check(_changed('data.eos_per_document', 2), tmp_path, reads='other')


def test_an_import_binds_the_weights_and_the_optimizer(tmp_path):
    _check(_changed('seed', 2), tmp_path, trained_on=None)
    _check(_changed('model.seq_len', 8), tmp_path, trained_on=None)
    with pytest.raises(errors.UsageError, match='config.optimizer.name is muon'):
        _check(_changed('optimizer.name', 'muon'), tmp_path, trained_on=None)
    with pytest.raises(errors.UsageError, match='config.model.embed_dim is'):
        _check(_changed('model.embed_dim', 48), tmp_path, trained_on=None)


def test_losses_must_be_equal_unless_code_machine_or_a_deciding_setting_changed():
    start = {'commit': 'a', 'versions': {}, 'devices': '1 x cpu', 'config': config_lib.to_dict(CONFIG)}

    def after(path, value):
        return start | {'config': config_lib.to_dict(_changed(path, value))}

    assert resume.same_losses(start, start) and resume.same_losses(start, after('train.log_every_steps', 3))
    assert not resume.same_losses(None, start)
    assert not resume.same_losses(start, start | {'commit': 'b'})
    assert not resume.same_losses(start, after('train.remat', 'attention'))
    assert not resume.same_losses(start, after('optimizer.beta1', 0.5))
    assert not resume.same_losses(start, after('seed', 2))  # allowed after an import


def test_every_row_of_the_table_decides_a_field_that_no_row_above_it_does():
    groups = config_lib.to_dict(CONFIG)
    fields = [f'{group}.{field}' for group in groups if group != 'seed' for field in groups[group]] + ['seed']
    for setting, _ in resume._DECIDES:
        fits = set(fnmatch.filter(fields, setting))
        assert fits, setting
        fields = [field for field in fields if field not in fits]


@pytest.mark.parametrize(('folder', 'new'), [('.', '--workdir=.-2.'), ('my runs/a', "--workdir='my runs/a-2'.")])
def test_the_new_workdir_can_be_typed_as_it_is_written(folder, new):
    meta = checkpoint.make_meta(CONFIG, 'data', {}, None) | {'step': 7}
    with pytest.raises(errors.UsageError) as raised:
        resume.check_resume(_changed('seed', 2), 'data', pathlib.Path(folder), meta)
    assert str(raised.value).endswith(new)
