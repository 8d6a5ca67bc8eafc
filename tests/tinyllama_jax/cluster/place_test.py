"""The place of a process, by flags and by the environments of its launchers."""

import pytest

from tinyllama_jax import errors
from tinyllama_jax.cluster import place
from tinyllama_jax.cluster.place import Place

SLURM = {
    'SLURM_JOB_ID': '4100',
    'SLURM_STEP_NUM_TASKS': '16',
    'SLURM_STEP_NODELIST': 'node[007-008]',
    'SLURM_STEP_TASKS_PER_NODE': '8(x2)',
    'SLURM_PROCID': '11',
    'SLURM_LOCALID': '3',
    'SLURMD_NODENAME': 'node008',
}
TORCHRUN = {
    'TORCHELASTIC_RUN_ID': 'none',
    'TORCHELASTIC_USE_AGENT_STORE': 'True',
    'MASTER_ADDR': 'node7',
    'MASTER_PORT': '29500',
    'WORLD_SIZE': '16',
    'RANK': '11',
    'LOCAL_WORLD_SIZE': '8',
    'LOCAL_RANK': '3',
    'NODE_NAME': 'node8',
}
DEEPSPEED = {name: value for name, value in TORCHRUN.items() if not name.startswith(('TORCH', 'LOCAL_W'))}
DEEPSPEED |= {'LOCAL_SIZE': '8'}
OPEN_MPI = {
    'OMPI_COMM_WORLD_SIZE': '16',
    'OMPI_COMM_WORLD_RANK': '11',
    'OMPI_COMM_WORLD_LOCAL_SIZE': '8',
    'OMPI_COMM_WORLD_LOCAL_RANK': '3',
    'NODE_NAME': 'node8',
}
OPEN_MPI_4 = OPEN_MPI | {'OMPI_MCA_orte_hnp_uri': '1531576320.0;tcp://10.96.0.1,10.148.0.1:34911'}
OPEN_MPI_5 = OPEN_MPI | {'PMIX_NAMESPACE': 'prterun-gpu-node-7-1234@1'}
KUBERNETES = {
    'COORDINATOR_ADDRESS': 'tinyllama-workers-0-0.tinyllama:29400',
    'NUM_PROCESSES': '2',
    'JOB_COMPLETION_INDEX': '1',
    'NODE_NAME': 'gpu-b',
}


def test_flags_give_the_place():
    here = place.find('10.0.0.1:1234', 4, 3, environment={**SLURM, 'NODE_NAME': 'b'})
    assert (here.coordinator, here.num_processes, here.process_id) == ('10.0.0.1:1234', 4, 3)
    assert here.address == ('10.0.0.1', 1234)
    assert place.find('[fe80::1]:1234', 1, 0).address == ('fe80::1', 1234)


def test_slurm_gives_the_place():
    here = place.find(environment=SLURM)
    assert here == Place('node008', 'node007:61444', 16, 11, local_devices=(3,))
    assert str(here) == 'process 11 on node008'


@pytest.mark.parametrize(
    ('nodes', 'first'),
    [
        ('one', 'one'),
        ('one,two', 'one'),
        ('gpu-[3,5-9],other', 'gpu-3'),
        ('gpu[0012-0015]', 'gpu0012'),
        ('a1.b,c', 'a1.b'),
        ('n[1-2]-ib', 'n1-ib'),
        ('r[1-2]n[1-4]', 'r1n1'),
        ('r[01,03]n[2,4-9]-ib[0-1].site,other[1-2]', 'r01n2-ib0.site'),
    ],
)
def test_the_first_of_slurms_nodes_is_the_coordinator(nodes, first):
    assert place.find(environment={**SLURM, 'SLURM_STEP_NODELIST': nodes}).address == (first, 61_444)


def test_a_task_has_all_devices_it_sees_unless_it_shares_the_node_and_sees_its_neighbours():
    for changed in ({'SLURM_STEP_TASKS_PER_NODE': '1(x2)'}, {'CUDA_VISIBLE_DEVICES': '0'}):
        assert place.find(environment={**SLURM, **changed}).local_devices is None
    assert place.find(environment={**SLURM, 'CUDA_VISIBLE_DEVICES': '0,1,2,3'}).local_devices == (3,)


