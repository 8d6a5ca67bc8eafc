"""Prepare's processes: killed, stopped by Ctrl-C, out of disk, resumed."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.conftest import ROOT
from tests.support import corpora
from tinyllama_jax.config import DataConfig
from tinyllama_jax.data import prepare, store


def command(config: DataConfig, path, workers: int) -> list[str]:
    sources = ['--config.data.sources.slimpajama=none', '--config.data.sources.starcoder=none']
    sources += [f'--config.data.sources.{name}.path={source.path}' for name, source in config.sources.items()]
    flags = [*sources, f'--config.data.tokenizer={config.tokenizer}', f'--config.data.workers={workers}']
    flags += [f'--config.data.store={path}', f'--workdir={path.parent}', '--config.data.python_corpus=false']
    return [sys.executable, 'main.py', 'prepare', '--config=configs/demo.py', *flags]


def start(arguments, **options):
    return subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_killed_and_resumed_it_writes_the_same_bytes(tmp_path):
    corpora.slimpajama(tmp_path / 'slim', files=10, documents=60)
    corpora.starcoder(tmp_path / 'star', files=4, documents=60)
    config = corpora.config(tmp_path)
    prepare.prepare(config, tmp_path / 'whole')
    for wanted in (1, 4, 8):
        process = start(command(config, tmp_path / 'store', 2))
        while len(list((tmp_path / 'store').glob('.progress/results/*.json'))) < wanted:
            assert process.poll() is None, process.communicate()
            time.sleep(0.005)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL  # it was still at work
        assert not (tmp_path / 'store' / store.MANIFEST).exists()
    prepare.prepare(config, tmp_path / 'store')
    corpora.assert_same_files(tmp_path / 'whole', tmp_path / 'store')


def _stuck_prepare(tmp_path):
    """(a prepare whose two workers include one that waits for ever for its input, a named pipe; its processes)"""
    root = corpora.starcoder(tmp_path / 'words', files=3)
    os.mkfifo(root / 'stuck.jsonl')
    process = start(command(corpora.one_source(root), tmp_path / 'store', 2))
    deadline = time.monotonic() + 60
    while len(list((tmp_path / 'store').glob('.progress/datatrove/completions/*'))) < 3:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process, psutil.Process(process.pid).children(recursive=True)


def test_a_killed_worker_ends_prepare_with_one_line(tmp_path):
    process, children = _stuck_prepare(tmp_path)
    workers = [child for child in children if len(child.open_files()) or child.num_threads() > 1]
    assert workers
    for worker in workers:
        with contextlib.suppress(psutil.NoSuchProcess):  # the pool ends the others when it misses one
            worker.kill()
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 1
    assert 'was killed' in stderr
    assert len(stderr.strip().splitlines()) == 1
    assert not (tmp_path / 'store' / store.MANIFEST).exists()


@pytest.mark.parametrize('end', [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_prepare(tmp_path, end):
    process, children = _stuck_prepare(tmp_path)
    assert len(children) >= 2
    process.send_signal(end)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == (130 if end == signal.SIGINT else -end), stderr
    assert 'Traceback' not in stderr
    assert not psutil.wait_procs(children, timeout=10)[1]


@pytest.mark.parametrize('delay', [0.05, 0.3])
def test_ctrl_c_at_a_terminal_while_workers_start_is_one_line(tmp_path, delay):
    """A terminal sends it to every process of a command; here soon after the fork server starts."""
    root = corpora.starcoder(tmp_path / 'words', files=3)
    process = start(command(corpora.one_source(root), tmp_path / 'store', 2), start_new_session=True)
    while process.poll() is None and not _commands_of_children(process.pid, 'forkserver'):
        time.sleep(0.001)
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr == 'main.py: prepare was stopped; run it again to resume.\n'


def _commands_of_children(pid: int, part: str) -> list[str]:
    children = psutil.Process(pid).children(recursive=True)
    return [text for child in children if part in (text := ' '.join(child.cmdline()))]


def test_a_full_disk_ends_prepare_and_the_rest_is_done_later(tmp_path):
    root = corpora.write_zst(tmp_path / 'words' / 'a.jsonl.zst', [corpora.record(t) for t in corpora.texts(400)]).parent
    corpora.write_zst(root / 'b.jsonl.zst', [corpora.record('small')])
    # The stand-in for a full disk is a limit on the size of a file.
    full = ['prlimit', f'--fsize={64 << 10}', *command(corpora.one_source(root), tmp_path / 'store', 2)]
    process = start(full)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1, stderr
    assert f'The store {tmp_path / "store"} cannot be written' in stderr
    assert len(stderr.strip().splitlines()) == 1
    assert not (tmp_path / 'store' / store.MANIFEST).exists()
    prepare.prepare(corpora.one_source(root), tmp_path / 'store')
    prepare.prepare(corpora.one_source(root), tmp_path / 'fresh')
    corpora.assert_same_files(tmp_path / 'store', tmp_path / 'fresh')
