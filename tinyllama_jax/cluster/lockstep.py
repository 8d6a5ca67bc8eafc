"""What each process tells all others with each step: that it was told to stop, and how long its last step took.

A signal reaches the processes of a run at different times, and some of them not at all; they must save after the same
step all the same. So a few bytes go around on the devices, dispatched behind each step and fetched with its scalars:
every process sees the same bytes of the same step, and no device waits for it.
"""

import time

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tinyllama_jax.cluster.members import Members
from tinyllama_jax.process import signals


class Lockstep:
    """The stop signal all processes agree on, and the shortest and longest step of each host."""

    def __init__(self, members: Members, stop_signals: signals.StopSignals, clock=time.perf_counter):
        self._members, self._signals, self._clock = members, stop_signals, clock
        self._agreed, self._began, self._seconds = None, None, []
        mesh = Mesh(np.array(jax.devices()), ('all',))
        self._rows = [jax.devices().index(jax.local_devices(i)[0]) for i in range(members.count)]
        self._local, self._everywhere = NamedSharding(mesh, P('all')), NamedSharding(mesh, P())
        self._share = jax.jit(lambda told: told, out_shardings=self._everywhere)

    @property
    def stop(self) -> int | None:
        """The number of the signal after which all processes stop now; None to go on."""
        return self._signals.received if self._members.count == 1 else self._agreed

    def tell(self):
        """To be called when a step was dispatched; what it returns goes to `hear` when the step is done."""
        now, before = self._clock(), self._began
        self._began = now
        told = np.array([[self._signals.received or 0, now - before if before else 0.0]], np.float32)
        if self._members.count == 1:
            return told
        told = np.repeat(told, jax.local_device_count(), axis=0)
        return self._share(jax.make_array_from_process_local_data(self._local, told))

    def pause(self) -> None:
        """To be called after what is no part of a step."""
        self._began = None

    def hear(self, told) -> None:
        """Takes in what all processes told with a step."""
        told = np.asarray(told) if self._members.count == 1 else np.asarray(told)[self._rows]
        self._agreed = self._agreed or int(told[:, 0].max()) or None
        self._seconds.append(told[:, 1])

    def lap(self) -> dict[str, dict[str, float]]:
        """{host: {min, max}} seconds of a step since the last lap; empty before the second step."""
        found: dict[str, list[float]] = {}
        for seconds in self._seconds:
            for host, value in zip(self._members.hosts, seconds.tolist(), strict=True):
                if value:
                    found.setdefault(host, []).append(value)
        self._seconds = []
        return {host: {'min': min(values), 'max': max(values)} for host, values in found.items()}
