"""Files of entries: cut atomically, no step twice, bad lines named and passed over, recomputed losses compared."""

import json

import pytest

from tinyllama_jax import errors
from tinyllama_jax.run import records


def _write(path, steps):
    path.write_text(''.join(json.dumps({'step': step, 'loss': 1.0 / step}) + '\n' for step in steps))


def test_cut_keeps_up_to_the_step_and_returns_the_rest(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    _write(path, range(1, 8))
    path.write_text(path.read_text() + '{"step": 8, "lo')  # a write cut short by a kill
    cut = records.cut_entries(path, 5)
    assert [entry['step'] for entry in cut] == [6, 7]
    assert [entry['step'] for entry in records.read_entries(path)] == [1, 2, 3, 4, 5]
    assert path.read_text().endswith('\n') and not list(tmp_path.glob('*.tmp'))


def test_a_missing_file_has_no_entries(tmp_path):
    assert records.cut_entries(tmp_path / 'none.jsonl', 3) == [] and not (tmp_path / 'none.jsonl').exists()


def test_recomputed_losses_must_be_the_same_digits_however_often_it_is_interrupted(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    _write(path, range(1, 8))
    for _ in range(2):  # the second start finds the file already cut
        recomputed = records.Recomputed(path, 5)
        recomputed.compare(5, 9.9)
        recomputed.compare(6, 1 / 6)
        with pytest.raises(errors.RunError, match=r'step 7: .* is 0.25, but 0.14285714285714285 was logged'):
            recomputed.compare(7, 0.25)
    assert [entry['step'] for entry in records.read_entries(path)] == [1, 2, 3, 4, 5]
    recomputed = records.Recomputed(path, 6)
    recomputed.compare(7, 1 / 7)
    assert not (tmp_path / 'recompute.jsonl').exists()


def test_losses_that_may_differ_are_forgotten(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    _write(path, range(1, 8))
    recomputed = records.Recomputed(path, 5)
    recomputed.forget()
    recomputed.compare(6, 9.9)
    records.Recomputed(path, 5).compare(6, 8.8)


@pytest.mark.parametrize(
    'line',
    [b'{"step": 2,}', b'[]', b'{"loss": 1}', b'\0\0', b'\xff\xfe{', b'{"step": 2.5}', b'{"step": "2"}', b'[' * 9_999],
)
def test_a_line_that_is_no_entry_is_named_and_passed_over(line, tmp_path, capsys):
    path = tmp_path / 'metrics.jsonl'
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n{"step": 4}\n')
    for _ in range(2):
        assert [entry['step'] for entry in records.read_entries(path)] == [1, 3, 4]
    said = capsys.readouterr().err
    assert said.count('1 of 4 lines are no entries and are passed over (the first: line 2, ') == 1
    assert [entry['step'] for entry in records.cut_entries(path, 3)] == [4]
    assert path.read_bytes() == b'{"step": 1}\n' + line + b'\n{"step": 3}\n', 'what was written stays'


def test_an_entry_has_the_fields_that_are_asked_for(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    losses = '2', 'null', '{"web": 1.5, "of": {"a": 1}}', '"2"', '{"web": null}', '[2]', 'true', 'NaN'
    path.write_text(
        ''.join(f'{{"step": {step}, "loss": {loss}}}\n' for step, loss in enumerate(losses)) + '{"step": 9}\n'
    )
    assert [entry['step'] for entry in records.read_entries(path, loss=float)] == [0, 7]
    assert [entry['step'] for entry in records.read_entries(path, loss=dict)] == [2]
    assert len(records.read_entries(path)) == 9


def test_no_flipped_bit_changes_a_number(tmp_path, monkeypatch):
    monkeypatch.setattr(records, '_say_once', lambda line: None)
    path = tmp_path / 'metrics.jsonl'
    entries = [{'step': step, 'loss': 1 / step} for step in (1, 2, 3)]
    text = b''.join(map(records.line, entries))
    path.write_bytes(text)
    assert records.read_entries(path, loss=float) == entries
    first, second = (len(records.line(entry)) for entry in entries[:2])
    for place in range(first, first + second):
        for bit in range(8):
            path.write_bytes(text[:place] + bytes([text[place] ^ 1 << bit]) + text[place + 1 :])
            for entry in records.read_entries(path):  # a flip in the checksum's name leaves the numbers right
                assert (entry['step'], entry['loss']) in ((1, 1.0), (2, 0.5), (3, 1 / 3)), (place, bit)
            assert records.read_entries(path)[0] == entries[0]


def test_a_bad_line_does_not_stop_a_resume(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    _write(path, range(1, 8))
    path.write_text(path.read_text().replace('{"step": 6, "loss"', '{"step": 6, "lass"'))
    recomputed = records.Recomputed(path, 5)
    recomputed.compare(6, 9.9)
    with pytest.raises(errors.RunError, match='step 7'):
        recomputed.compare(7, 9.9)
