"""The demo on a tiny model: interrupted, completed, run again."""

import json
import os
import signal
import subprocess
import sys

import pytest

from demo import run
from tests.conftest import ROOT
from tests.support import corpora

SMALL = [
    f'--config.{setting}'
    for setting in (
        'model.vocab_size=400 data.tokenizer_pieces=400 data.workers=1 model.seq_len=256 model.num_layers=1 '
        'model.embed_dim=16 model.num_heads=2 model.num_kv_heads=1 model.head_dim=8 model.hidden_dim=16 '
        'optimizer.warmup_steps=1 train.global_batch_size=2 train.micro_batch_size=2 '
        'train.eval_rows=4 train.eval_every_steps=0 train.checkpoint_every_steps=30 train.log_every_steps=1'
    ).split()
]


def _start(workdir, *overrides):
    return subprocess.Popen(
        [sys.executable, '-m', 'demo.run', str(workdir), *overrides],
        cwd=ROOT,
        env={**os.environ, 'XLA_FLAGS': '', 'PYTHONUNBUFFERED': '1'},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def _commands(output: str) -> list[str]:
    return [line.split()[3] for line in output.splitlines() if line.startswith('$ python main.py ')]


@pytest.fixture(scope='module')
def interrupted(tmp_path_factory):
    """A demo of many steps, stopped by Ctrl-C while it trained: (workdir, output, status)."""
    workdir = tmp_path_factory.mktemp('demo')
    corpora.slimpajama(workdir / 'corpus/slimpajama', documents=40)
    corpora.starcoder(workdir / 'corpus/starcoder', documents=60)
    process, lines = _start(workdir, *SMALL, '--config.train.num_steps=1000000'), []
    for line in process.stdout:
        lines.append(line)
        if 'step 2/' in line:
            os.killpg(process.pid, signal.SIGINT)
            break
    output = ''.join(lines) + process.communicate(timeout=120)[0]
    return workdir, output, process.returncode


def test_ctrl_c_saves_and_says_how_to_resume(interrupted):
    _, output, status = interrupted
    assert status == 130, output
    assert 'stopped and saved at step' in output
    assert '`make demo` resumes from here' in output
    assert 'Traceback' not in output


def _newest(workdir) -> int:
    return max(int(path.name) for path in (workdir / 'checkpoints').iterdir())


@pytest.fixture(scope='module')
def finished(interrupted):
    """The demo that was interrupted, completed: (workdir, settings, output)."""
    workdir = interrupted[0]
    settings = (*SMALL, f'--config.train.num_steps={_newest(workdir) + 20}')
    process = _start(workdir, *settings)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return workdir, settings, output


def test_the_demo_resumes_and_shows_its_results(finished):
    workdir, settings, output = finished
    assert _commands(output) == ['prepare', 'train', 'export', 'evaluate', 'generate', 'report']
    assert 'steps 0 to' not in output, 'it started over'
    results = output[output.index('=' * 78) :]
    summary = json.loads((workdir / 'report/summary.json').read_text())
    for source in ('slimpajama', 'starcoder'):
        assert f'{summary["heldout_loss"][source]:.3f}' in results
        assert f'{summary["unigram_loss"][source]:.3f}' in results
    assert f'{summary["tasks"]["cloze"]["acc"]:.3f} ± ' in results
    assert f'{summary["tasks"]["cloze"]["gold_bits_per_byte"]:.3f} ± ' in results
    assert results.count(' generated ') == 3
    assert all(prompt in results for prompt in run.PROMPTS)
    assert f'report: {workdir / "report/index.html"}' in results
    assert results.count(' main.py ') == 3
    assert (workdir / 'export/model.safetensors').exists()
    again = _start(workdir, *settings)
    output, _ = again.communicate(timeout=300)
    assert again.returncode == 0, output
    assert _commands(output) == ['prepare', 'train', 'generate', 'report']


def test_extended_by_hand_it_is_exported_and_evaluated_again(finished, monkeypatch):
    """Runs only the training; notes the other commands."""
    workdir, settings, _ = finished
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv('XLA_FLAGS', '')
    really, noted = run.command, []
    extended = _newest(workdir) + 2
    train = ('train', f'--config={run.CONFIG}', *SMALL, f'--config.train.num_steps={extended}')
    really(*train, f'--workdir={workdir}')

    def command(name, *arguments, capture=False):
        noted.append((name, *arguments))
        return really(name, *arguments) if name == 'train' else ''

    monkeypatch.setattr(run, 'command', command)
    run._steps(workdir, settings)
    assert [name for name, *_ in noted] == ['prepare', 'train', 'export', 'evaluate', 'generate', 'report']
    assert f'--output={workdir}/eval/cloze-{extended}.json' in noted[3]
    assert _newest(workdir) == extended


def test_a_failing_step_ends_the_demo_with_its_status(tmp_path):
    process = _start(tmp_path, '--config.model.num_layer=1')
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "the nearest is 'num_layers'" in output
    assert _commands(output) == ['prepare']
    assert 'ended with status 2' in output


def test_continuations_are_cut_before_each_prompt():
    texts = ''.join(f'{prompt} and\nmore\n' for prompt in run.PROMPTS)
    assert run._continuations(texts) == [f'{prompt} and\nmore' for prompt in run.PROMPTS]
