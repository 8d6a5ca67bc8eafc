"""A run's folder: its config.json, what contradicts that, and a run begun from given parameters."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from tests.support import json_tokenizers, tiny, tiny_export
from tinyllama_jax import errors, model
from tinyllama_jax import step as step_lib
from tinyllama_jax.run import workdir
from tinyllama_jax.settings import tree


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp('run')
    params = model.init_params(tiny.MODEL, jax.random.key(0))
    given = tiny_export.write_tokenizer(tmp_path_factory.mktemp('given') / 'tokenizer.model')
    workdir.create(folder, tiny.CONFIG, step_lib.make_state(tiny.CONFIG, params), given, 'main.py import')
    return folder, params


def test_a_created_run_loads_bit_for_bit(run):
    folder, params = run
    loaded = workdir.load(folder)
    assert (loaded.step, loaded.config) == (0, tiny.CONFIG)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)


def test_config_json_says_what_ran(run):
    record = json.loads((run[0] / 'config.json').read_text())
    assert record['command'] == 'main.py import'
    assert record['devices'] == '8 x cpu'
    assert record['versions']['jax'] == jax.__version__
    assert workdir.read_config(run[0]) == tiny.CONFIG


def test_a_config_of_another_model_is_refused(run):
    other = dataclasses.replace(tiny.CONFIG, model=dataclasses.replace(tiny.MODEL, num_layers=3))
    with pytest.raises(errors.UsageError, match='config.model.num_layers is 2 in .* but 3 was given'):
        workdir.load(run[0], other)


def test_a_folder_in_use_is_not_overwritten(run):
    with pytest.raises(errors.UsageError, match='is not empty'):
        workdir.create(run[0], tiny.CONFIG, None, None, '')


def test_without_a_run_or_a_checkpoint_the_train_command_is_named(tmp_path):
    with pytest.raises(errors.UsageError, match='no config.json; run main.py train'):
        workdir.load(tmp_path)
    workdir.write_config_file(tmp_path, tiny.CONFIG, '')
    with pytest.raises(errors.UsageError, match='no checkpoint yet; run main.py train'):
        workdir.load(tmp_path)


def test_without_a_tokenizer_it_is_said_where_to_put_it(run, tmp_path):
    copy = shutil.copytree(run[0], tmp_path / 'run')
    assert workdir.missing_tokenizer(copy) is None
    (copy / 'tokenizer.model').unlink()
    with pytest.raises(errors.UsageError, match=f'run has no tokenizer: copy .* to {copy}/tokenizer.model'):
        workdir.load(copy)


def test_texts_of_an_import_end_where_its_folder_says_whatever_tokenizer_it_gets(tmp_path):
    tiny_export.write_tokenizer(tmp_path / 'tokenizer.model')
    assert workdir.load_tokenizer(tmp_path, tiny.CONFIG).stop_ids == (2,)
    (tmp_path / 'imported').mkdir()
    json_tokenizers.edit(tmp_path / 'imported' / 'config.json', eos_token_id=[2, 7])
    assert workdir.load_tokenizer(tmp_path, tiny.CONFIG).stop_ids == (2, 7)
    (tmp_path / 'tokenizer').mkdir()
    (tmp_path / 'tokenizer.model').rename(tmp_path / 'tokenizer' / 'tokenizer.model')
    json_tokenizers.edit(tmp_path / 'imported' / 'generation_config.json', eos_token_id=[9, 2])
    assert workdir.load_tokenizer(tmp_path, tiny.CONFIG).stop_ids == (9, 2)


def test_the_tokenizer_a_run_was_begun_with_stays(tmp_path):
    (tmp_path / 'a.model').write_bytes(b'a')
    (tmp_path / 'b.model').write_bytes(b'b')
    for _ in range(2):
        workdir.keep_tokenizer(tmp_path / 'run', tmp_path / 'a.model')
    with pytest.raises(
        errors.UsageError, match='wrong tokenizer: .*/run has its own tokenizer.model, but the data was'
    ):
        workdir.keep_tokenizer(tmp_path / 'run', tmp_path / 'b.model')
    assert (tmp_path / 'run' / 'tokenizer.model').read_bytes() == b'a'


def test_no_changed_byte_of_config_json_is_used(run, tmp_path):
    copy = shutil.copytree(run[0], tmp_path / 'run')
    text = (copy / 'config.json').read_text()
    for old, new in (('"rope_base": 1', '"rope_base": 2'), ('"seed"', '"sead"'), ('train', 'trajn'), ('"', '\0')):
        (copy / 'config.json').write_text(text.replace(old, new, 1))
        with pytest.raises(tree.Unreadable, match=f'config.json .* main.py train .*--workdir={copy} writes it anew'):
            workdir.load(copy)
    # One that an earlier version wrote, without its sha256.
    content = {name: value for name, value in json.loads(text).items() if name != 'sha256'}
    content['config']['model']['rope_base'] = 20_000.0
    (copy / 'config.json').write_text(json.dumps(content))
    with pytest.raises(errors.UsageError, match='rope_base is 20000.0 in .*config.json, but 10000.0 in the ch'):
        workdir.load(copy)


def test_another_tokenizer_than_the_checkpoint_s_is_refused(run, tmp_path):
    copy = shutil.copytree(run[0], tmp_path / 'run')
    assert workdir.load(copy).tokenizer_path == copy / 'tokenizer.model'
    tiny_export.write_merged_tokenizer(copy / 'tokenizer.model')
    with pytest.raises(errors.UsageError, match='tokenizer.model is not the tokenizer of the checkpoint of step 0'):
        workdir.load(copy)


def test_a_config_file_that_is_not_a_run_s_is_one_line(tmp_path):
    (tmp_path / 'config.json').write_text('{"config": {"seed": 5,}}')
    with pytest.raises(errors.UsageError, match='config.json is not valid JSON'):
        workdir.read_config(tmp_path)
