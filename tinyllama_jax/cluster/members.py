"""The processes of a run: how they join, compare settings, and end together when one is lost.

Process 0 opens a hub at the coordinator's address (watchdog.py) and every process connects to it. When all have, JAX
joins them in its own way, at a port that the hub names. JAX alone aborts when a process is lost, with its number and
without its host, and never notices a stuck one. The hub names both, and their hosts, within a minute.
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
_VERDICT_SECONDS = 5.0  # a collective fails before the hub has said whose fault it is
_LAST_WORD_SECONDS = 2.0  # process 0 waits this long before it ends, so that its hub can tell the others
_SHUTDOWN_SECONDS = 60


class Members:
    """The processes of a run. This base class is the single-process case.

    Attributes:
      place: this process's id, host and coordinator.
      hosts: the host name of each process, by process id.
    """

    def __init__(self, place: Place, config: TrainConfig):
        self.place, self.hosts, self._config = place, [place.host], config
        self._counts = collections.Counter()  # how often the main thread has begun each activity
        self._mark = 0, 'starting', True  # one tuple, so that no thread sees half a change

    def __str__(self) -> str:
        hosts = list(dict.fromkeys(self.hosts))
        return (
            f'{len(hosts)} host{"s" if len(hosts) > 1 else ""} ({_first_few(hosts)}), '
            f'{self.count} process{"es" if self.count > 1 else ""}'
        )

    @property
    def count(self) -> int:
        """The number of processes."""
        return self.place.num_processes

    @property
    def primary(self) -> bool:
        """Whether this is process 0, which alone writes the workdir and prints progress."""
        return self.place.process_id == 0

    def at(self, doing: str, *, compiles: int = 0) -> None:
        """Notes that the main thread begins an activity. All processes must note the same ones in the same order.

        The watchdog allows half an hour for each of the first `compiles` times, which include compilation.
        """
        self._counts[doing] += 1
        self._mark = self._counts.total(), doing, self._counts[doing] <= compiles

    def gather(self, name: str, value: Any) -> list[Any]:
        """Returns every process's `value` (JSON), by process id, once all have called it with this name."""
        del name
        return [value]

    def agree(self, **facts: Any) -> None:
        """Raises UsageError if the processes differ in a fact (JSON). It names the field, and who has which value."""
        values = self.gather(', '.join(facts), facts)
        differences = [tree.differences(values[0], other) for other in values]
        for field, (first, _) in {field: pair for fields in differences for field, pair in fields.items()}.items():
            holders: dict[str, list[str]] = {}  # value -> the processes that have it
            for number, fields in enumerate(differences):
                value = fields[field][1] if field in fields else first
                holders.setdefault(str(value), []).append(f'{number} on {self.hosts[number]}')
            listed = ', '.join(f'{value} in process {_first_few(processes)}' for value, processes in holders.items())
            raise errors.UsageError(f'the hosts disagree on {field}: {listed}. Start all with the same.')

    def watch(self) -> None:
        """Starts a thread that ends the process when the main thread hangs."""

        def run() -> None:
            own = watchdog.Member(self.place.host, time.monotonic())
            while True:
                own.mark(*self._mark, now := time.monotonic())
                if line := watchdog.stalled({0: own}, self._config, now):
                    self._exit(errors.Unavailable.exit_code, line, stacks=True)
                time.sleep(watchdog.BEAT_SECONDS)

        threading.Thread(target=run, name='watchdog', daemon=True).start()

    def _exit(self, status: int, line: str, *, stacks: bool) -> None:
        """Ends the process at once, from any thread."""
        retry = status == errors.Unavailable.exit_code
        remedy = ' The same command resumes from the newest checkpoint.' if retry else ''
        with contextlib.suppress(OSError):  # nobody reads standard error any more
            if stacks:
                os.write(2, f'{self.place}, every thread (the watchdog has ended it):\n'.encode())
                faulthandler.dump_traceback(file=2, all_threads=True)
            os.write(2, f'main.py: {line.rstrip(".")}.{remedy}\n'.encode())
        os._exit(status)

    def finish(self) -> None:
        """Leaves a run that ends well."""

    def fail(self, error: BaseException) -> None:
        """Leaves a run after a failure of this process, which ends the others too."""


