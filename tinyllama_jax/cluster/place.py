"""This process's place in a run of several processes, from flags or from the environment that its launcher sets."""

import dataclasses
import os
import re
import socket
import zlib
from collections.abc import Iterable, Mapping

from tinyllama_jax import errors

_PORTS = 61_440, 4_096  # the first, and how many: above Linux's ephemeral ports; jobs take turns
_KUBERNETES = 'COORDINATOR_ADDRESS', 'NUM_PROCESSES', 'JOB_COMPLETION_INDEX'  # as launch/jobset.yaml sets them
# Where launchers say how many processes they started, or an id, which above 0 says that there are several. Of the later
# ones no other variable is read.
_POD_SIZES = 'WORLD_SIZE', 'NUM_PROCESSES', 'JAX_NUM_PROCESSES'  # set in a pod too, for whatever is run in it
_SIZES = (
    'OMPI_COMM_WORLD_SIZE', 'SLURM_STEP_NUM_TASKS', 'PMI_SIZE', 'MV2_COMM_WORLD_SIZE', 'JSM_NAMESPACE_SIZE',
    'FLUX_JOB_SIZE', 'HOROVOD_SIZE', 'PMIX_RANK', 'PMI_RANK', 'PALS_RANKID',
)  # fmt: skip


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
    """Returns this process's place: by the three flags, else by the environment of its launcher.

    The launchers are torchrun, Open MPI, Slurm and Kubernetes. The first that says that there are several processes
    counts, since torchrun and mpirun may run inside a job of the others.

    Raises UsageError for an incomplete set of flags, an invalid address or an id out of range, and for a launcher that
    started several processes without saying where this one's place is.
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
    for launcher in (_torchrun, _open_mpi, _slurm, _kubernetes):
        if place := launcher(host, environment):
            return place
    for name in _several((*_SIZES, *_POD_SIZES), environment):
        raise errors.UsageError(
            f'{name}={environment[name]}: a launcher started several processes, but the variables that say where they '
            'meet are not all set (docs/cluster.md); give each process --coordinator=HOST0:PORT, --num_processes and '
            f'--process_id, or unset {name} if this one is alone.'
        )
    return Place(host)


def refuse_several(command: str, environment: Mapping[str, str] = os.environ) -> None:
    """Raises UsageError if a launcher started several processes to run `command`, which is for one."""
    torchrun = ('WORLD_SIZE',) if 'LOCAL_RANK' in environment else ()  # otherwise it may be a pod's
    for name in _several((*torchrun, *_SIZES), environment):
        raise errors.UsageError(
            f'{name}={environment[name]}: {command} runs in one process, and would run in each of these; start it once.'
        )


def _several(names: Iterable[str], environment: Mapping[str, str]) -> list[str]:
    """Returns the variables, of `names`, that say that there are several processes."""
    alone = {name: ('', '0') if 'RANK' in name else ('', '0', '1') for name in names}
    return [name for name, values in alone.items() if environment.get(name, '') not in values]


def _torchrun(host: str, environment: Mapping[str, str]) -> Place | None:
    """Returns the place that torchrun, or another launcher of PyTorch programs, gives."""
    numbers = _numbers(environment, 'WORLD_SIZE', 'RANK')
    address, port = environment.get('MASTER_ADDR'), environment.get('MASTER_PORT', '')
    if not (numbers and address and port):
        return None
    if environment.get('TORCHELASTIC_USE_AGENT_STORE') == 'True' and port.isdigit():  # torchrun itself has that port
        port = str(_port(int(port) + 1))
    local_size = environment.get('LOCAL_WORLD_SIZE') or environment.get('LOCAL_SIZE', '1')  # the latter: DeepSpeed
    device = _own_device(environment, local_size != '1', 'LOCAL_RANK')
    return _validated(Place(host, _joined(address, port), *numbers, device), 'MASTER_ADDR:MASTER_PORT', 'RANK')


def _open_mpi(host: str, environment: Mapping[str, str]) -> Place | None:
    """Returns the place that Open MPI's mpirun gives; None if nothing says on which host process 0 is.

    That is this host if all processes are on it, else MASTER_ADDR if the user exports it, else the host of mpirun.
    """
    numbers = _numbers(environment, 'OMPI_COMM_WORLD_SIZE', 'OMPI_COMM_WORLD_RANK')
    # Open MPI 4: 1531576320.0;tcp://10.96.0.1,10.148.0.1:34911 or ...;tcp6://[fe80::1]:43370. 5: prterun-HOST-PID@1.
    job = environment.get('OMPI_MCA_orte_hnp_uri') or environment.get('PMIX_NAMESPACE', '')
    mpirun = re.search(r'tcp4?://([^,:]+)|tcp6://\[([^],]+)|^prterun-(.+)-\d+@', job)
    local_size = environment.get('OMPI_COMM_WORLD_LOCAL_SIZE', '1')
    if numbers and local_size == str(numbers[0]):
        address = 'localhost'
    else:
        address = environment.get('MASTER_ADDR') or (mpirun and next(filter(None, mpirun.groups())))
    if not (numbers and address):
        return None
    port = environment.get('MASTER_PORT') or str(_port(zlib.crc32(job.encode())))
    device = _own_device(environment, local_size != '1', 'OMPI_COMM_WORLD_LOCAL_RANK')
    place = Place(host, _joined(address, port), *numbers, device)
    return _validated(place, 'MASTER_ADDR:MASTER_PORT', 'OMPI_COMM_WORLD_RANK')


def _slurm(host: str, environment: Mapping[str, str]) -> Place | None:
    """Returns the place of one of several tasks of an srun step; None for a single task and in sbatch's own script."""
    numbers = _numbers(environment, 'SLURM_STEP_NUM_TASKS', 'SLURM_PROCID')
    nodes, job = environment.get('SLURM_STEP_NODELIST'), environment.get('SLURM_JOB_ID', '')
    if not (numbers and nodes and job.isdigit()):
        return None
    # The list looks like node1,node2 or rack[1-2]node[001-008,012]-ib,other. Its first node is the text before the
    # first comma outside brackets; a pair of brackets stands for its own text up to the first comma or dash.
    first = re.sub(r'\[([^],-]*)[^]]*\]', r'\1', re.findall(r'(?:[^,[]|\[[^]]*\])*', nodes)[0])
    # Like 8(x2),4: two nodes have 8. If any node has several, each task has one GPU, so that all have as many.
    on_nodes = re.findall(r'(\d+)(?:\(|,|$)', environment.get('SLURM_STEP_TASKS_PER_NODE', ''))
    device = _own_device(environment, any(count != '1' for count in on_nodes), 'SLURM_LOCALID')
    place = Place(host, f'{first}:{_port(int(job))}', *numbers, device)
    return _validated(place, 'SLURM_STEP_NODELIST', 'SLURM_PROCID')


