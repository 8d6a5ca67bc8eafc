"""Real processes train as one does, save and end together, and name the one that is lost, stuck or different."""

import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

import pytest

from tests.conftest import DEVICES, OPTIMIZATION, ROOT
from tests.support import slurm
from tests.support.processes import Processes
from tinyllama_jax import errors, train
from tinyllama_jax.cluster import place
from tinyllama_jax.cluster.members import Members, joined
from tinyllama_jax.config import Config, TrainConfig
from tinyllama_jax.data import pipeline, store
from tinyllama_jax.run import records
from tinyllama_jax.settings import experiment, tree

STEPS = 10
EXPERIMENT = f'--config={ROOT}/tests/support/tiny_experiment.py:{STEPS}'
ONCE = pytest.mark.skipif(sys.version_info >= (3, 12), reason='costly, and run on Python 3.11')
SETTINGS = {
    'model.num_layers': '1',
    'train.micro_batch_size': '1',
    'train.checkpoint_every_steps': '4',
    'train.eval_every_steps': '6',
}


def _arguments(store, **more):
    settings = SETTINGS | {'data.store': str(store)} | {name.replace('__', '.'): value for name, value in more.items()}
    return [EXPERIMENT, *(f'--config.{name}={value}' for name, value in settings.items())]


def _losses(folder):
    return [entry['loss'] for entry in records.read_entries(folder / 'metrics.jsonl')]


@pytest.fixture(scope='module')
def one(tiny_store, tmp_path_factory):
    """The workdir of a single-process run on eight devices."""
    folder = tmp_path_factory.mktemp('one')
    config = experiment.load_experiment(f'{ROOT}/tests/support/tiny_experiment.py:{STEPS}')
    for name, value in {**SETTINGS, 'data.store': str(tiny_store)}.items():
        config = experiment.override(config, name, value)
    train.train(config, folder)
    return folder


@pytest.fixture(scope='module')
def two(tiny_store, tmp_path_factory):
    """(workdir, processes) of an uninterrupted run of two processes with four devices each."""
    folder = tmp_path_factory.mktemp('two') / 'run'
    main = ('-m', 'tests.support.one_process')
    with Processes(folder, _arguments(tiny_store), main=main, READS=f'{folder}.reads') as processes:
        assert processes.wait() == [0, 0], processes.lines(0) + processes.lines(1)
    return folder, processes


def test_two_processes_train_as_one(one, two):
    folder, processes = two
    assert _losses(folder) == pytest.approx(_losses(one), abs=1e-5) and len(_losses(folder)) == STEPS
    for mine, theirs in zip(*(records.read_entries(f / 'validation.jsonl') for f in (one, folder)), strict=True):
        assert theirs['loss'] == pytest.approx(mine['loss'], abs=1e-5)
    assert '2 hosts (host-0, host-1), 2 processes, 8 x cpu, mesh data 1, fsdp 8, tensor 1; ' in processes.lines(0)


def test_only_the_first_process_writes_and_speaks(two):
    folder, processes = two
    assert f'step {STEPS}/{STEPS}: loss' in processes.lines(0)
    assert not re.search('^(step|main.py|trained|2 hosts|ops on)', processes.lines(1), re.MULTILINE)
    assert len(list((folder / 'tensorboard' / 'metrics').iterdir())) == 1


def test_each_process_reads_only_its_slice_of_the_data(two):
    folder, _ = two
    rows = []
    for host in ('host-0', 'host-1'):
        reads = map(json.loads, folder.with_name(f'run.reads.{host}').read_text().splitlines())
        rows.append([(source, split, row) for source, split, numbers in reads for row in numbers])
    trained = [len([row for row in read if row[1] == 'train']) for read in rows]
    assert abs(trained[0] - trained[1]) <= 8 and not set(rows[0]) & set(rows[1])
    validated = sum(map(len, rows)) - STEPS * 8
    assert validated == 2 * sum(_validation_rows(folder)), 'two validations, and no row by both'


def _validation_rows(folder):
    written = json.loads((folder / 'config.json').read_text())
    config = tree.from_dict(written['config'])
    data = pipeline.make_dataset(config, store.TokenStore(config.data.store))
    return [data.validation_size(name) for name in data.sources]


def test_the_step_times_of_each_host_are_logged(two):
    entries = records.read_entries(two[0] / 'metrics.jsonl')
    times = [entry['step_seconds'] for entry in entries if 'step_seconds' in entry]
    assert len(times) >= STEPS - 4
    for by_host in times:
        assert set(by_host) == {'host-0', 'host-1'}
        assert all(0 < host['min'] <= host['max'] < 120 for host in by_host.values())


