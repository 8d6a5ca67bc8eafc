"""The command line as a user meets it: exit statuses and one clear line for each kind of bad input."""

import contextlib
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from absl import flags

import main
from eval_bridge.hf import convert
from tests.conftest import ROOT
from tests.support import tiny_export
from tinyllama_jax.settings import commands


@pytest.fixture(autouse=True)
def _fresh_flags():
    yield
    main.FLAGS.unparse_flags()
    for name in main.FLAGS:
        main.FLAGS[name].unparse()


def _fails(capsys, *arguments: str) -> str:
    """Runs a command that must exit with status 2, and returns its one line."""
    assert main.main(['main.py', *arguments]) == 2
    said = capsys.readouterr()
    assert not said.out
    assert said.err.startswith('main.py: ')
    return said.err


DEMO = '--config=configs/demo.py'


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ((), 'usage: main.py prepare|train|evaluate'),
        (('fly', '--workdir=x'), 'usage: main.py prepare|train|evaluate'),
        (('train',), 'train needs --workdir=DIR'),
        (('train', '--workdir=x'), '--config=FILE is missing'),
        (('train', '--workdri=x', DEMO), 'Did you mean: workdir'),
        (('train', '--workdir=x', '--config=configs/none.py'), 'there is no file configs/none.py'),
        (('train', '--workdir=x', DEMO, '--config.model.num_head=2'), "the nearest is 'num_heads'"),
        (('train', '--workdir=x', DEMO, '--config.model.num_kv_heads=3'), '3 does not divide num_heads = 8'),
        (('train', '--workdir=x', DEMO, '--config.data.sources.starcoder.weight=-5'), 'starcoder.weight: must be'),
        (('train', '--workdir=x', DEMO), 'python main.py prepare'),
        (('export', '--workdir=x'), '--output=DIR'),
        (('export', '--workdir=x', '--output=y'), 'there is no config.json'),
        (('export', '--workdir=x', '--output=y', '--dtype=int8'), 'dtype'),
        (('import', '--workdir=x'), '--input=DIR'),
        (('generate', '--workdir=x'), '--prompt=TEXT is missing'),
        (('evaluate', '--workdir=x'), '--tasks=NAME,NAME is missing'),
        (('evaluate', '--tasks=piqa'), 'evaluate needs --workdir=DIR, the folder of a run, or --model=FOLDER'),
        (('plan', DEMO), '--topology=: write NODESxGPUS'),
        (('report', '--workdir=x'), 'main.py train'),
        (('train', '--workdir=x', DEMO, '--limit=3'), '--limit is a flag of evaluate, not of train; leave it out.'),
        (('export', '--workdir=x', '--output=y', '--prompt=z'), '--prompt is a flag of generate, not of export'),
        (('prepare', '--step=0'), '--step is a flag of evaluate, export, generate, not of prepare'),
        (('train', '--workdir=gs://b/x', DEMO), '--workdir: gs://b/x is an address'),
        (('evaluate', '--model=~nobody-here/x', '--tasks=piqa'), '--model: there is no home folder for ~nobody-here/x'),
        (('report', '--workdir=x', '--nolog_samples'), '--log_samples is a flag of evaluate, not of report'),
    ],
)
def test_bad_usage_is_one_line_and_status_2(arguments, message, capsys, monkeypatch, tmp_path):
    said = _fails(
        capsys, *(a.replace('=x', f'={tmp_path}/x').replace('configs/', f'{ROOT}/configs/') for a in arguments)
    )
    assert message.replace('configs/', f'{ROOT}/configs/') in said
    assert not (tmp_path / 'x').exists() or not any((tmp_path / 'x').iterdir())


def test_the_line_reaches_the_shell():
    done = subprocess.run([sys.executable, 'main.py', 'train'], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, '')
    assert done.stderr == 'main.py: train needs --workdir=DIR, the folder of the run.\n'


def test_one_command_started_twice_is_refused(capsys, monkeypatch):
    monkeypatch.setenv('OMPI_COMM_WORLD_SIZE', '2')
    monkeypatch.setenv('OMPI_COMM_WORLD_RANK', '1')
    for command, message in (('prepare', 'prepare runs in one process'), ('train', 'a launcher started several')):
        said = _fails(capsys, command, '--workdir=nowhere', f'--config={ROOT}/configs/demo.py')
        assert f'OMPI_COMM_WORLD_SIZE=2: {message}' in said


