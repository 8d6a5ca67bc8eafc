"""The processes of a run: joining them, what they must agree on, and ending together when one is lost.

Process 0 opens a hub at the coordinator's address (watchdog.py), every process connects to it, and only when all are
there does JAX join them in its own way, at a port that the hub names. JAX tells of a lost process by aborting, with a
number and without its host, and of a stuck one never; the hub tells at once, or within a minute.
"""

import atexit
import collections
import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from tinyllama_jax import config as config_lib
from tinyllama_jax import errors
from tinyllama_jax.cluster import driver, watchdog
from tinyllama_jax.cluster.place import Place
from tinyllama_jax.config import Config, TrainConfig
from tinyllama_jax.process import versions
from tinyllama_jax.settings import tree

_RETRY_SECONDS = 0.5
_VERDICT_SECONDS = 5.0  # a collective breaks before the hub has said who broke it
_LAST_WORD_SECONDS = 2.0  # in which process 0, where the hub is, lets the others hear of the end
_SHUTDOWN_SECONDS = 60


class Members:
    """All processes of the run, as this one sees them; this class: there is only this one."""

    def __init__(self, place: Place, config: TrainConfig):
        self.place, self.hosts, self._config = place, [place.host], config
        self._begun = collections.Counter()  # how often the main thread has begun what
        self._mark = 0, 'starting', True  # one object, so that no thread sees half a change

    def __str__(self) -> str:
        hosts = list(dict.fromkeys(self.hosts))
        return f'{_counted(len(hosts), "host")} ({_some(hosts)}), {_counted(self.count, "process", "es")}'

    @property
    def count(self) -> int:
        """How many there are."""
        return self.place.num_processes

    @property
    def primary(self) -> bool:
        """Whether this is process 0, which alone writes the workdir and talks of the run."""
        return self.place.process_id == 0

    def at(self, doing: str, *, compiles: int = 0) -> None:
        """Notes what the main thread begins to do. All processes must note the same things in the same order.

        Its first `compiles` times compile, and may take half an hour.
        """
        self._begun[doing] += 1
        self._mark = self._begun.total(), doing, self._begun[doing] <= compiles

    def gather(self, name: str, value: Any) -> list[Any]:
        """The JSON `value` of each process, by process id; returns when all have called it with this name."""
        del name
        return [value]

    def agree(self, **facts: Any) -> None:
        """Raises UsageError that names the first of these facts (JSON) in which the processes differ, and the hosts."""
        values = self.gather(', '.join(facts), facts)
        found = [tree.differences(values[0], other) for other in values]
        for field, (first, _) in {field: pair for fields in found for field, pair in fields.items()}.items():
            told: dict[str, list[str]] = {}
            for number, fields in enumerate(found):
                its = fields[field][1] if field in fields else first
                told.setdefault(str(its), []).append(f'{number} on {self.hosts[number]}')
            listed = ', '.join(f'{its} in process {_some(processes)}' for its, processes in told.items())
            raise errors.UsageError(f'the hosts disagree on {field}: {listed}. Start all with the same.')

    def watch(self) -> None:
        """Begins to watch for a main thread that does not go on."""
        threading.Thread(target=self._watch_alone, name='watchdog', daemon=True).start()

    def _watch_alone(self) -> None:
        itself = {0: watchdog.Member(self.place.host, time.monotonic())}
        while True:
            itself[0].mark(*self._mark, now := time.monotonic())
            if line := watchdog.stuck(itself, self._config, now):
                self._exit(errors.Unavailable.exit_code, line, stacks=True)
            time.sleep(watchdog.BEAT_SECONDS)

    def _exit(self, status: int, line: str, *, stacks: bool) -> None:
        """Ends the process at once, from any thread."""
        if stacks:
            os.write(2, f'{self.place}, every thread (the watchdog has ended it):\n'.encode())
            faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
        again = (
            ' The same command goes on from the newest checkpoint.' if status == errors.Unavailable.exit_code else ''
        )
        os.write(2, f'main.py: {line.rstrip(".")}.{again}\n'.encode())
        os._exit(status)

    def finish(self) -> None:
        """Ends this process's part of a run that ends well."""

    def fail(self, error: BaseException) -> None:
        """Ends this process's part of a run after a failure, which ends the others too."""