def test_tasks_that_are_spread_unevenly_have_a_device_each():
    assert place.find(environment={**SLURM, 'SLURM_STEP_TASKS_PER_NODE': '1,8(x2)'}).local_devices == (3,)


def test_torchrun_gives_the_place():
    here = place.find(environment=TORCHRUN)
    assert here == Place('node8', here.coordinator, 16, 11, local_devices=(3,))
    assert here.address[0] == 'node7' and here.address[1] != 29_500, 'torchrun listens at its own port'
    assert {place.find(environment={**TORCHRUN, 'RANK': str(i)}).address for i in range(16)} == {here.address}
    ports = (
        place.find(environment={**TORCHRUN, 'MASTER_PORT': str(port)}).address[1] for port in range(61_440, 65_536)
    )
    assert all(port != its_own for port, its_own in enumerate(ports, start=61_440))


def test_other_launchers_of_pytorch_programs_give_the_place():
    elastic = ('TORCHELASTIC_RUN_ID', 'TORCHELASTIC_USE_AGENT_STORE', 'LOCAL_WORLD_SIZE', 'LOCAL_RANK')
    pod = {name: value for name, value in TORCHRUN.items() if name not in elastic}
    assert place.find(environment=pod) == Place('node8', 'node7:29500', 16, 11)
    for address in ('fe80::1', '[fe80::1]'):
        here = place.find(environment={**pod, 'MASTER_ADDR': address})
        assert (here.coordinator, here.address) == ('[fe80::1]:29500', ('fe80::1', 29_500))
    assert place.find(environment=DEEPSPEED) == Place('node8', 'node7:29500', 16, 11, local_devices=(3,))


@pytest.mark.parametrize(
    ('changed', 'address'),
    [
        (OPEN_MPI_4, '10.96.0.1'),
        ({'OMPI_MCA_orte_hnp_uri': '1314521088.0;tcp6://[fe80::b9b:858,2620:10d::2]:43370'}, 'fe80::b9b:858'),
        (OPEN_MPI_5, 'gpu-node-7'),
        (OPEN_MPI_5 | {'MASTER_ADDR': 'elsewhere'}, 'elsewhere'),
        ({'OMPI_COMM_WORLD_LOCAL_SIZE': '16', 'PMIX_NAMESPACE': '3481075713'}, 'localhost'),
    ],
)
def test_open_mpi_gives_the_place(changed, address):
    here = place.find(environment=OPEN_MPI | changed)
    assert (here.num_processes, here.process_id, here.local_devices) == (16, 11, (3,))
    assert here.address[0] == address and here.address[1] >= 61_440
    exported = place.find(environment=OPEN_MPI | changed | {'MASTER_PORT': '29500'})
    assert exported.address == (address, 29_500)


def test_a_launcher_within_a_job_of_slurm_counts():
    assert place.find(environment=SLURM | OPEN_MPI_4).address[0] == '10.96.0.1'
    assert place.find(environment=SLURM | TORCHRUN | {'WORLD_SIZE': '2', 'RANK': '1'}).num_processes == 2
    assert place.find(environment=SLURM | {'WORLD_SIZE': '1', 'RANK': '0'}).num_processes == 16


