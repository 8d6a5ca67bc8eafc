"""The hub of a run's processes, which notices when one is lost, when one is stuck, and when all hang.

The hub is a thread of process 0. Every process, 0 included, is a client of it (members.py). They exchange JSON objects
over TCP, one a line. A client sends:

    {"hello": id, "host": name, "processes": count}    first
    {"gather": name, "value": ...}                     to get every process's value
    {"beat": marks, "doing": text, "compiles": bool}   each second; `marks` counts what its main thread has begun
    {"bye": status, "line": text}                      when it ends, with its exit status

The hub sends:

    {"roster": [host of each process], "port": JAX's}  when all processes have connected
    {"gathered": name, "values": [...], "of": [...]}   distinct values; `of` has the index of each process's value
    {"beat": true}                                     in answer to a hello, and each second
    {"end": status, "line": text, "stacks": bool}      to end the client, which first prints its stacks if told to

The processes run the same program, so their marks can be compared. A process is stuck if it keeps the others waiting:
it has fewer marks than they do. A run hangs if all have the same number and it stays the same.
"""

import contextlib
import dataclasses
import json
import selectors
import socket
import threading
import time
from collections.abc import Mapping

from tinyllama_jax import errors
from tinyllama_jax.cluster.place import Place
from tinyllama_jax.config import TrainConfig

BEAT_SECONDS = 1.0
LOST_SECONDS = 20.0  # a process silent for this long is stopped, or its host is gone
_COMPILING_SECONDS = 1_800.0
_NAMED = 8  # the most processes that a message names
_SAVED = (0, 130, 143)  # exit statuses of a process that ended well, so that the others need not end


@dataclasses.dataclass
class Member:
    """What the hub knows about a process. Times are by the hub's monotonic clock."""

    host: str
    heard: float  # when it last sent something
    marks: int = 0
    marked: float = 0.0  # when the marks last changed
    doing: str = 'starting'
    compiles: bool = True  # what it is doing includes compilation
    left: bool = False

    def mark(self, marks: int, doing: str, compiles: bool, now: float) -> None:
        """Stores a heartbeat."""
        if marks != self.marks or not self.marked:
            self.marks, self.marked = marks, now
        self.doing, self.compiles, self.heard = doing, compiles, now


def silent(members: Mapping[int, Member], now: float) -> str | None:
    """Returns a line that names the processes not heard of for LOST_SECONDS; None if there are none."""
    lost = {i: m for i, m in members.items() if not m.left and now - m.heard > LOST_SECONDS}
    if not lost:
        return None
    return f'{_named(lost)} lost: not heard of for {LOST_SECONDS:.0f} s (stopped, or the host or its network is down)'


def stalled(members: Mapping[int, Member], config: TrainConfig, now: float) -> str | None:
    """Returns a line that names the stuck processes, or all if the run hangs; None if there is neither."""
    active = {i: m for i, m in members.items() if not m.left and m.marked}
    if not active or not config.hang_timeout_s:
        return None
    idle = now - max(m.marked for m in active.values())  # seconds in which no process has advanced
    fewest = min(m.marks for m in active.values())
    behind = {i: m for i, m in active.items() if m.marks == fewest}
    hangs = len(behind) == len(active)
    limit = config.hang_timeout_s if hangs else config.stuck_timeout_s
    if any(m.compiles for m in behind.values()):
        limit = max(_COMPILING_SECONDS, config.hang_timeout_s)
    if idle <= limit:
        return None
    doing = ', '.join(sorted({m.doing for m in behind.values()}))
    if hangs:
        return f'{_named(behind)} hanging in {doing}: no step for {idle:.0f} s'
    return f'{_named(behind)} stuck in {doing}: the others have waited for {idle:.0f} s'


def _named(members: Mapping[int, Member]) -> str:
    """Returns 'process 3 on host-b is' or 'processes 3 on host-b, 4 on host-b are'; names the first few of many."""
    names = [f'{i} on {member.host}' for i, member in sorted(members.items())]
    listed = ', '.join(names[:_NAMED]) + (f' and {len(names) - _NAMED} more' if len(names) > _NAMED else '')
    return f'process {listed} is' if len(names) == 1 else f'processes {listed} are'


