"""This process's place in a run of several processes, from flags, Slurm or Kubernetes."""

import dataclasses
import os
import re
import socket
from collections.abc import Mapping

from tinyllama_jax import errors

_SLURM_PORTS = 61_440, 4_096  # the first, and how many: above Linux's ephemeral ports; jobs take turns
_KUBERNETES = 'COORDINATOR_ADDRESS', 'NUM_PROCESSES', 'JOB_COMPLETION_INDEX'  # as launch/jobset.yaml sets them


@dataclasses.dataclass(frozen=True)
class Place:
    """The id of this process, and where the processes of its run meet."""

    host: str
    coordinator: str | None = None  # HOST:PORT of process 0; None for a single process
    num_processes: int = 1
    process_id: int = 0
    local_devices: tuple[int, ...] | None = None  # the host's GPUs that this process uses; None: all that it sees

    @property
    def address(self) -> tuple[str, int]:
        """The coordinator's (host, port)."""
        host, _, port = (self.coordinator or '').rpartition(':')
        return host.strip('[]'), int(port)

    def __str__(self) -> str:
        return f'process {self.process_id} on {self.host}'


def find(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Place:
    """Returns this process's place: by the three flags, else by Slurm's or Kubernetes' environment variables.

    Raises UsageError for an incomplete set of flags, an invalid address or an id out of range.
    """
    # The node's name comes first: a pod's or a container's own name does not say which machine to look at.
    host = environment.get('SLURMD_NODENAME') or environment.get('NODE_NAME') or socket.gethostname()
    given = {'coordinator': coordinator, 'num_processes': num_processes, 'process_id': process_id}
    if coordinator is not None and num_processes is not None and process_id is not None:
        return _validated(Place(host, coordinator, num_processes, process_id), '--coordinator', '--process_id')
    missing = [name for name, value in given.items() if value is None]
    if len(missing) < len(given):
        raise errors.UsageError(
            f'--{missing[0]} is missing: --coordinator, --num_processes and --process_id go together.'
        )
    return _slurm(host, environment) or _kubernetes(host, environment) or Place(host)


def _slurm(host: str, environment: Mapping[str, str]) -> Place | None:
    """Returns the place of one of several tasks of an srun step; None for a single task and in sbatch's own script."""
    names = 'SLURM_JOB_ID', 'SLURM_STEP_NUM_TASKS', 'SLURM_STEP_NODELIST', 'SLURM_PROCID', 'SLURM_LOCALID'
    if any(name not in environment for name in names) or environment['SLURM_STEP_NUM_TASKS'] == '1':
        return None
    job, tasks, nodes, process, local = (environment[name] for name in names)
    # The list looks like node1,node2 or node[001-008,012],other. Its first node is the text before the first comma or
    # bracket; a bracket adds its text up to the first comma or dash.
    first = ''.join(re.findall(r'^([^,\[]+)(?:\[([^\],-]+))?', nodes)[0])
    lowest, count = _SLURM_PORTS
    several_here = environment.get('SLURM_STEP_TASKS_PER_NODE', '1').partition('(')[0] not in ('', '1')
    sees_all = ',' in environment.get('CUDA_VISIBLE_DEVICES', ',')
    local_devices = (int(local),) if several_here and sees_all else None
    return Place(host, f'{first}:{lowest + int(job) % count}', int(tasks), int(process), local_devices)


def _kubernetes(host: str, environment: Mapping[str, str]) -> Place | None:
    address, count, index = (environment.get(name) for name in _KUBERNETES)
    if not (address and count and index) or count == '1':
        return None
    if not (count.isdigit() and index.isdigit()):
        raise errors.UsageError(f'NUM_PROCESSES={count}, JOB_COMPLETION_INDEX={index}: both are whole numbers.')
    return _validated(Place(host, address, int(count), int(index)), _KUBERNETES[0], _KUBERNETES[2])


def _validated(place: Place, address_name: str, id_name: str) -> Place:
    host, _, port = (place.coordinator or '').rpartition(':')
    if not host or not port.isdigit() or not 0 < int(port) < 65_536:
        raise errors.UsageError(f'{address_name}={place.coordinator}: HOST:PORT of process 0 is expected.')
    if not 0 <= place.process_id < place.num_processes:
        raise errors.UsageError(
            f'{id_name}={place.process_id}: ids go from 0 to num_processes - 1 = {place.num_processes - 1}.'
        )
    return place