@pytest.mark.parametrize(
    'environment',
    [
        OPEN_MPI,  # nothing says where process 0 is
        {'PMI_SIZE': '2', 'PMI_RANK': '0'},  # MPICH, Intel MPI
        {'HOROVOD_SIZE': '2', 'HOROVOD_RANK': '0'},
        {'PMIX_RANK': '1', 'PMIX_NAMESPACE': 'prterun-a-1@1'},  # PRRTE's prun tells no size
        {'WORLD_SIZE': '2', 'RANK': '1'},
        {'WORLD_SIZE': '2', 'MASTER_ADDR': 'a', 'MASTER_PORT': '1'},
        {'SLURM_STEP_NUM_TASKS': '2', 'SLURM_PROCID': '1', 'SLURM_JOB_ID': '4'},
        {name: value for name, value in KUBERNETES.items() if name != 'JOB_COMPLETION_INDEX'},
    ],
)
def test_a_launcher_of_several_processes_that_gives_no_place_is_refused(environment):
    size = next(
        name for name in environment if any(part in name for part in ('SIZE', 'NUM_PROCESSES', 'NUM_TASKS', 'RANK'))
    )
    with pytest.raises(errors.UsageError, match=f'{size}={environment[size]}: a launcher started several .*--coord'):
        place.find(environment=environment)


def test_a_command_for_one_process_is_refused_by_several():
    for environment in (OPEN_MPI, TORCHRUN, DEEPSPEED, SLURM, {'PMI_SIZE': '2'}):
        with pytest.raises(errors.UsageError, match='=(16|2): export runs in one process'):
            place.refuse_several('export', environment)
    for alone in (
        {},
        {'OMPI_COMM_WORLD_SIZE': '1', 'PMIX_RANK': '0'},
        KUBERNETES,
        {'WORLD_SIZE': '2', 'RANK': '1'},
    ):  # one may enter a pod
        place.refuse_several('export', alone)


def test_kubernetes_gives_the_place():
    assert place.find(environment=KUBERNETES) == Place('gpu-b', KUBERNETES['COORDINATOR_ADDRESS'], 2, 1)


@pytest.mark.parametrize(
    'environment',
    [
        {},
        {**SLURM, 'SLURM_STEP_NUM_TASKS': '1'},
        {
            'SLURM_JOB_ID': '4100',
            'SLURM_NTASKS': '16',
            'SLURM_PROCID': '0',
            'SLURM_LOCALID': '0',
        },  # sbatch's own script
        {'WORLD_SIZE': '1', 'RANK': '0', 'OMPI_COMM_WORLD_SIZE': '1', 'PMI_SIZE': '1'},
        {'RANK': '3', 'MASTER_ADDR': 'a'},
        {**KUBERNETES, 'NUM_PROCESSES': '1'},
        {'JOB_COMPLETION_INDEX': '3'},  # an indexed job, but not a run of several processes
    ],
)
def test_otherwise_a_process_is_alone(environment):
    here = place.find(environment=environment)
    assert (here.coordinator, here.num_processes, here.process_id) == (None, 1, 0)


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (('a:1', None, 0), '--num_processes is missing'),
        ((None, 2, 0), '--coordinator is missing'),
        (('a', 2, 0), '--coordinator=a: HOST:PORT of process 0'),
        (('a:b', 2, 0), '--coordinator=a:b: HOST:PORT'),
        (('a:70000', 2, 0), 'HOST:PORT'),
        (('a:1', 2, 2), '--process_id=2: ids go from 0 to num_processes - 1 = 1'),
        (('a:1', 2, -1), '--process_id=-1'),
    ],
)
def test_invalid_flags_are_refused(flags, message):
    with pytest.raises(errors.UsageError, match=message):
        place.find(*flags, environment={})


def test_an_invalid_environment_is_refused():
    with pytest.raises(errors.UsageError, match='JOB_COMPLETION_INDEX=5'):
        place.find(environment={**KUBERNETES, 'JOB_COMPLETION_INDEX': '5'})
    with pytest.raises(errors.UsageError, match='NUM_PROCESSES=two'):
        place.find(environment={**KUBERNETES, 'NUM_PROCESSES': 'two'})
    with pytest.raises(errors.UsageError, match='RANK=16: ids go from 0 to num_processes - 1 = 15'):
        place.find(environment={**TORCHRUN, 'RANK': '16'})
    with pytest.raises(errors.UsageError, match='MASTER_ADDR:MASTER_PORT=node7:x: HOST:PORT'):
        place.find(environment={**TORCHRUN, 'MASTER_PORT': 'x'})
