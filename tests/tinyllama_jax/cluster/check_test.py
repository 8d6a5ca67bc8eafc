"""The command `check`: its tables for one and for two real processes, and the faults that it reports."""

import dataclasses
import json
import re

import pytest

from tests.conftest import ROOT
from tests.support import tiny
from tests.support.processes import Processes
from tinyllama_jax import errors
from tinyllama_jax.cluster import check
from tinyllama_jax.cluster import members as cluster
from tinyllama_jax.config import MeshConfig

ARGUMENTS = ['--config=tests/support/tiny_experiment.py:8', '--config.train.micro_batch_size=1', '--config.mesh.data=2']
CONFIG = dataclasses.replace(
    tiny.CONFIG, mesh=MeshConfig(data=2, fsdp=4), train=dataclasses.replace(tiny.CONFIG.train, micro_batch_size=1)
)


def _check(folder, config=CONFIG, plan=None):
    check.check_run(config, folder, plan=plan, members=cluster.alone(config.train))


def _plan(path, *, seconds, **bytes_per_step):
    collectives = [
        {'kind': kind.replace('_', '-'), 'axis': 'fsdp', 'count_per_step': 1, 'bytes_per_step': count}
        for kind, count in bytes_per_step.items()
    ]
    plan = {'collectives': collectives, 'tokens_per_step': 1_000, 'estimated_tokens_per_second': 1_000 / seconds}
    path.write_text(json.dumps(plan))
    return str(path)


def test_two_processes_say_what_their_cluster_can_do(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv('CORPUS', 'nowhere')  # check does not read it
    with Processes(tmp_path / 'run', ARGUMENTS, command='check') as processes:
        assert processes.wait() == [0, 0], processes.lines(0) + processes.lines(1)
    said = capfd.readouterr().out
    assert '2 hosts (host-0, host-1), 2 processes, 8 x cpu' in said and 'jax 0.1' in said
    for i in range(2):
        assert re.search(
            rf'^{i} +host-{i} +- +4 +[\d.]+ [MGk]B/s +[\d.]+ [MGk]B/s +\S+ TFLOP/s +[+-]0\.\d+ s$', said, re.M
        )
    for axis in ('data', 'fsdp'):
        for kind in ('all-gather', r'reduce-scatter \(as all-reduce\)', 'all-reduce'):
            assert re.search(rf'^{axis} +{kind} +\S+ MB +\S+ [MGk]B/s', said, re.MULTILINE)
    assert said.count('axis') == 1 and 'check: nothing stands in the way of the run' in said
    assert not list((tmp_path / 'run').iterdir())


def test_a_step_of_fsdp_gathers_parameters_twice_and_reduces_gradients_once(tmp_path, capsys):
    """Each device sends (n - 1) / n of what is gathered or scattered, in float32."""
    config = dataclasses.replace(CONFIG, mesh=MeshConfig(fsdp=8))
    _check(tmp_path, config)
    said = capsys.readouterr().out
    model = config.model
    scales = (2 * model.num_layers + 1) * model.embed_dim
    matrices = 2 * model.vocab_size * model.embed_dim + model.num_layers * (
        model.embed_dim * model.head_dim * 2 * (model.num_heads + model.num_kv_heads)
        + 3 * model.embed_dim * model.hidden_dim
    )
    for kind, count in (('all-gather', 2), ('reduce-scatter', 1)):
        assert re.search(rf'^fsdp +{kind}.* {count * 4 * matrices * 7 / 8 / 1e3:.3g} kB +\S+ s$', said, re.MULTILINE)
    assert re.search(rf'^fsdp +all-reduce .* {2 * 4 * scales * 7 / 8 / 1e3:.3g} kB +\S+ s$', said, re.MULTILINE)
    assert 'data ' not in said, 'an axis of one device has no collectives'


def test_collectives_that_take_longer_than_a_step_are_a_fault_that_names_the_axis(tmp_path, capsys):
    _check(tmp_path, plan=_plan(tmp_path / 'plan.json', seconds=1_000, all_gather=1_000))
    assert 'a step takes 1e+03 s without waiting for them' in capsys.readouterr().out
    plan = _plan(tmp_path / 'plan.json', seconds=0.001, all_gather=10**12)
    with pytest.raises(
        errors.RunError, match=r'^check: the collectives of axis fsdp take .* a step without them 0\.001 s'
    ):
        _check(tmp_path, plan=plan)


@pytest.mark.parametrize('content', [None, 'no json', '[]', '{"collectives": []}'])
def test_a_file_that_is_not_a_plan_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / 'plan.json').write_text(content)
    with pytest.raises(errors.UsageError, match=r'--plan=.*plan\.json: not what main.py plan --json prints'):
        _check(tmp_path, plan=str(tmp_path / 'plan.json'))


def test_a_mesh_that_does_not_fit_the_devices_is_refused(tmp_path):
    with pytest.raises(errors.UsageError, match='config.mesh: .* do not multiply to the 8 devices'):
        _check(tmp_path, dataclasses.replace(CONFIG, mesh=MeshConfig(data=3, fsdp=1)))


def test_a_workdir_that_the_hosts_do_not_share_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv('CORPUS', 'nowhere')
    folders = [tmp_path / name for name in 'ab']
    for folder in folders:
        folder.mkdir()
    arguments = [f'--config={ROOT}/tests/support/tiny_experiment.py:8', *ARGUMENTS[1:], '--workdir=run']
    with Processes(tmp_path / 'run', arguments, command='check', folders=folders) as processes:
        assert processes.wait() == [2, 2]
    said = processes.lines(0) + processes.lines(1)
    assert re.search('does not see in run what process . on host-. has written there', said)