class _Joined(Members):
    """One of several processes: a client of the hub."""

    def __init__(self, place: Place, config: TrainConfig):
        super().__init__(place, config)
        self._gathered: dict[str, list] = {}
        self._port, self._left, self._heard = 0, False, time.monotonic()
        self._news, self._sending = threading.Condition(), threading.Lock()
        self._hub = self._open_hub() if self.primary else None
        self._socket = self._connect()
        threading.Thread(target=self._listen, name='watchdog', daemon=True).start()
        self._wait(lambda: self._port, config.join_timeout_s + watchdog.LOST_SECONDS)

    def watch(self) -> None:
        """Nothing more: the hub has watched since this process has joined."""

    def _open_hub(self) -> watchdog.Hub | None:
        try:
            return watchdog.Hub(self.place, self._config)
        except OSError:  # the port is in use: by a second process 0, as its hub will say, or by another program
            return None

    def _connect(self) -> socket.socket:
        """A connection on which the hub has answered."""
        deadline = time.monotonic() + self._config.join_timeout_s
        while True:
            try:
                left = max(deadline - time.monotonic(), _RETRY_SECONDS)
                return self._greet(min(left, watchdog.LOST_SECONDS))
            except OSError as error:
                if time.monotonic() > deadline:
                    raise errors.Unavailable(
                        f'{self.place}: the coordinator {self.place.coordinator} could not be reached within '
                        f'{self._config.join_timeout_s:g} s ({error}); process 0 must run on that host, and that port '
                        'be open and free of other programs.'
                    ) from None
                time.sleep(_RETRY_SECONDS)

    def _greet(self, seconds: float) -> socket.socket:
        """Raises OSError where no hub answers in time: not each program that accepts a connection is one."""
        connection = socket.create_connection(self.place.address, timeout=seconds)
        hello = {'hello': self.place.process_id, 'host': self.place.host, 'processes': self.place.num_processes}
        begins = b''
        with contextlib.suppress(OSError):
            connection.sendall(json.dumps(hello).encode() + b'\n')
            begins = connection.recv(1, socket.MSG_PEEK)
        if begins != b'{':
            connection.close()
            raise ConnectionError('what listens there does not answer as process 0 does')
        return connection

    def _wait(self, ready, seconds: float) -> None:
        with self._news:
            if not self._news.wait_for(ready, seconds):
                raise errors.Unavailable(
                    f'{self.place}: {self.place.coordinator} does not answer as the coordinator of this run within '
                    f'{seconds:g} s; another program has that port, or another run: choose another.'
                )

    def _send(self, message: dict) -> None:
        with self._sending, contextlib.suppress(OSError):  # the listening thread finds out what it means
            self._socket.sendall(json.dumps(message).encode() + b'\n')

    def _listen(self) -> None:
        """The watchdog's thread: sends a sign of life each second, and ends the process when the hub says so."""
        self._socket.settimeout(watchdog.BEAT_SECONDS / 2)
        rest, beat = b'', 0.0
        while not self._left:
            before = time.monotonic()
            with contextlib.suppress(TimeoutError):
                try:
                    data = self._socket.recv(1 << 16)
                except ConnectionError:
                    data = b''
                if not data:
                    self._lose_hub('its connection closed without a word (killed, or its host went down)')
                    return
                self._heard = time.monotonic()
                *lines, rest = (rest + data).split(b'\n')
                for message in map(watchdog.parsed, lines):
                    self._handle(message or {})
            now = time.monotonic()
            if now - before > watchdog.LOST_SECONDS / 2:  # it was this process that was away
                self._heard = now
            if now - self._heard > watchdog.LOST_SECONDS:
                self._lose_hub(
                    f'not heard of for {watchdog.LOST_SECONDS:.0f} s (stopped, or the host or its network is down)'
                )
            if now - beat >= watchdog.BEAT_SECONDS:
                beat = now
                self._send(dict(zip(('beat', 'doing', 'compiles'), self._mark, strict=True)))

    def _lose_hub(self, how: str) -> None:
        if not self._left:
            host = self.hosts[0] if self._port else self.place.address[0]
            line = f'process 0 on {host} (the coordinator, {self.place.coordinator}) is lost: {how}'
            self._exit(errors.Unavailable.exit_code, line, stacks=False)

    def _handle(self, message: dict) -> None:
        if 'end' in message:
            if not self._left:
                self._exit(message['end'], message['line'], stacks=message['stacks'])
        elif 'beat' not in message:
            with self._news:
                if 'roster' in message:
                    self.hosts, self._port = message['roster'], message['port']
                elif 'gathered' in message:
                    self._gathered[message['gathered']] = [message['values'][i] for i in message['of']]
                self._news.notify_all()

    def _exit(self, status: int, line: str, *, stacks: bool) -> None:
        if self.primary:
            time.sleep(_LAST_WORD_SECONDS)
        super()._exit(status, line, stacks=stacks)

    def gather(self, name: str, value: Any) -> list[Any]:
        """The JSON `value` of each process, by process id; returns when all have called it with this name."""
        self._send({'gather': name, 'value': value})
        with self._news:
            self._news.wait_for(lambda: name in self._gathered)
            return self._gathered.pop(name)

    def join_jax(self) -> None:
        """Makes the devices of all processes JAX's. Raises UsageError where the hosts have different ones."""
        import jax

        host = self.place.coordinator.rpartition(':')[0]
        jax.distributed.initialize(
            f'{host}:{self._port}',
            self.count,
            self.place.process_id,
            self.place.local_devices,
            cluster_detection_method='deactivate',
            initialization_timeout=int(self._config.join_timeout_s) + 1,
            shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
        )
        self.agree(devices=f'{jax.local_device_count()} x {jax.local_devices()[0].device_kind}')

    def finish(self) -> None:
        """Leaves once all processes have come so far."""
        import jax

        self.gather('finish', None)
        jax.distributed.shutdown()
        self._bye(0, '')
        if self._hub:
            self._hub.wait(_SHUTDOWN_SECONDS)

    def fail(self, error: BaseException) -> None:
        """Tells the hub, unless the failure is another process's end, of which the hub tells."""
        if not isinstance(error, errors.UsageError):
            time.sleep(_VERDICT_SECONDS)
        status = getattr(error, 'exit_code', 1)
        self._bye(status, errors.first_line(error))
        if self._hub:
            time.sleep(_LAST_WORD_SECONDS)
        # JAX's own farewell, which comes after this, waits for processes that have gone.
        atexit.register(_leave, status)

    def _bye(self, status: int, line: str) -> None:
        self._left = True
        self._send({'bye': status, 'line': line})


