"""The hub that a run's processes stay connected to: who is there, who is lost, who keeps the others waiting.

It is a thread of process 0, and every process (0 too) is a client of it (cluster.py). They exchange JSON objects, one
a line, over TCP. From a client:

    {"hello": id, "host": name, "processes": count}    first of all
    {"gather": name, "value": ...}                     wants every process's value
    {"beat": marks, "doing": text, "compiles": bool}   each second; `marks` counts what its main thread has begun
    {"bye": status, "line": text}                      it ends, with this exit status

From the hub: {"roster": [host of each process], "port": JAX's}, {"gathered": name, "values": [...], "of": [the index of
each process's value]}, {"beat": true} in answer to a hello and each second, and {"end": status, "line": text, "stacks":
whether to print them}.
The processes run the same program, so their marks can be compared: the one with the fewest keeps the others waiting.
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
LOST_SECONDS = 20.0  # silent for so long: stopped, or its host is gone
_COMPILING_SECONDS = 1_800.0
_NAMED = 8  # processes in a sentence
_SAVED = (0, 130, 143)  # exit statuses that nobody else has to hear of


@dataclasses.dataclass
class Member:
    """What the hub knows of a process; times are the hub's monotonic clock's."""

    host: str
    heard: float
    marks: int = 0
    marked: float = 0.0  # when the marks last changed
    doing: str = 'starting'
    compiles: bool = True  # what it is doing may take its time
    left: bool = False

    def mark(self, marks: int, doing: str, compiles: bool, now: float) -> None:
        """Takes over what a heartbeat says."""
        if marks != self.marks or not self.marked:
            self.marks, self.marked = marks, now
        self.doing, self.compiles, self.heard = doing, compiles, now


def silent(members: Mapping[int, Member], now: float) -> str | None:
    """The line about the processes that have not been heard of; None if all have."""
    lost = {i: m for i, m in members.items() if not m.left and now - m.heard > LOST_SECONDS}
    if not lost:
        return None
    return f'{_named(lost)} lost: not heard of for {LOST_SECONDS:.0f} s (stopped, or the host or its network is down)'


def stuck(members: Mapping[int, Member], config: TrainConfig, now: float) -> str | None:
    """The line about the processes that keep the others waiting, or about all if none goes on; None if all is well."""
    active = {i: m for i, m in members.items() if not m.left and m.marked}
    if not active or not config.hang_timeout_s:
        return None
    idle = now - max(m.marked for m in active.values())
    fewest = min(m.marks for m in active.values())
    behind = {i: m for i, m in active.items() if m.marks == fewest}
    limit = config.stuck_timeout_s if len(behind) < len(active) else config.hang_timeout_s
    if any(m.compiles for m in behind.values()):
        limit = max(_COMPILING_SECONDS, config.hang_timeout_s)
    if idle <= limit:
        return None
    doing = ', '.join(sorted({m.doing for m in behind.values()}))
    if len(behind) < len(active):
        return f'{_named(behind)} stuck in {doing}: the others have waited for {idle:.0f} s'
    return f'{_named(behind)} stuck in {doing}: no step for {idle:.0f} s'


def _named(members: Mapping[int, Member]) -> str:
    """`process 3 on host-b is`, `processes 3 on host-b, 4 on host-b are`, of many the first few."""
    names = [f'{i} on {member.host}' for i, member in sorted(members.items())]
    listed = ', '.join(names[:_NAMED]) + (f' and {len(names) - _NAMED} more' if len(names) > _NAMED else '')
    return f'process {listed} is' if len(names) == 1 else f'processes {listed} are'


class Hub:
    """The thread of process 0 that the others are connected to, until all have left or one is lost."""

    def __init__(self, place: Place, config: TrainConfig):
        self._place, self._config, self._members = place, config, {}
        self._connections: dict[socket.socket, _Connection] = {}
        self._gathers: dict[str, dict[int, str]] = {}
        self._ended: dict | None = None  # what all were told at the end
        self._listener = _listen(place.address[1])
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name='hub', daemon=True)
        self._thread.start()

    def wait(self, seconds: float) -> None:
        """Returns when all have left, or after `seconds`."""
        self._thread.join(seconds)

    def _run(self) -> None:
        started = last = beat = time.monotonic()
        while not (self._members and all(m.left for m in self._members.values())):
            for key, _ in self._selector.select(timeout=BEAT_SECONDS / 2):
                self._accept() if key.fileobj is self._listener else self._read(key.fileobj)
            now = time.monotonic()
            if now - last > LOST_SECONDS / 2:  # it was this process that was away
                for member in self._members.values():
                    member.heard = now
            last = now
            if now - beat >= BEAT_SECONDS:
                beat = now
                self._send({'beat': True})
                self._judge(now, started)
        for each in (self._listener, self._selector, *self._connections):
            each.close()

    def _judge(self, now: float, started: float) -> None:
        if self._ended:
            return
        if line := silent(self._members, now) or stuck(self._members, self._config, now):
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

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        connection.settimeout(LOST_SECONDS)
        self._connections[connection] = _Connection(connection)
        self._selector.register(connection, selectors.EVENT_READ)

    def _read(self, key: socket.socket) -> None:
        connection = self._connections[key]
        messages = connection.receive()
        if messages is None:
            self._selector.unregister(key)
            del self._connections[key]
            key.close()
            if connection.id is not None and not self._members[connection.id].left and not self._ended:
                member = {connection.id: self._members[connection.id]}
                self._end(
                    errors.Unavailable.exit_code,
                    f'{_named(member)} lost: its connection closed without a word (killed, or its host went down)',
                )
            return
        for message in messages:
            self._handle(connection, message)

    def _handle(self, connection: '_Connection', message: dict) -> None:
        now = time.monotonic()
        if 'hello' in message:
            self._welcome(connection, message, now)
            return
        member = self._members.get(connection.id)
        if member is None:  # it was refused, or is not one of ours
            return
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
            if self._complete():  # that run goes on
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
            connection.send({'beat': True})  # at once: it waits for this, with little time left if it came late
            if self._complete():
                hosts = [self._members[i].host for i in range(count)]
                self._send({'roster': hosts, 'port': _free_port()})

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
    """One client's socket, its lines put together."""

    def __init__(self, connection: socket.socket):
        self.id: int | None = None
        self._socket, self._rest = connection, b''

    def receive(self) -> list[dict] | None:
        """The messages that have come; None if the connection is closed. What is not of the protocol is left out."""
        try:
            data = self._socket.recv(1 << 16)
        except OSError:
            data = b''
        if not data:
            return None
        *lines, self._rest = (self._rest + data).split(b'\n')
        return [message for line in lines if (message := parsed(line)) is not None]

    def send(self, message: dict) -> None:
        with contextlib.suppress(OSError):  # it is gone, which the next read tells
            self._socket.sendall(json.dumps(message).encode() + b'\n')


def parsed(line: bytes) -> dict | None:
    """The message of a line; None for what is not of the protocol."""
    try:
        message = json.loads(line)
    except ValueError:
        return None
    return message if isinstance(message, dict) else None


def _listen(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(('', port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server(('', port), backlog=1024)


def _free_port() -> int:
    with socket.create_server(('', 0)) as listener:
        return listener.getsockname()[1]