@ONCE
def test_after_a_killed_coordinator_the_same_command_resumes_with_the_same_digits(tiny_store, two, tmp_path):
    folder, arguments = tmp_path / 'run', _arguments(tiny_store)
    with Processes(folder, arguments) as processes:
        processes.wait_for_step(folder, 5)
        processes.running[0].kill()
        assert processes.wait(timeout=60) == [-signal.SIGKILL, 75]
        said = processes.lines(1)
        assert f'main.py: process 0 on host-0 (the coordinator, {processes.address}) is lost: its connection' in said
        assert 'Traceback' not in said
    with Processes(folder, arguments) as processes:
        assert processes.wait() == [0, 0], processes.lines(0)
        assert 'steps 4 to' in processes.lines(0)
    assert _losses(folder) == _losses(two[0])
    assert (folder / 'validation.jsonl').read_text() == (two[0] / 'validation.jsonl').read_text()


@ONCE
def test_a_damaged_checkpoint_is_moved_and_all_end_with_75(tiny_store, two, tmp_path):
    folder = shutil.copytree(two[0], tmp_path / 'run')
    for path in (folder / 'checkpoints' / str(STEPS)).rglob('params/**/d/*'):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with Processes(folder, _arguments(tiny_store)) as processes:
        assert processes.wait() == [75, 75]
    assert 'damaged checkpoint: ' in processes.lines(0) and 'checkpoints-damaged; the same' in processes.lines(0)
    assert sorted(path.name for path in (folder / 'checkpoints').iterdir()) == ['4', '8']
    assert [path.name for path in (folder / 'checkpoints-damaged').iterdir()] == [str(STEPS)]


@ONCE
def test_four_processes_train_as_one_and_save_at_one_step_when_one_of_them_is_told_to_stop(tiny_store, one, tmp_path):
    folder = tmp_path / 'run'
    with Processes(folder, _arguments(tiny_store), 4) as processes:
        processes.wait_for_step(folder, 2)
        processes.running[2].send_signal(signal.SIGTERM)
        assert processes.wait() == [143] * 4
        said = {processes.lines(i).splitlines()[-1] for i in range(4)}
        assert len(said) == 1 and 'stopped and saved at step' in said.pop()
    losses = _losses(folder)
    assert losses == pytest.approx(_losses(one)[: len(losses)], abs=1e-5)
    assert str(len(losses)) in [path.name for path in (folder / 'checkpoints').iterdir()]