def test_help_lists_the_flags():
    done = subprocess.run([sys.executable, 'main.py', 'train', '--help'], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, '')
    assert done.stdout.startswith('usage: main.py prepare|train|')
    assert '--workdir: The folder of the run.' in done.stdout


def _stopped(arguments, ready, then=lambda: None) -> None:
    """Sends SIGINT to main.py once `ready(process id)` holds, calls `then`, and expects its line and status 130."""
    process = subprocess.Popen(
        [sys.executable, 'main.py', *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and not ready(process.pid):
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    then()
    output, said = process.communicate(timeout=60)
    assert (process.returncode, output) == (130, ''), said
    assert said.splitlines()[-1] == 'main.py: stopped by Ctrl-C; the same command resumes or starts over.'
    assert 'Traceback' not in said and said.count('main.py') == 1


@pytest.mark.skipif(not pathlib.Path('/proc').exists(), reason='needs Linux')
@pytest.mark.parametrize('command', commands.COMMANDS)
def test_ctrl_c_while_modules_are_imported_is_one_line_and_status_130(command, tmp_path):
    flags = [DEMO] if commands.COMMANDS[command].needs_config else []
    _stopped(
        [command, f'--workdir={tmp_path}', *flags],
        ready=lambda pid: '/numpy/' in pathlib.Path(f'/proc/{pid}/maps').read_text(),
    )


@pytest.fixture(scope='module')
def imported(tmp_path_factory):
    """(Hugging Face folder, workdir that it was imported to)"""
    folder = tmp_path_factory.mktemp('imported')
    source = tiny_export.write_export(folder)
    convert.import_run(None, folder / 'run', input=str(source), command='main.py import')
    return source, folder / 'run'


@pytest.mark.parametrize(
    ('command', 'waits_for'),
    [
        (f'prepare --workdir=NEW {DEMO} --config.data.python_corpus=false --config.data.sources.starcoder=none'
         ' --config.data.sources.slimpajama.path=SOURCE/config.json --config.data.sources.slimpajama.format=text'
         ' --config.data.tokenizer=PIPE', 'PIPE'),
        ('import --input=SOURCE --workdir=NEW', 'SOURCE/config.json'),
        ('evaluate --model=SOURCE --tasks=piqa', 'SOURCE/config.json'),
        ('export --workdir=RUN --output=NEW', 'RUN/tokenizer/tokenizer.json'),
        ('generate --workdir=RUN --prompt=a', 'RUN/tokenizer/tokenizer.json'),
        ('report --workdir=RUN', 'RUN/metrics.jsonl'),
    ],
)  # fmt: skip
def test_ctrl_c_at_work_is_one_line_and_status_130(command, waits_for, imported, tmp_path):
    """The command waits for a file that is a named pipe, which tells when it has got there.

    Python acts on a signal between two of its own instructions: one that comes just before the read begins would wait
    for the read to end, so the pipe is closed as soon as the signal is sent.
    """
    for name, folder in zip(('SOURCE', 'RUN'), imported, strict=True):
        shutil.copytree(folder, tmp_path / name)
    pipe = tmp_path / waits_for
    pipe.unlink(missing_ok=True)
    os.mkfifo(pipe)
    held = []

    def is_read(_) -> bool:
        with contextlib.suppress(OSError):  # nobody has opened it for reading yet
            held.append(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
        return bool(held)

    arguments = [re.sub(r'=(SOURCE|RUN|NEW|PIPE)', rf'={tmp_path}/\1', argument) for argument in command.split()]
    _stopped(arguments, ready=is_read, then=lambda: os.close(held[0]))
    assert not (tmp_path / 'NEW').exists()


def test_the_help_names_the_commands_that_take_a_flag():
    own = {flag.name: flag.help for flag in flags.FLAGS.get_flags_for_module(main)}
    assert own.keys() == commands.FLAGS.keys()
    for name in own:
        assert ', '.join(commands.takers(name)) in own[name]


def test_flags_that_others_rely_on_exist():
    names = {'config', 'workdir', 'output', 'step', 'tasks', 'include_path', 'limit', 'log_samples', 'model'}
    assert names | {'dtype', 'format', 'prompt', 'temperature', 'top_k', 'top_p', 'seed'} <= set(flags.FLAGS)
