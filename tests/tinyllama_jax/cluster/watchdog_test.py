"""Which processes the hub takes for lost, stuck or hanging; members_test.py runs real processes."""

import dataclasses
import json
import socket

import pytest

from tests.support import processes
from tinyllama_jax.cluster import place, watchdog
from tinyllama_jax.config import TrainConfig

CONFIG = TrainConfig(stuck_timeout_s=45, hang_timeout_s=600)


def _members(*marks, marked=0.001, doing='waiting for a step', compiles=False):
    """Returns members with these marks, last changed at the time `marked`."""
    members = {i: watchdog.Member(f'host-{i}', 0.0) for i in range(len(marks))}
    for member, count in zip(members.values(), marks, strict=True):
        member.mark(count, doing, compiles, marked)
    return members


def _heard(members, now):
    for member in members.values():
        member.heard = now
    return members


def test_a_process_that_is_silent_for_too_long_is_named_with_its_host():
    members = _heard(_members(50, 50, 50), 100.0)
    assert watchdog.silent(members, 100 + watchdog.LOST_SECONDS) is None
    members[0].heard = members[2].heard = 120.0
    assert watchdog.silent(members, 121.0) == (
        'process 1 on host-1 is lost: not heard of for 20 s (stopped, or the host or its network is down)'
    )
    members[1].left = True
    assert watchdog.silent(members, 121.0) is None


def test_of_many_lost_processes_the_first_few_are_named():
    line = watchdog.silent(_members(*range(20)), 100.0)
    assert line.startswith('processes 0 on host-0, 1 on host-1, 2 on host-2, 3 on host-3, 4 on host-4, 5 on host-5, ')
    assert '7 on host-7 and 12 more are lost' in line


def test_a_process_that_keeps_the_others_waiting_is_stuck():
    members = _members(50, 47, 50)
    members[1].doing = 'a hook'
    assert watchdog.stalled(members, CONFIG, 45.0) is None
    assert watchdog.stalled(members, CONFIG, 46.0) == (
        'process 1 on host-1 is stuck in a hook: the others have waited for 46 s'
    )
    members[2].mark(51, 'the step', False, 40.0)
    assert watchdog.stalled(members, CONFIG, 46.0) is None, 'one of the others advances'


def test_if_none_is_behind_all_hang_and_are_given_the_timeout_for_a_hang():
    members = _members(50, 50, doing='validation')
    assert watchdog.stalled(members, CONFIG, 600.0) is None
    assert watchdog.stalled(members, CONFIG, 601.0) == (
        'processes 0 on host-0, 1 on host-1 are hanging in validation: no step for 601 s'
    )
    assert watchdog.stalled(members, dataclasses.replace(CONFIG, hang_timeout_s=0), 9_999.0) is None


@pytest.mark.parametrize(
    ('marks', 'compiles', 'limit'),
    [((3, 1), True, 1_800), ((1, 1), True, 1_800), ((50, 49), True, 1_800), ((3, 1), False, 45), ((1, 1), False, 600)],
)
def test_a_process_that_compiles_is_given_more_time(marks, compiles, limit):
    members = _members(*marks, compiles=compiles)
    assert watchdog.stalled(members, CONFIG, limit) is None
    assert watchdog.stalled(members, CONFIG, limit + 1) is not None


def test_a_stuck_process_is_not_given_the_time_of_others_that_compile():
    members = _members(7, 5, 7, compiles=True)
    members[1].mark(5, 'a hook', False, 0.001)
    assert watchdog.stalled(members, CONFIG, 46.0) == (
        'process 1 on host-1 is stuck in a hook: the others have waited for 46 s'
    )


def test_a_new_process_is_given_time_to_compile():
    assert watchdog.Member('host-0', 0.0).compiles


def test_a_process_that_repeats_its_marks_does_not_advance():
    members = _members(50)
    members[0].mark(50, 'validation', False, 500.0)
    assert 'no step for 601 s' in watchdog.stalled(members, CONFIG, 601.0)


def test_the_hub_answers_a_hello_before_its_next_beat(monkeypatch):
    """A process that came late would soon give up, and its closed connection would end the run."""
    monkeypatch.setattr(watchdog, 'BEAT_SECONDS', 600.0)
    address = f'127.0.0.1:{processes.free_port()}'
    hub = watchdog.Hub(place.Place('host-0', address, 2), CONFIG)
    with socket.create_connection(place.Place('host-1', address, 2, 1).address, timeout=5) as connection:
        hello = {'hello': 1, 'host': 'host-1', 'processes': 2}
        connection.sendall(json.dumps(hello).encode() + b'\n')
        assert watchdog.parsed(connection.recv(1 << 16)) == {'beat': True}
        connection.sendall(b'{"bye": 0, "line": ""}\n')
        hub.wait(5)


@pytest.mark.parametrize('line', [b'GET / HTTP/1.1', b'[1]', b'\xff', b''])
def test_a_line_that_is_not_a_json_object_is_not_a_message(line):
    assert watchdog.parsed(line) is None
