"""Sinks: every one is written, one that fails delays nothing and loses nothing; throughput."""

import resource
import subprocess
import sys

from tensorboardX import record_writer
from tensorboardX.proto import event_pb2

from tests.conftest import ROOT
from tests.support import tiny
from tinyllama_jax.run import metrics, records


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
    assert records.read_entries(tmp_path / 'validation.jsonl') == [
        {'step': 1, 'loss': {'web': 2.0, 'code': 1.0}, 'mfu': None}
    ]
    assert _scalars(tmp_path / 'tensorboard' / 'validation') == {1: {'loss/web': 2.0, 'loss/code': 1.0}}


class _Moody(metrics.Sink):
    """Takes entries while `works`."""

    works, taken = True, []

    def write(self, entry):
        if not self.works:
            raise OSError(28, 'No space left on device')
        self.taken.append(entry['step'])


def _writer(path, monkeypatch, make):
    monkeypatch.setattr(metrics, 'sinks', lambda *_, **__: {str(path): lambda: metrics.JsonLines(path), 'other': make})
    return metrics.Writer(path, tiny.CONFIG, start_step=0)


def test_what_a_sink_cannot_take_waits_and_is_said_once(tmp_path, monkeypatch, capsys):
    path = tmp_path / 'metrics.jsonl'
    monkeypatch.setattr(_Moody, 'taken', [])
    writer = _writer(path, monkeypatch, _Moody)
    for step in range(1, 8):
        monkeypatch.setattr(_Moody, 'works', step not in (3, 4, 5))
        writer.write({'step': step})
        assert writer.sync(), "the run's own file is written"
    writer.close()
    assert _Moody.taken == [entry['step'] for entry in records.read_entries(path)] == list(range(1, 8))
    said = capsys.readouterr().err.splitlines()
    assert said == [
        'other cannot be written ([Errno 28] No space left on device); 1 entries wait',
        'other is written again',
    ]


def test_a_sink_that_cannot_even_be_made_ends_nothing(tmp_path, monkeypatch, capsys):
    def make():
        raise ImportError('no such tracker')

    monkeypatch.setattr(metrics, '_MOST_WAITING', 3)
    monkeypatch.setattr(metrics, '_SAID_EVERY_S', 0.0)
    writer = _writer(tmp_path / 'metrics.jsonl', monkeypatch, make)
    for step in range(1, 6):
        writer.write({'step': step})
    writer.close()
    assert 'other cannot be written (no such tracker); 3 entries wait, 2 older ones are lost' in capsys.readouterr().err


def test_entries_wait_while_the_disk_is_full_and_none_is_torn(tmp_path, capsys):
    path = tmp_path / 'metrics.jsonl'
    writer = metrics.Writer(path, tiny.CONFIG, start_step=0)
    writer.write({'step': 1, 'loss': 0.5})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30, hard))  # the stand-in for a full disk: room for a part of a line
    try:
        for step in (2, 3):
            writer.write({'step': step, 'loss': 0.5})
            assert not writer.sync()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == records.line({'step': 1, 'loss': 0.5})
    writer.write({'step': 4, 'loss': 0.5})
    assert writer.sync()
    writer.close()
    assert [entry['step'] for entry in records.read_entries(path)] == [1, 2, 3, 4]
    assert 'metrics.jsonl cannot be written' in capsys.readouterr().err
    assert _scalars(tmp_path / 'tensorboard' / 'metrics') == {step: {'loss': 0.5} for step in (1, 2, 3, 4)}


def _scalars(folder):
    """Returns {step: {name: value}} of a folder's only event file, whose checksums must be right."""
    (file,) = folder.glob('events*')
    data, steps = file.read_bytes(), {}
    while data:
        length = int.from_bytes(data[:8], 'little')
        content = data[12 : 12 + length]
        assert int.from_bytes(data[12 + length : 16 + length], 'little') == record_writer.masked_crc32c(content)
        event = event_pb2.Event.FromString(content)
        if event.summary.value:
            steps[event.step] = {value.tag: value.simple_value for value in event.summary.value}
        data = data[16 + length :]
    return steps


def test_a_log_that_was_replaced_is_no_log(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    writer = metrics.Writer(path, tiny.CONFIG, start_step=0)
    writer.write({'step': 1})
    path.unlink()
    assert not writer.sync()
    writer.write({'step': 2})
    assert writer.sync()
    writer.close()
    assert [entry['step'] for entry in records.read_entries(path)] == [2]


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
