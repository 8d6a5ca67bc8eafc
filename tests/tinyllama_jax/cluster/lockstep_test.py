"""Stop signals and step times: alone a signal stops at once; of several processes all stop after the same step."""

import signal
import types

import jax
import numpy as np
import pytest

from tests.support import tiny
from tinyllama_jax.cluster import lockstep
from tinyllama_jax.cluster import members as cluster
from tinyllama_jax.process import signals


def _lockstep(*times, received=None):
    stop_signals = types.SimpleNamespace(received=received)
    return lockstep.Lockstep(cluster.alone(tiny.CONFIG.train), stop_signals, clock=iter(times).__next__), stop_signals


def test_alone_a_signal_stops_at_once():
    alone, stop_signals = _lockstep()
    assert alone.stop is None
    stop_signals.received = signal.SIGTERM
    assert alone.stop == signal.SIGTERM


def test_step_times_are_kept_until_the_next_lap():
    alone, _ = _lockstep(10.0, 11.0, 13.0, 20.0, 20.5)
    host = cluster.alone(tiny.CONFIG.train).hosts[0]
    for _ in range(3):
        alone.hear(alone.tell())
    assert alone.lap() == {host: {'min': 1.0, 'max': 2.0}}
    assert alone.lap() == {}
    alone.pause()  # a validation
    alone.hear(alone.tell())
    assert alone.lap() == {}
    alone.hear(alone.tell())
    assert alone.lap() == {host: {'min': 0.5, 'max': 0.5}}


class Several(cluster.Members):
    """As many processes as there are devices; the test makes up their messages."""

    count = 8


@pytest.fixture
def several(monkeypatch):
    members = Several(cluster.alone(None).place, None)
    members.hosts = ['a'] * 4 + ['b'] * 4
    own = jax.local_devices
    monkeypatch.setattr(jax, 'local_devices', lambda i=None: own() if i is None else [own()[i]])
    return lockstep.Lockstep(members, signals.StopSignals(), clock=iter((1.0, 2.0)).__next__)


def test_all_stop_after_the_step_whose_message_has_a_signal(several):
    messages = np.zeros((8, 2), np.float32)
    several.hear(messages)
    assert several.stop is None
    messages[5, 0] = signal.SIGTERM
    several.hear(messages)
    assert several.stop == signal.SIGTERM
    several.hear(np.zeros((8, 2), np.float32))
    assert several.stop == signal.SIGTERM, 'a signal is kept'


def test_the_shortest_and_longest_step_of_each_host(several):
    for seconds in (1, 2):
        several.hear(np.stack([np.zeros(8), seconds * np.arange(1, 9)], axis=1))
    assert several.lap() == {'a': {'min': 1.0, 'max': 8.0}, 'b': {'min': 5.0, 'max': 16.0}}


def test_every_process_gets_all_messages_from_its_devices(several):
    messages = several.tell()
    assert messages.sharding.is_fully_replicated
    np.testing.assert_array_equal(messages, np.zeros((8, 2)))
