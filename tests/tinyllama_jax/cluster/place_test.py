"""The place of a process, by flags and by the environments of Slurm and Kubernetes."""

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
    ],
)
def test_the_first_of_slurms_nodes_is_the_coordinator(nodes, first):
    assert place.find(environment={**SLURM, 'SLURM_STEP_NODELIST': nodes}).address == (first, 61_444)


def test_a_task_has_all_devices_it_sees_unless_it_shares_the_node_and_sees_its_neighbours():
    for changed in ({'SLURM_STEP_TASKS_PER_NODE': '1(x2)'}, {'CUDA_VISIBLE_DEVICES': '0'}):
        assert place.find(environment={**SLURM, **changed}).local_devices is None
    assert place.find(environment={**SLURM, 'CUDA_VISIBLE_DEVICES': '0,1,2,3'}).local_devices == (3,)


def test_kubernetes_gives_the_place():
    assert place.find(environment=KUBERNETES) == Place('gpu-b', KUBERNETES['COORDINATOR_ADDRESS'], 2, 1)


@pytest.mark.parametrize(
    'environment',
    [
        {},
        {**SLURM, 'SLURM_STEP_NUM_TASKS': '1'},
        {name: value for name, value in SLURM.items() if name != 'SLURM_STEP_NODELIST'},  # as in sbatch's own script
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
