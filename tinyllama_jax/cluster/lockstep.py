"""Stops all processes of a run after the same step, and collects the step times of every host.

A signal reaches the processes of a run at different times, and may reach only some, yet all must save after the same
step. So each process's signal and step time are gathered on the devices, dispatched behind each step and fetched with
its scalars. Every process sees the same bytes for the same step, and no device waits for them.
"""

import time

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tinyllama_jax import sharding
from tinyllama_jax.cluster.members import Members
from tinyllama_jax.process import signals


class Lockstep:
    """Shares stop signals and step times between processes; after each step call `tell`, and later `hear`."""

    def __init__(self, members: Members, stop_signals: signals.StopSignals, clock=time.perf_counter):
        self._members, self._signals, self._clock = members, stop_signals, clock
        self._agreed: int | None = None  # the first signal that any process has reported
        self._began: float | None = None  # when the newest step was dispatched
        self._seconds = []
        mesh = Mesh(np.array(jax.devices()), ('all',))
        self._first_devices = [jax.devices().index(jax.local_devices(i)[0]) for i in range(members.count)]
        self._per_device = NamedSharding(mesh, P('all'))
        self._replicate = jax.jit(lambda message: message, out_shardings=NamedSharding(mesh, P()))

    @property
    def stop(self) -> int | None:
        """The signal that stops all processes after this step; None if they continue."""
        return self._signals.received if self._members.count == 1 else self._agreed

    def tell(self):
        """Sends this process's signal and step time; call it after dispatching a step.

        Returns a [processes or devices, 2] array on the devices; pass it to `hear` when the step is done.
        """
        now, before = self._clock(), self._began
        self._began = now
        message = np.array([[self._signals.received or 0, now - before if before else 0.0]], np.float32)
        if self._members.count == 1:
            return message
        message = np.repeat(message, jax.local_device_count(), axis=0)
        return self._replicate(sharding.global_array(self._per_device, message))

    def pause(self) -> None:
        """Leaves the time until the next step out of the step times; call it after other work, such as validation."""
        self._began = None

    def hear(self, messages) -> None:
        """Reads what all processes sent with a step."""
        messages = jax.device_get(messages)
        if self._members.count > 1:
            messages = messages[self._first_devices]
        self._agreed = self._agreed or int(messages[:, 0].max()) or None
        self._seconds.append(messages[:, 1])

    def lap(self) -> dict[str, dict[str, float]]:
        """Returns {host: {min, max}} seconds of the steps since the last call; empty before the second step."""
        by_host: dict[str, list[float]] = {}
        for seconds in self._seconds:
            for host, value in zip(self._members.hosts, seconds.tolist(), strict=True):
                if value:
                    by_host.setdefault(host, []).append(value)
        self._seconds = []
        return {host: {'min': min(values), 'max': max(values)} for host, values in by_host.items()}