def _leave(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _counted(count: int, noun: str, ending: str = 's') -> str:
    return f'{count} {noun}{ending if count > 1 else ""}'


def _some(processes: list[str]) -> str:
    more = f' and {len(processes) - 4} more' if len(processes) > 4 else ''
    return ', '.join(processes[:4]) + more


def alone(config: TrainConfig) -> Members:
    """The members of a run of one process, which no watchdog watches."""
    return Members(Place(socket.gethostname()), config)


@contextlib.contextmanager
def joined(place: Place, config: Config) -> Iterator[Members]:
    """A context with all processes of the run, JAX among them; to be entered before JAX finds its devices.

    Raises UsageError where they differ in configuration, code, versions or devices and where this host's driver is too
    old, Unavailable where the coordinator cannot be reached. From then on a lost or stuck process ends all others with
    75, and a failure of one all with its status.
    """
    driver.refuse_old(place.host)
    members = _Joined(place, config.train) if place.coordinator else Members(place, config.train)
    try:
        if isinstance(members, _Joined):
            members.agree(config=config_lib.to_dict(config), commit=versions.commit(), versions=versions.installed())
            members.join_jax()
        members.watch()
        yield members
    except errors.Stopped:
        members.finish()
        raise
    except BaseException as error:
        members.fail(error)
        raise
    members.finish()