class Hub:
    """A thread of process 0 that serves all processes until they have left."""

    def __init__(self, place: Place, config: TrainConfig):
        self._place, self._config = place, config
        self._members: dict[int, Member] = {}
        self._connections: dict[socket.socket, _Connection] = {}
        self._gathers: dict[str, dict[int, str]] = {}  # name -> {process id: its value as JSON}
        self._ended: dict | None = None  # the message that ended the run
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        self._listener = socket.create_server(('', place.address[1]), family=family, dualstack_ipv6=dual, backlog=1024)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name='hub', daemon=True)
        self._thread.start()

    def wait(self, seconds: float) -> None:
        """Returns when all processes have left, or after `seconds`."""
        self._thread.join(seconds)

    def _run(self) -> None:
        started = last = beat = time.monotonic()
        while not (self._members and all(m.left for m in self._members.values())):
            for key, _ in self._selector.select(timeout=BEAT_SECONDS / 2):
                if key.data is None:  # the listener: a client connects
                    client, _ = self._listener.accept()
                    client.settimeout(LOST_SECONDS)
                    self._connections[client] = _Connection(client)
                    self._selector.register(client, selectors.EVENT_READ, data=client)
                else:
                    self._read(key.data)
            now = time.monotonic()
            if now - last > LOST_SECONDS / 2:  # this process itself was stopped
                for member in self._members.values():
                    member.heard = now
            last = now
            if now - beat >= BEAT_SECONDS:
                beat = now
                self._send({'beat': True})
                self._judge(now, started)
        for open_one in (self._listener, self._selector, *self._connections):
            open_one.close()

    def _judge(self, now: float, started: float) -> None:
        """Ends the run if a process is lost, stuck or missing, or if all hang."""
        if self._ended:
            return
        if line := silent(self._members, now) or stalled(self._members, self._config, now):
            self._end(errors.Unavailable.exit_code, line, stacks=True)
        elif not self._complete() and now - started > self._config.join_timeout_s:
            missing = [str(i) for i in range(self._place.num_processes) if i not in self._members]
            there = ', '.join(f'{i} on {m.host}' for i, m in sorted(self._members.items())[:_NAMED])
            self._end(
                errors.Unavailable.exit_code,
                f'only {len(self._members)} of {self._place.num_processes} processes came to '
                f'{self._place.coordinator} within {self._config.join_timeout_s:g} s; missing: '
                f'{", ".join(missing[:_NAMED])}{" ..." if len(missing) > _NAMED else ""} (there: {there}).',
            )

    def _complete(self) -> bool:
        return len(self._members) == self._place.num_processes

    def _read(self, client: socket.socket) -> None:
        connection = self._connections[client]
        messages = connection.receive()
        if messages is None:
            self._selector.unregister(client)
            del self._connections[client]
            client.close()
            if connection.id is not None and not self._members[connection.id].left and not self._ended:
                lost = {connection.id: self._members[connection.id]}
                self._end(
                    errors.Unavailable.exit_code,
                    f'{_named(lost)} lost: its connection closed without a word (killed, or its host went down)',
                )
            return
        for message in messages:
            self._handle(connection, message)

    def _handle(self, connection: '_Connection', message: dict) -> None:
        now = time.monotonic()
        if 'hello' in message:
            self._welcome(connection, message, now)
            return
        if connection.id is None:  # a refused process, or another program
            return
        member = self._members[connection.id]
        member.heard = now
        if 'beat' in message:
            member.mark(message['beat'], message['doing'], message['compiles'], now)
        elif 'gather' in message:
            self._gather(connection.id, message['gather'], json.dumps(message['value']))
        elif 'bye' in message:
            member.left = True
            if message['bye'] not in _SAVED and not self._ended:
                self._end(message['bye'], f'process {connection.id} on {member.host} failed: {message["line"]}')

    def _welcome(self, connection: '_Connection', message: dict, now: float) -> None:
        host, count, number = message['host'], message['processes'], message['hello']
        usage = errors.UsageError.exit_code
        if self._ended:
            connection.send(self._ended)
        elif number in self._members:
            line = (
                f'two processes have the id {number}: one on {self._members[number].host}, one on {host}; give each an '
                f'id of its own, and each run a coordinator of its own (this one is {self._place.coordinator}).'
            )
            if self._complete():  # a run in progress: only the newcomer must end
                connection.send({'end': usage, 'line': line, 'stacks': False})
            else:
                self._end(usage, line, connection)
        elif count != self._place.num_processes:
            self._end(
                usage,
                f'process {number} on {host} was told of {count} processes, {self._place} of '
                f'{self._place.num_processes}; give all the same --num_processes.',
                connection,
            )
        else:
            connection.id, self._members[number] = number, Member(host, now)
            connection.send({'beat': True})  # at once: a process that came late gives up soon without an answer
            if self._complete():
                hosts = [self._members[i].host for i in range(count)]
                with socket.create_server(('', 0)) as free:
                    jax_port = free.getsockname()[1]
                self._send({'roster': hosts, 'port': jax_port})

    def _gather(self, number: int, name: str, value: str) -> None:
        values = self._gathers.setdefault(name, {})
        values[number] = value
        if len(values) == self._place.num_processes:
            unique = list(dict.fromkeys(values.values()))
            of = [unique.index(values[i]) for i in range(len(values))]
            self._send({'gathered': name, 'values': [json.loads(value) for value in unique], 'of': of})
            del self._gathers[name]

    def _end(self, status: int, line: str, newcomer: '_Connection | None' = None, *, stacks: bool = False) -> None:
        message = {'end': status, 'line': line, 'stacks': stacks}
        if newcomer:
            newcomer.send(message)
        self._send(message)
        self._ended = message

    def _send(self, message: dict) -> None:
        for connection in self._connections.values():
            if connection.id is not None:
                connection.send(message)


class _Connection:
    """A client's socket, which assembles lines from what arrives."""

    def __init__(self, connection: socket.socket):
        self.id: int | None = None
        self._socket, self._rest = connection, b''

    def receive(self) -> list[dict] | None:
        """Returns the messages that have arrived, invalid lines left out; None if the connection is closed."""
        try:
            data = self._socket.recv(1 << 16)
        except OSError:
            data = b''
        if not data:
            return None
        *lines, self._rest = (self._rest + data).split(b'\n')
        return [message for line in lines if (message := parsed(line)) is not None]

    def send(self, message: dict) -> None:
        with contextlib.suppress(OSError):  # if the client is gone, the next read says so
            self._socket.sendall(json.dumps(message).encode() + b'\n')


def parsed(line: bytes) -> dict | None:
    """Returns the message in a line; None if the line is not a JSON object."""
    try:
        message = json.loads(line)
    except ValueError:
        return None
    return message if isinstance(message, dict) else None
