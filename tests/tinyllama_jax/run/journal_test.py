"""Of several processes one writes: the others' journal takes every call and does nothing."""

import pytest

from tests.support import tiny
from tinyllama_jax.run import journal, records, workdir
from tinyllama_jax.settings import experiment


def test_a_silent_journal_takes_what_the_other_takes(tmp_path, capsys):
    silent = journal.Silent()
    silent.say('a line')
    silent.compare_recomputed(1, 2.0)
    silent.log({'step': 1})
    silent.validated(1, {'web': 2.0})
    silent.sync()
    silent.close()
    assert capsys.readouterr() == ('', '') and not list(tmp_path.iterdir())
    with pytest.raises(AttributeError, match='shout'):
        silent.shout('a line')
    public = {name for name in vars(journal.Journal) if not name.startswith('_')}
    assert public == {name for name in vars(journal.Silent) if not name.startswith('_')}


def test_a_journal_writes_and_says(tmp_path, capsys):
    (tmp_path / 'given.model').write_bytes(b'pieces')
    written = journal.Journal(tmp_path / 'run', tiny.CONFIG, 'main.py train', 0, tmp_path / 'given.model')
    written.log({'step': 1, 'loss': 2.5, 'tokens_per_second': 5.0})
    written.validated(1, {'web': 2.0})
    written.sync()
    written.close()
    assert records.read_entries(tmp_path / 'run' / 'metrics.jsonl')[0]['loss'] == 2.5
    assert records.read_entries(tmp_path / 'run' / 'validation.jsonl') == [{'step': 1, 'loss': {'web': 2.0}}]
    assert (tmp_path / 'run' / 'tokenizer.model').read_bytes() == b'pieces'
    assert 'step 1: validation loss web 2.0000' in capsys.readouterr().err


def test_a_damaged_config_json_is_written_anew(tmp_path, capsys):
    (tmp_path / 'given.model').write_bytes(b'pieces')
    (tmp_path / 'config.json').write_bytes(b'{"config": \0')
    journal.Journal(tmp_path, tiny.CONFIG, '', 0, tmp_path / 'given.model').close()
    assert 'config.json is not valid JSON' in capsys.readouterr().err
    assert workdir.read_config(tmp_path) == tiny.CONFIG


@pytest.mark.parametrize(
    ('changed', 'remark'),
    [
        (
            {'optimizer.warmup_steps': 21},
            'warmup_steps is 21 and config.train.num_steps 20: the learning rate only rises',
        ),
        ({'optimizer.decay_steps': 3}, 'config.optimizer.decay_steps is 3: only the schedule wsd has them'),
        ({'train.profile_step': 21}, 'config.train.profile_step is 21: the run ends before'),
        ({'optimizer.warmup_steps': 19, 'train.keep_every_steps': 10, 'train.profile_step': 20}, None),
    ],
)
def test_settings_without_their_effect_are_said(changed, remark, tmp_path, capsys):
    config = tiny.CONFIG
    for field, value in changed.items():
        config = experiment.override(config, field, str(value))
    (tmp_path / 'given.model').write_bytes(b'pieces')
    journal.Journal(tmp_path / 'run', config, '', 0, tmp_path / 'given.model').close()
    said = capsys.readouterr().err
    assert (f'{remark}' in said) if remark else ('note: ' not in said)