def _kubernetes(host: str, environment: Mapping[str, str]) -> Place | None:
    numbers = _numbers(environment, *_KUBERNETES[1:])
    address = environment.get(_KUBERNETES[0])
    if not (numbers and address):
        return None
    return _validated(Place(host, address, *numbers), _KUBERNETES[0], _KUBERNETES[2])


def _numbers(environment: Mapping[str, str], size_name: str, id_name: str) -> tuple[int, int] | None:
    """Returns (number of processes, id of this one); None if one is not set or there is one process."""
    size, number = environment.get(size_name), environment.get(id_name)
    if not (size and number) or size == '1':
        return None
    if not (size.isdigit() and number.isdigit()):
        raise errors.UsageError(f'{size_name}={size}, {id_name}={number}: both are whole numbers.')
    return int(size), int(number)


def _own_device(environment: Mapping[str, str], several: bool, id_name: str) -> tuple[int, ...] | None:
    """Returns the GPU of a process that shares its host and sees its neighbours' GPUs; otherwise None, for all."""
    sees_all = ',' in environment.get('CUDA_VISIBLE_DEVICES', ',')
    local = environment.get(id_name, '')
    return (int(local),) if several and sees_all and local.isdigit() else None


def _port(number: int) -> int:
    lowest, count = _PORTS
    return lowest + number % count


def _joined(host: str, port: str) -> str:
    return f'[{host.strip("[]")}]:{port}' if ':' in host else f'{host}:{port}'


def _validated(place: Place, address_name: str, id_name: str) -> Place:
    host, _, port = (place.coordinator or '').rpartition(':')
    if not host or not port.isdigit() or not 0 < int(port) < 65_536:
        raise errors.UsageError(f'{address_name}={place.coordinator}: HOST:PORT of process 0 is expected.')
    if not 0 <= place.process_id < place.num_processes:
        raise errors.UsageError(
            f'{id_name}={place.process_id}: ids go from 0 to num_processes - 1 = {place.num_processes - 1}.'
        )
    return place