@pytest.mark.parametrize(
    ('number', 'line'),
    [
        (signal.SIGKILL, 'its connection closed without a word (killed, or its host went down)'),
        pytest.param(signal.SIGSTOP, 'not heard of for 20 s (stopped, or the host or its network is down)', marks=ONCE),
    ],
)
def test_a_lost_process_is_named_even_while_the_others_still_gather(number, line, tiny_store, tmp_path):
    """Process 2 never comes, so that no process gets as far as JAX."""
    each = [('--num_processes=3',)] * 2
    with Processes(tmp_path / 'run', _arguments(tiny_store), 2, each=each) as processes:
        deadline = time.monotonic() + 30
        while not _connected(processes.running[1].pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(1)
        processes.running[1].send_signal(number)
        assert processes.wait(timeout=60, without=[1]) == [75]
        assert f'main.py: process 1 on host-1 is lost: {line}' in processes.lines(0)


def _connected(pid: int) -> bool:
    """Whether a process has a TCP connection, according to Linux's /proc."""
    tables = ''.join(pathlib.Path(f'/proc/{pid}/net/{name}').read_text() for name in ('tcp', 'tcp6'))
    established = {fields[9] for fields in map(str.split, tables.splitlines()) if fields[3] == '01'}
    links = []
    for link in pathlib.Path(f'/proc/{pid}/fd').iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed since it was listed
            links.append(os.readlink(link))
    return any(link == f'socket:[{inode}]' for link in links for inode in established)


@ONCE
def test_a_process_that_is_stuck_in_a_hook_is_named_after_every_threads_stack(tiny_store, tmp_path):
    """It sleeps in its first hook, after the first step."""
    arguments = _arguments(tiny_store, train__stuck_timeout_s='8', train__eval_every_steps='1')
    with Processes(tmp_path / 'run', arguments, main=('-m', 'tests.support.one_process'), STUCK='host-1') as processes:
        assert processes.wait() == [75, 75]
    for i in range(2):
        stacks, line = processes.lines(i).rsplit('main.py: ', 1)
        assert 'process 1 on host-1 is stuck in a hook: the others have waited for ' in line
        assert f'process {i} on host-{i}, every thread' in stacks
        assert 'in _call_hooks' in stacks if i else 'in loop' in stacks


def _ends(processes, status, message):
    """Asserts that all end with this status and message."""
    count = len(processes.running)
    assert processes.wait(timeout=120) == [status] * count, ''.join(map(processes.lines, range(count)))
    for i in range(count):
        assert message in processes.lines(i)
        assert 'Traceback' not in processes.lines(i)


def test_hosts_that_disagree_on_the_configuration_are_named(tiny_store, tmp_path):
    each = [(), ('--config.seed=7',), ()]
    with Processes(tmp_path / 'run', _arguments(tiny_store), 3, each=each) as processes:
        _ends(
            processes,
            2,
            'the hosts disagree on config.seed: 1 in process 0 on host-0, 2 on host-2, 7 in process 1 on host-1.',
        )
    assert not (tmp_path / 'run').exists()


def test_two_processes_with_one_id_are_named(tiny_store, tmp_path):
    each = [(), (), ('--process_id=1',)]
    with Processes(tmp_path / 'run', _arguments(tiny_store), 3, each=each) as processes:
        _ends(processes, 2, 'two processes have the id 1: one on host-')


def test_processes_with_different_num_processes_are_named(tiny_store, tmp_path):
    each = [(), ('--num_processes=3',)]
    with Processes(tmp_path / 'run', _arguments(tiny_store), each=each) as processes:
        _ends(processes, 2, 'process 1 on host-1 was told of 3 processes, process 0 on host-0 of 2')


def test_a_process_that_does_not_come_is_named(tiny_store, tmp_path):
    each = [('--num_processes=2',)]
    with Processes(tmp_path / 'run', _arguments(tiny_store, train__join_timeout_s='2'), 1, each=each) as processes:
        _ends(
            processes, 75, f'only 1 of 2 processes came to {processes.address} within 2 s; missing: 1 (there: 0 on host'
        )


def test_a_coordinator_that_cannot_be_reached_is_named_by_its_address(tiny_store, tmp_path):
    each = [('--num_processes=2', '--process_id=1')]
    with Processes(tmp_path / 'run', _arguments(tiny_store, train__join_timeout_s='2'), 1, each=each) as processes:
        _ends(
            processes, 75, f'process 1 on host-0: the coordinator {processes.address} could not be reached within 2 s'
        )


@pytest.mark.parametrize('answer', [None, b'', b'HTTP/1.1 400 Bad Request\r\n\r\n'], ids=['silent', 'closed', 'other'])
def test_a_program_that_is_not_the_coordinator_is_named_by_its_address(answer):
    """After a closed connection it connects again: a forwarded port may be open before process 0 is there."""
    accepted = []

    def serve():
        with contextlib.suppress(OSError):  # the listener is closed
            while True:
                accepted.append(listener.accept()[0])
                if answer is not None:
                    accepted[-1].sendall(answer)
                    accepted[-1].close()

    with socket.create_server(('127.0.0.1', 0)) as listener:
        address = f'127.0.0.1:{listener.getsockname()[1]}'
        thread = threading.Thread(target=serve)
        thread.start()
        config = Config(train=TrainConfig(join_timeout_s=1.2))
        began = time.monotonic()
        expected = f'process 1 on b: the coordinator {address} could not be reached within 1.2 s'
        with pytest.raises(errors.Unavailable, match=expected), joined(place.Place('b', address, 2, 1), config):
            pass
        assert 1 < time.monotonic() - began < 10
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
    assert answer is None or len(accepted) > 1
    for connection in accepted:
        connection.close()


def test_hosts_with_different_numbers_of_devices_are_named(tiny_store, tmp_path):
    environments = [{}, {'XLA_FLAGS': f'{DEVICES}=3'}]
    with Processes(tmp_path / 'run', _arguments(tiny_store), environments=environments) as processes:
        _ends(
            processes,
            2,
            'the hosts disagree on devices: 4 x cpu in process 0 on host-0, 3 x cpu in process 1 on host-1. Start',
        )


@ONCE
def test_hosts_with_different_data_are_named(tiny_store, tmp_path):
    folders = [tmp_path / name for name in 'ab']
    for folder in folders:
        shutil.copytree(tiny_store, folder / 'store')
    manifest = folders[1] / 'store' / 'manifest.json'
    content = json.loads(manifest.read_text())
    content['sources']['prose']['splits']['train']['files'][0]['sha256'] = 'of another file'
    manifest.write_text(json.dumps(content))
    with Processes(tmp_path / 'run', _arguments('store'), folders=folders) as processes:
        _ends(processes, 2, 'the hosts disagree on data: ')
        assert 'in process 0 on host-0, ' in processes.lines(1)


@pytest.fixture(scope='module')
def cluster():
    """A real Slurm cluster with this machine as its node."""
    if reason := slurm.missing():
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(dir='/tmp') as folder, slurm.Slurm(pathlib.Path(folder)) as running:
        running.environment |= {
            'PYTHON': sys.executable,
            'XLA_FLAGS': f'{DEVICES}=4 {OPTIMIZATION}',
        }
        yield running


BATCH = ['--nodes=1', '--ntasks=2', '--ntasks-per-node=2']


@ONCE
def test_under_slurm_a_preempted_job_resumes_with_the_same_digits(cluster, tiny_store, one, two, tmp_path):
    folder, log = tmp_path / 'run', tmp_path / 'job.log'
    job = cluster.submit(
        *BATCH, f'--output={log}', 'launch/slurm.sbatch', *_arguments(tiny_store), f'--workdir={folder}'
    )
    deadline = time.monotonic() + 240
    while len(_losses(folder)) < 5:
        assert cluster.job(job)['JobState'] in ('PENDING', 'RUNNING') and time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    cluster.run('scontrol', 'requeue', job)
    ended = cluster.wait(job)
    said = log.read_text()
    assert (ended['JobState'], ended['Restarts']) == ('COMPLETED', '1'), said
    assert '2 processes, 8 x cpu' in said
    assert len(re.findall('main.py: stopped and saved at step', said)) == 2
    assert len(re.findall(rf'steps (\d+) to {STEPS}', said)) == 2 and f'steps 0 to {STEPS}' in said
    assert _losses(folder) == _losses(two[0])
    assert _losses(folder) == pytest.approx(_losses(one), abs=1e-5)


@ONCE
@pytest.mark.parametrize(('status', 'again'), [(75, True), (143, True), (137, True), (1, False), (2, False)])
def test_slurms_script_queues_the_job_again_exactly_when_a_restart_can_help(status, again, cluster, tmp_path):
    program = tmp_path / 'program'  # instead of main.py
    program.write_text(f'#!/bin/sh\n[ -z "$SLURM_RESTART_COUNT" ] || exit 0\n[ $SLURM_PROCID = 0 ] || exit {status}\n')
    program.chmod(0o755)
    environment = cluster.environment | {'PYTHON': str(program)}
    command = ['sbatch', '--parsable', *BATCH, f'--output={tmp_path}/job.log', 'launch/slurm.sbatch']
    job = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout.strip()
    ended = cluster.wait(job)
    wanted = ('COMPLETED', '1', '0:0') if again else ('FAILED', '0', f'{status}:0')
    assert (ended['JobState'], ended['Restarts'], ended['ExitCode']) == wanted


class Gathered(Members):
    """Process 0 of several whose values are given."""

    def __init__(self, *values):
        super().__init__(place.Place('a', 'a:1', len(values)), None)
        self.hosts, self._values = [f'host-{i}' for i in range(len(values))], values

    def gather(self, name, value):
        return list(self._values)


def test_a_difference_is_reported_with_every_value_and_who_has_it():
    with pytest.raises(
        errors.UsageError, match='on versions.jax: 1 in process 0 on host-0, 2 on host-2, None in process 1'
    ):
        Gathered({'versions': {'jax': 1}}, {'versions': {}}, {'versions': {'jax': 1}}).agree(versions={})
    Gathered({'a': [1, 2]}, {'a': [1, 2]}).agree(a=[1, 2])


def test_of_many_hosts_the_first_few_are_named():
    with pytest.raises(
        errors.UsageError, match='x in process 0 on host-0, 1 on host-1, 2 on host-2, 3 on host-3 and 5 more'
    ):
        Gathered(*[{'commit': 'x'}] * 9, {'commit': 'y'}).agree(commit='x')


def test_a_single_process_agrees_with_itself(tmp_path):
    alone = Members(place.find(environment={}), None)
    alone.agree(anything=1)
    assert alone.gather('a', 1) == [1] and alone.primary and str(alone).endswith(', 1 process')


def test_a_single_process_that_hangs_prints_its_stacks_and_ends_with_75():
    program = """
import time
from tinyllama_jax import config
from tinyllama_jax.cluster import members as cluster
members = cluster.alone(config.TrainConfig(hang_timeout_s=1.0))
members.watch()
members.at('a hook')
time.sleep(60)
"""
    done = subprocess.run([sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 75
    assert 'File "<string>", line 8 in <module>' in done.stderr
    assert re.search(r'main\.py: process 0 on \S+ is hanging in a hook: no step for \d s\. The same', done.stderr)
