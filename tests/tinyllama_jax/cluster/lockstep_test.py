"""What is told with each step: alone a signal acts at once, of several processes every one hears the same."""

import signal
import types

import jax
import numpy as np
import pytest

from tests.support import tiny
from tinyllama_jax.cluster import lockstep
from tinyllama_jax.cluster import members as cluster
from tinyllama_jax.process import signals


def _steps(*times, received=None):
    stop_signals = types.SimpleNamespace(received=received)
    return lockstep.Lockstep(cluster.alone(tiny.CONFIG.train), stop_signals, clock=iter(times).__next__), stop_signals


def test_alone_a_signal_stops_at_once():
    steps, stop_signals = _steps()
    assert steps.stop is None
    stop_signals.received = signal.SIGTERM
    assert steps.stop == signal.SIGTERM


def test_the_time_from_step_to_step_is_kept_until_it_is_asked_for():
    steps, _ = _steps(10.0, 11.0, 13.0, 20.0, 20.5)
    host = cluster.alone(tiny.CONFIG.train).hosts[0]
    for _ in range(3):
        steps.hear(steps.tell())
    assert steps.lap() == {host: {'min': 1.0, 'max': 2.0}}
    assert steps.lap() == {}
    steps.pause()  # a validation
    steps.hear(steps.tell())
    assert steps.lap() == {}
    steps.hear(steps.tell())
    assert steps.lap() == {host: {'min': 0.5, 'max': 0.5}}


class Several(cluster.Members):
    """As many processes as there are devices; what all tell is put in by the test."""

    count = 8


@pytest.fixture
def several(monkeypatch):
    members = Several(cluster.alone(None).place, None)
    members.hosts = ['a'] * 4 + ['b'] * 4
    own = jax.local_devices
    monkeypatch.setattr(jax, 'local_devices', lambda i=None: own() if i is None else [own()[i]])
    return lockstep.Lockstep(members, signals.StopSignals(), clock=iter((1.0, 2.0)).__next__)


def test_all_stop_after_the_step_with_which_the_first_told_it(several):
    told = np.zeros((8, 2), np.float32)
    several.hear(told)
    assert several.stop is None
    told[5, 0] = signal.SIGTERM
    several.hear(told)
    assert several.stop == signal.SIGTERM
    several.hear(np.zeros((8, 2), np.float32))
    assert several.stop == signal.SIGTERM, 'once told'


def test_the_shortest_and_longest_step_of_each_host(several):
    for seconds in (1, 2):
        several.hear(np.stack([np.zeros(8), seconds * np.arange(1, 9)], axis=1))
    assert several.lap() == {'a': {'min': 1.0, 'max': 8.0}, 'b': {'min': 5.0, 'max': 16.0}}


def test_what_is_told_comes_back_from_the_devices_whole(several):
    told = several.tell()
    assert told.sharding.is_fully_replicated
    np.testing.assert_array_equal(told, np.zeros((8, 2)))
