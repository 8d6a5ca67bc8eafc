"""A context that runs a one-node Slurm cluster in a temporary folder, on ports of its own."""

import os
import pathlib
import shutil
import socket
import subprocess
import time

from tests.conftest import ROOT
from tests.support.processes import free_port

_CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={daemon}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
ReturnToService=2
KillWait=60
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SchedulerParameters=sched_interval=1,batch_sched_delay=0
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=test Nodes=ALL Default=YES State=UP
"""


def missing() -> str | None:
    """Returns why Slurm cannot run here; None if it can."""
    programs = [name for name in ('munged', 'slurmctld', 'slurmd', 'sbatch', 'srun') if not shutil.which(name)]
    if programs:
        return f'{programs[0]} is not installed (apt-get install slurm-wlm munge)'
    return None if os.geteuid() == 0 else 'slurmd needs root'


class Slurm:
    """The daemons of a Slurm cluster, which run inside the context; `run` runs one of Slurm's commands."""

    def __init__(self, folder: pathlib.Path):
        self._folder, self._daemons = folder, []
        self.environment = {**os.environ, 'SLURM_CONF': f'{folder}/slurm.conf'}

    def __enter__(self):
        host = socket.gethostname().partition('.')[0]
        (self._folder / 'munge.key').write_bytes(os.urandom(128))
        (self._folder / 'munge.key').chmod(0o600)
        self._folder.chmod(0o755)
        self._folder.joinpath('slurm.conf').write_text(
            _CONFIG.format(
                host=host, folder=self._folder, controller=free_port(), daemon=free_port(), cpus=os.cpu_count()
            )
        )
        files = {'key-file': 'key', 'pid-file': 'pid', 'log-file': 'log', 'seed-file': 'seed', 'socket': 'socket'}
        options = [f'--{option}={self._folder}/munge.{name}' for option, name in files.items()]
        self._start('munged', '--foreground', '--force', *options)
        self._wait_for(lambda: (self._folder / 'munge.socket').exists(), 'munged')
        self._start('slurmctld', '-D')
        self._start('slurmd', '-D', '-N', host)
        self._wait_for(lambda: 'idle' in self.run('sinfo', '--noheader', '--format=%t', check=False), 'slurmd')
        return self

    def __exit__(self, *_):
        for daemon in reversed(self._daemons):
            daemon.terminate()
            daemon.wait()

    def _start(self, *command: str) -> None:
        with open(self._folder / f'{command[0]}.out', 'w') as out:
            self._daemons.append(subprocess.Popen(command, env=self.environment, stdout=out, stderr=out))

    def _wait_for(self, ready, what: str) -> None:
        deadline = time.monotonic() + 60
        while not ready():
            if time.monotonic() > deadline:
                logs = '\n'.join(path.read_text()[-2_000:] for path in self._folder.glob('*.out'))
                raise AssertionError(f'{what} does not start: {logs}')
            time.sleep(0.2)

    def run(self, *command: str, check: bool = True, **options) -> str:
        """Returns what a command prints."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, **options)
        assert done.returncode == 0 or not check, f'{command}: {done.stderr}'
        return done.stdout

    def submit(self, *arguments: str) -> str:
        """Submits a job with sbatch; returns its number."""
        return self.run('sbatch', '--parsable', *arguments, cwd=ROOT).strip()

    def job(self, number: str) -> dict[str, str]:
        """Returns Slurm's fields of a job: JobState, Restarts, ExitCode and more."""
        fields = self.run('scontrol', 'show', 'job', number, '--oneliner').split()
        return dict(field.partition('=')[::2] for field in fields)

    def wait(self, number: str, seconds: float = 240) -> dict[str, str]:
        """Returns the job's fields once it has ended. A requeued job starts after a second, not Slurm's two minutes.

        It cannot start at once: slurmd refuses a start in the second in which it ended the job (credential revoked).
        """
        deadline, hurried = time.monotonic() + seconds, '0'
        while (job := self.job(number))['JobState'] not in ('COMPLETED', 'FAILED', 'CANCELLED', 'NODE_FAIL'):
            assert time.monotonic() < deadline, job
            if job['JobState'] == 'PENDING' and job['Restarts'] != hurried:
                self.run('scontrol', 'update', f'JobId={number}', 'StartTime=now+1')
                hurried = job['Restarts']
            time.sleep(0.3)
        return job