class _Joined(Members):
    """One of several processes, as a client of the hub."""

    def __init__(self, place: Place, config: TrainConfig):
        super().__init__(place, config)
        self._gathered: dict[str, list] = {}
        self._port, self._left, self._heard = 0, False, time.monotonic()
        self._news, self._sending = threading.Condition(), threading.Lock()
        self._hub = None
        if self.primary:
            # The port may be taken: by the hub of another process 0, which reports this one, or by another program.
            with contextlib.suppress(OSError):
                self._hub = watchdog.Hub(place, config)
        self._socket = self._connect()
        threading.Thread(target=self._listen, name='watchdog', daemon=True).start()
        seconds = config.join_timeout_s + watchdog.LOST_SECONDS
        with self._news:
            if not self._news.wait_for(lambda: self._port, seconds):
                raise errors.Unavailable(
                    f'{place}: {place.coordinator} does not answer as the coordinator of this run within {seconds:g} '
                    's; another program has that port, or another run: choose another.'
                )

    def watch(self) -> None:
        """Does nothing: the hub has watched since this process joined."""

    def _connect(self) -> socket.socket:
        """Returns a connection on which the hub has answered; any program may listen at that port."""
        deadline = time.monotonic() + self._config.join_timeout_s
        hello = {'hello': self.place.process_id, 'host': self.place.host, 'processes': self.place.num_processes}
        while True:
            left = max(deadline - time.monotonic(), _RETRY_SECONDS)
            try:
                connection = socket.create_connection(self.place.address, timeout=min(left, watchdog.LOST_SECONDS))
                with contextlib.suppress(OSError):
                    connection.sendall(json.dumps(hello).encode() + b'\n')
                    if connection.recv(1, socket.MSG_PEEK) == b'{':
                        return connection
                connection.close()
                raise ConnectionError('what listens there does not answer as process 0 does')
            except OSError as error:
                if time.monotonic() > deadline:
                    raise errors.Unavailable(
                        f'{self.place}: the coordinator {self.place.coordinator} could not be reached within '
                        f'{self._config.join_timeout_s:g} s ({error}); process 0 must run on that host, and that port '
                        'be open and free of other programs.'
                    ) from None
                time.sleep(_RETRY_SECONDS)

    def _send(self, message: dict) -> None:
        with self._sending, contextlib.suppress(OSError):  # the listening thread will find out why
            self._socket.sendall(json.dumps(message).encode() + b'\n')

    def _listen(self) -> None:
        """Runs in the watchdog's thread: sends a heartbeat each second and ends the process when the hub says so."""
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
            if now - before > watchdog.LOST_SECONDS / 2:  # this process itself was stopped
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
        """Returns every process's `value` (JSON), by process id, once all have called it with this name."""
        self._send({'gather': name, 'value': value})
        with self._news:
            self._news.wait_for(lambda: name in self._gathered)
            return self._gathered.pop(name)

    def join_jax(self) -> None:
        """Gives JAX the devices of all processes. Raises UsageError if the hosts have different ones."""
        import jax

        host = (self.place.coordinator or '').rpartition(':')[0]
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
        """Leaves once all processes have got this far."""
        import jax

        self.gather('finish', None)
        jax.distributed.shutdown()
        self._bye(0, '')
        if self._hub:
            self._hub.wait(_SHUTDOWN_SECONDS)

    def fail(self, error: BaseException) -> None:
        """Reports the failure to the hub, unless another process's end caused it, which the hub reports itself."""
        if not isinstance(error, errors.UsageError):
            time.sleep(_VERDICT_SECONDS)  # if another process is lost, the hub ends this one here
        status = getattr(error, 'exit_code', 1)
        self._bye(status, errors.first_line(error))
        if self._hub:
            time.sleep(_LAST_WORD_SECONDS)
        # atexit runs these in reverse. JAX's own handler, which comes after them, waits for processes that have gone.
        atexit.register(os._exit, status)
        atexit.register(sys.stderr.flush)
        atexit.register(sys.stdout.flush)

    def _bye(self, status: int, line: str) -> None:
        self._left = True
        self._send({'bye': status, 'line': line})


def _first_few(names: list[str]) -> str:
    more = f' and {len(names) - 4} more' if len(names) > 4 else ''
    return ', '.join(names[:4]) + more


def alone(config: TrainConfig) -> Members:
    """Returns the members of a single-process run, without a watchdog."""
    return Members(Place(socket.gethostname()), config)


@contextlib.contextmanager
def joined(place: Place, config: Config) -> Iterator[Members]:
    """A context in which this process has joined the others, in JAX too. Enter it before JAX finds its devices.

    Raises UsageError if the processes differ in configuration, code, versions or devices or if this host's driver is
    too old, and Unavailable if the coordinator cannot be reached. Inside the context all end with 75 if one is
    lost or stuck or if all hang, and with the status of a process that fails.
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
        failure = errors.foreseen(error)
        members.fail(failure)
        if failure is error:
            raise
        raise failure from error
    members.finish()
