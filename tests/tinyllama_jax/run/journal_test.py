"""Of several processes one writes: the others' journal takes every call and does nothing."""

import pytest

from tests.support import tiny
from tinyllama_jax.run import journal, metrics


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
    assert metrics.read_entries(tmp_path / 'run' / 'metrics.jsonl')[0]['loss'] == 2.5
    assert metrics.read_entries(tmp_path / 'run' / 'validation.jsonl') == [{'step': 1, 'loss': {'web': 2.0}}]
    assert (tmp_path / 'run' / 'tokenizer.model').read_bytes() == b'pieces'
    assert 'step 1: validation loss web 2.0000' in capsys.readouterr().err
