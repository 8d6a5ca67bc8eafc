"""Metrics files: cut atomically, no step twice, every sink written, recomputed losses compared; throughput."""

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.support import tiny
from tinyllama_jax import errors
from tinyllama_jax.run import metrics


def _write(path, steps):
    path.write_text(''.join(json.dumps({'step': step, 'loss': 1.0 / step}) + '\n' for step in steps))


def test_cut_keeps_up_to_the_step_and_returns_the_rest(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    _write(path, range(1, 8))
    path.write_text(path.read_text() + '{"step": 8, "lo')  # a write cut short by a kill
    cut = metrics.cut_entries(path, 5)
    assert [entry['step'] for entry in cut] == [6, 7]
    assert [entry['step'] for entry in metrics.read_entries(path)] == [1, 2, 3, 4, 5]
    assert path.read_text().endswith('\n') and not list(tmp_path.glob('*.tmp'))


def test_a_missing_file_has_no_entries(tmp_path):
    assert metrics.cut_entries(tmp_path / 'none.jsonl', 3) == [] and not (tmp_path / 'none.jsonl').exists()


def test_recomputed_losses_must_be_the_same_digits_however_often_it_is_interrupted(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    _write(path, range(1, 8))
    for _ in range(2):  # the second start finds the file already cut
        recomputed = metrics.Recomputed(path, 5)
        recomputed.compare(5, 9.9)
        recomputed.compare(6, 1 / 6)
        with pytest.raises(errors.RunError, match=r'step 7: .* is 0.25, but 0.14285714285714285 was logged'):
            recomputed.compare(7, 0.25)
    assert [entry['step'] for entry in metrics.read_entries(path)] == [1, 2, 3, 4, 5]
    recomputed = metrics.Recomputed(path, 6)
    recomputed.compare(7, 1 / 7)
    assert not (tmp_path / 'recompute.jsonl').exists()


def test_losses_that_may_differ_are_forgotten(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    _write(path, range(1, 8))
    recomputed = metrics.Recomputed(path, 5)
    recomputed.forget()
    recomputed.compare(6, 9.9)
    metrics.Recomputed(path, 5).compare(6, 8.8)


def test_tensorboard_does_not_import_torch_nor_forbid_it(tmp_path):
    program = (
        'import importlib.util, pathlib, sys; from tinyllama_jax.run import metrics\n'
        f'metrics.TensorBoard(pathlib.Path({str(tmp_path)!r}), start_step=0).close()\n'
        "assert 'torch' not in sys.modules and 'tensorboardX' in sys.modules\n"
        "assert importlib.util.find_spec('torch') is None or __import__('torch').Tensor"
    )
    subprocess.run([sys.executable, '-c', program], cwd=ROOT, check=True)


def test_writer_appends_and_nests_for_tensorboard(tmp_path):
    writer = metrics.Writer(tmp_path / 'validation.jsonl', tiny.CONFIG, start_step=0)
    writer.write({'step': 1, 'loss': {'web': 2.0, 'code': 1.0}, 'mfu': None})
    writer.close()
    assert metrics.read_entries(tmp_path / 'validation.jsonl') == [
        {'step': 1, 'loss': {'web': 2.0, 'code': 1.0}, 'mfu': None}
    ]
    assert list((tmp_path / 'tensorboard' / 'validation').glob('events*'))


class _Full(metrics.Sink):
    def write(self, entry):
        raise OSError(28, 'No space left on device')

    def sync(self):
        raise OSError(28, 'No space left on device')


def test_every_sink_gets_the_entry_and_one_that_fails_ends_the_run(tmp_path, monkeypatch):
    path = tmp_path / 'metrics.jsonl'
    monkeypatch.setattr(metrics, 'sinks', lambda *_, **__: [metrics.JsonLines(path), _Full()])
    writer = metrics.Writer(path, tiny.CONFIG, start_step=0)
    with pytest.raises(errors.RunError, match=r'metrics\.jsonl cannot be written \(No space left on device\); make'):
        writer.write({'step': 1, 'loss': 2.0})
    with pytest.raises(errors.RunError, match='make room'):
        writer.sync()
    writer.close()
    assert metrics.read_entries(path) == [{'step': 1, 'loss': 2.0}]


def test_throughput_leaves_pauses_out_and_sums_losses():
    now = iter([0.0, 1.0, 1.5, 2.0, 4.0, 6.0, 6.0]).__next__
    throughput = metrics.Throughput(clock=now)
    with throughput.timed('data'):
        pass
    with throughput.timed('paused'):
        pass
    assert throughput.lap(800) == {'tokens_per_second': 200.0, 'data_seconds': 0.5, 'checkpoint_seconds': 0.0}


def test_progress_prints_a_line_per_entry_without_a_terminal(capsys):
    progress = metrics.Progress(0, 100, tokens_per_step=10)
    progress.update({'step': 40, 'loss': 2.5, 'tokens_per_second': 5.0})
    progress.close()
    assert 'step 40/100: loss 2.5000, 5 tokens/s, 0:02:00 to go' in capsys.readouterr().err


@pytest.mark.parametrize('line', ['{"step": 2,}', '[]', '{"loss": 1}', '\0\0'])
def test_a_line_that_is_no_entry_is_named(line, tmp_path):
    (tmp_path / 'metrics.jsonl').write_text(f'{{"step": 1}}\n{line}\n')
    with pytest.raises(errors.UsageError, match='metrics.jsonl: line 2 is not an entry with a step'):
        metrics.read_entries(tmp_path / 'metrics.jsonl')
