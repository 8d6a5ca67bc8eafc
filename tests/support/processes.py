"""Starts several processes of one run as a user would."""

import os
import pathlib
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from tests.conftest import DEVICES, OPTIMIZATION, ROOT
from tinyllama_jax.run import records


class Processes:
    """Processes that train together, on hosts named host-0, host-1, ...; FOLDER.ID.txt holds the stderr of each.

    Process i gets `arguments` and `each[i]`, the environment variables `environments[i]` and the current directory
    `folders[i]`. `main` is the program.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        arguments: Sequence[str],
        count: int = 2,
        *,
        devices: int = 8,
        each: Sequence[Sequence[str]] = (),
        environments: Sequence[dict[str, str]] = (),
        folders: Sequence[pathlib.Path] = (),
        main: Sequence[str] = (f'{ROOT}/main.py',),
        command: str = 'train',
        **common: str,
    ):
        self.address = f'127.0.0.1:{free_port()}'
        self.said, self.running = [], []
        for i in range(count):
            joining = [f'--coordinator={self.address}', f'--num_processes={count}', f'--process_id={i}']
            own = each[i] if each else ()
            line = [sys.executable, *main, command, f'--workdir={folder}', *joining, *arguments, *own]
            flags = f'{DEVICES}={devices // count} {OPTIMIZATION}'
            added = {'NODE_NAME': f'host-{i}', 'XLA_FLAGS': flags, 'TF_CPP_MIN_LOG_LEVEL': '3'}
            self.said.append(folder.with_name(f'{folder.name}.{i}.txt'))
            environment = {**os.environ, **added, **common, **(environments[i] if environments else {})}
            cwd = folders[i] if folders else ROOT
            with open(self.said[-1], 'w') as stderr:
                self.running.append(subprocess.Popen(line, cwd=cwd, env=environment, stderr=stderr))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.running:
            process.kill()
            process.wait()

    def wait(self, *, timeout: float = 240, without=()) -> list[int]:
        """Returns the exit statuses of all processes but `without`."""
        deadline = time.monotonic() + timeout
        running = [process for i, process in enumerate(self.running) if i not in without]
        return [process.wait(max(deadline - time.monotonic(), 0.1)) for process in running]

    def lines(self, i: int) -> str:
        """Returns the stderr of process `i` so far."""
        return self.said[i].read_text()

    def wait_for_step(self, folder: pathlib.Path, step: int) -> None:
        """Returns when this step is logged."""
        deadline = time.monotonic() + 240
        while all(process.poll() is None for process in self.running) and time.monotonic() < deadline:
            entries = records.read_entries(folder / 'metrics.jsonl')
            if entries and entries[-1]['step'] >= step:
                return
            time.sleep(0.02)
        raise AssertionError('\n'.join(map(self.lines, range(len(self.running)))))


def free_port() -> int:
    """Returns an unused TCP port."""
    with socket.create_server(('127.0.0.1', 0)) as listener:
        return listener.getsockname()[1]
