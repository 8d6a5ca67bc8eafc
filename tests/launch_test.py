"""The files of launch/: the JobSet has only fields that exist, and statuses and numbers agree between files."""

import re

import pytest
import yaml

from tests.conftest import ROOT
from tinyllama_jax import errors
from tinyllama_jax.cluster import place
from tinyllama_jax.settings import commands

JOBSET = yaml.safe_load((ROOT / 'launch/jobset.yaml').read_text())

# The fields of JobSet v1alpha2, Job v1 and Pod v1 that we use, from their API references, each as (type, required,
# {field: the same}); a list has its entries under None. Other fields are refused: Kubernetes drops them silently.
TEXT, NUMBER, YES = (str, False, {}), (int, False, {}), (bool, False, {})


def _needed(field):
    return field[0], True, field[2]


def _object(**fields):
    return dict, False, fields


def _list(entry):
    return list, False, {None: entry}


VALUE_SOURCE = _object(fieldRef=_object(fieldPath=_needed(TEXT)))
ENVIRONMENT = _object(name=_needed(TEXT), value=TEXT, valueFrom=VALUE_SOURCE)
CONTAINER = _object(
    name=_needed(TEXT),
    image=_needed(TEXT),
    args=_list(TEXT),
    env=_list(ENVIRONMENT),
    resources=_object(limits=_object(**{'nvidia.com/gpu': NUMBER})),
    volumeMounts=_list(_object(name=_needed(TEXT), mountPath=_needed(TEXT))),
)
VOLUME = _object(
    name=_needed(TEXT),
    persistentVolumeClaim=_object(claimName=_needed(TEXT)),
    emptyDir=_object(medium=TEXT),
)
POD = _object(
    restartPolicy=_needed(TEXT),
    terminationGracePeriodSeconds=NUMBER,
    containers=_needed(_list(CONTAINER)),
    volumes=_list(VOLUME),
)
ON_EXIT_CODES = _object(containerName=TEXT, operator=_needed(TEXT), values=_needed(_list(NUMBER)))
JOB = _object(
    parallelism=NUMBER,
    completions=NUMBER,
    completionMode=TEXT,
    backoffLimit=NUMBER,
    podFailurePolicy=_object(rules=_needed(_list(_object(action=_needed(TEXT), onExitCodes=ON_EXIT_CODES)))),
    template=_needed(_object(spec=_needed(POD))),
)
RULE = _object(name=_needed(TEXT), action=_needed(TEXT), onJobFailureReasons=_list(TEXT))
SCHEMA = _object(
    apiVersion=_needed(TEXT),
    kind=_needed(TEXT),
    metadata=_needed(_object(name=_needed(TEXT))),
    spec=_needed(
        _object(
            coordinator=_object(replicatedJob=_needed(TEXT), jobIndex=NUMBER, podIndex=NUMBER),
            network=_object(enableDNSHostnames=YES, publishNotReadyAddresses=YES, subdomain=TEXT),
            failurePolicy=_object(maxRestarts=NUMBER, rules=_list(RULE)),
            replicatedJobs=_needed(
                _list(_object(name=_needed(TEXT), replicas=NUMBER, template=_needed(_object(spec=_needed(JOB)))))
            ),
        )
    ),
)


def _faults(value, schema, path='jobset'):
    """Returns what in a value contradicts its schema."""
    kind, _, fields = schema
    if type(value) is not kind:
        return [f'{path} is {value!r}, not a {kind.__name__}']
    if kind is list:
        return [fault for i, entry in enumerate(value) for fault in _faults(entry, fields[None], f'{path}[{i}]')]
    if kind is not dict:
        return []
    faults = [f'{path} has no field {name}' for name in value if name not in fields]
    faults += [f'{path}.{name} is missing' for name, field in fields.items() if field[1] and name not in value]
    return faults + [
        fault
        for name, entry in value.items()
        if name in fields
        for fault in _faults(entry, fields[name], f'{path}.{name}')
    ]


def _changed(tree, path, value):
    if not path:
        return value
    changed = tree.copy()
    changed[path[0]] = _changed(tree[path[0]] if len(path) > 1 else None, path[1:], value)
    return changed


def test_the_jobset_has_only_fields_that_exist_and_all_that_are_needed():
    assert _faults(JOBSET, SCHEMA) == []
    assert (JOBSET['apiVersion'], JOBSET['kind']) == ('jobset.x-k8s.io/v1alpha2', 'JobSet')


@pytest.mark.parametrize(
    ('path', 'value', 'fault'),
    [
        (('spec', 'coordinator', 'podindex'), 0, 'jobset.spec.coordinator has no field podindex'),
        (('spec', 'failurePolicy', 'maxRestarts'), '100', "maxRestarts is '100', not a int"),
        (('spec', 'replicatedJobs', 0), {'name': 'workers'}, 'replicatedJobs[0].template is missing'),
    ],
)
def test_a_wrong_field_is_found(path, value, fault):
    assert any(line.endswith(fault) for line in _faults(_changed(JOBSET, path, value), SCHEMA))


def _job():
    (replicated,) = JOBSET['spec']['replicatedJobs']
    job = replicated['template']['spec']
    (container,) = job['template']['spec']['containers']
    return replicated, job, container


def test_the_pods_find_their_place():
    replicated, job, container = _job()
    assert JOBSET['spec']['coordinator']['replicatedJob'] == replicated['name'] and job['completionMode'] == 'Indexed'
    given = {entry['name']: entry.get('value', entry['name']) for entry in container['env']}  # fields by their names
    environment = {name: re.sub(r'\$\((\w+)\)', r'\1', value) for name, value in given.items()}
    assert job['parallelism'] == job['completions'] == int(environment['NUM_PROCESSES'])
    here = place.find(environment={**environment, 'JOB_COMPLETION_INDEX': '1'})
    assert (here.host, here.address, here.process_id) == ('NODE_NAME', ('COORDINATOR', 29400), 1)


def test_the_container_runs_a_command_of_main():
    _, job, container = _job()
    command, *flags = container['args']
    assert command in commands.COMMANDS
    assert {flag.lstrip('-').partition('=')[0] for flag in flags} <= {'config', 'workdir'}
    mounts = {mount['name']: mount['mountPath'] for mount in container['volumeMounts']}
    assert flags[-1].startswith(f'--workdir={mounts["runs"]}/')
    assert {volume['name'] for volume in job['template']['spec']['volumes']} == set(mounts)


def test_the_statuses_worth_a_restart_are_the_same_everywhere():
    _, job, container = _job()
    (rule,) = job['podFailurePolicy']['rules']
    codes = rule['onExitCodes']
    assert (rule['action'], codes['operator'], codes['containerName']) == ('FailJob', 'NotIn', container['name'])
    script = re.search(r'^  ([\d| ]+)\)$', (ROOT / 'launch/slurm.sbatch').read_text(), re.MULTILINE)[1]
    ours = {errors.Unavailable.exit_code, errors.Stopped('', 15).exit_code, 128 + 9}
    assert set(codes['values']) == ours == {int(code) for code in script.split('|')}


def test_the_image_is_made_of_files_that_exist():
    copied = re.findall(r'^COPY (.+) \./$', (ROOT / 'launch/Dockerfile').read_text(), re.MULTILINE)
    assert copied and all((ROOT / name).is_file() for name in copied[0].split())
