"""The GPU benchmarks' smoke runs: the same code in tiny sizes on a CPU, with only what a bare GPU image has."""

import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from bench.gpu import all as gpu
from bench.gpu import benchmark
from bench.gpu import learn as gpu_learn
from bench.gpu import peers as gpu_peers
from bench.gpu import step as gpu_step
from configs import tinyllama_120m
from kernels import dispatch
from tests.conftest import ROOT
from tests.support.kernel_checks import needs_triton
from tinyllama_jax import config, flops

# What the product needs elsewhere and an image with only JAX, Triton, torch and transformers lacks.
MISSING = (
    'array_record', 'datasets', 'datatrove', 'grain', 'lm_eval', 'matplotlib', 'ml_collections', 'pandas', 'pyarrow',
    'sentencepiece', 'tensorboardX', 'zstandard',
)  # fmt: skip


@pytest.fixture
def bare_env(tmp_path):
    """The environment of a process that cannot import `MISSING`."""
    (tmp_path / 'sitecustomize.py').write_text(f'import sys\nsys.modules.update(dict.fromkeys({MISSING}))\n')
    return {**os.environ, 'PYTHONPATH': str(tmp_path), 'PYTHON': sys.executable}


def run(benchmark: str, name: str, tmp_path, env):
    """Runs a benchmark's smoke run and returns the phases of its result."""
    command = [f'{ROOT}/bench/gpu.sh', benchmark, str(tmp_path / 'results'), '--smoke']
    ended = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=400)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    result = json.loads((tmp_path / f'results/{name}.json').read_text())
    assert result['failures'] == []
    assert {'jax', 'triton', 'torch', 'driver'} <= result['versions'].keys()
    assert f'# {name} on ' in (tmp_path / f'results/{name}.md').read_text()
    return result['phases']


@needs_triton
def test_kernels_step_and_resume(tmp_path, bare_env):
    phases = run('all', 'gpu', tmp_path, bare_env)
    assert list(phases) == list(gpu.PHASES)
    assert {name for name, phase in phases.items() if phase['status'] != 'ok'} == {'unrolled'}
    rows = {name: phase['results'].get('rows') for name, phase in phases.items()}
    attention = {row['implementation']: row for row in rows['attention']}
    assert {'error', 'error_dv', 'forward_tflops', 'both_tflops'} <= attention['interpret'].keys()
    assert attention['cudnn']['note'].startswith('skipped: ')
    assert {'error', 'forward_gb_per_s', 'backward_gb_per_s'} <= rows['streaming'][0].keys()
    assert {'ms', 'temporary_bytes', 'predicted_peak_bytes'} <= rows['cross_entropy'][0].keys()
    assert {'tokens_per_second', 'mfu_C', 'mfu_F', 'predicted_peak_bytes', 'remat'} <= rows['step'][0].keys()
    assert len(phases['resume']['results']['resumed_losses']) == 10
    assert phases['sweep']['results']['best'] and phases['sweep_streaming']['results']['best']


@needs_triton
def test_peers(tmp_path, bare_env):
    bare_env['JAX_NUMPY_DTYPE_PROMOTION'] = 'standard'  # jax.nn's attention and optax mix dtypes
    phases = run('peers', 'gpu_peers', tmp_path, bare_env)
    peers = [row['peer'] for row in phases['compare']['results']['rows']]
    assert peers[:2] == ['ours', 'plain JAX, xla attention']
    if importlib.util.find_spec('torch'):
        assert peers[2:] == [f'Hugging Face eager, {which} attention' for which in ('cudnn', 'default')]
    else:
        assert phases['torch'] | {'seconds': 0} == {
            'status': 'skipped', 'seconds': 0, 'error': 'torch is not installed', 'results': {},
        }  # fmt: skip


@needs_triton
def test_learning(tmp_path, bare_env):
    phases = run('learn', 'gpu_learn', tmp_path, bare_env)
    losses = phases['bfloat16']['results']['losses']
    assert len(losses) == len(phases['float32']['results']['losses'])
    assert losses[-1] < losses[0] - 0.1
    assert phases['compare']['results']['difference'] <= gpu_learn.TOLERANCE


@needs_triton
def test_a_broken_kernel_fails_the_run(tmp_path, monkeypatch):
    attention = dispatch.attention

    def broken(*arrays, impl, **options):
        out = attention(*arrays, impl=impl, **options)
        return 1.1 * out if impl == 'interpret' else out

    monkeypatch.setattr(dispatch, 'attention', broken)
    monkeypatch.setenv('XLA_FLAGS', os.environ['XLA_FLAGS'])  # restored afterwards, as the command adds to it
    assert gpu.main([str(tmp_path), '--smoke', '--only=attention']) == 1
    result = json.loads((tmp_path / 'gpu.json').read_text())
    assert any(failure.startswith('attention: interpret: error ') for failure in result['failures'])


def test_a_phase_that_breaks_does_not_keep_the_others_from_running(tmp_path, monkeypatch):
    def breaks(setting):
        raise OSError('no such luck')

    monkeypatch.setenv('XLA_FLAGS', os.environ['XLA_FLAGS'])
    phases = {'first': breaks, 'second': lambda setting: {'rows': [{'figure': 1.5}]}}
    assert benchmark.run('x', 'A benchmark.', phases, name='x', arguments=[str(tmp_path), '--smoke']) == 1
    result = json.loads((tmp_path / 'x.json').read_text())
    assert result['failures'] == ['first: OSError: no such luck']
    assert result['phases']['second']['status'] == 'ok'
    assert '| figure |\n|---|\n| 1.5 |' in (tmp_path / 'x.md').read_text()


def test_a_process_that_dies_is_a_failed_phase(tmp_path):
    setting = benchmark.Setting(smoke=True, work=tmp_path)
    result = benchmark.in_process('bench.no_such_module', 'phase', setting, limit_s=60)
    assert result['status'] == 'failed'
    assert 'ended with status 1' in result['error']


def test_weights_in_the_wrong_place_are_noticed(tmp_path):
    setting = benchmark.Setting(smoke=True, work=tmp_path)
    np.save(tmp_path / 'token losses ours.npy', np.ones((1, 8)))
    np.save(tmp_path / 'token losses Hugging Face.npy', np.full((1, 8), 1.2))
    (failure,) = gpu_peers._token_failures(setting)
    assert failure.startswith('token losses Hugging Face are 0.2 from ours')


def test_losses_that_are_not_numbers_are_noticed():
    assert gpu_step.loss_failures({'ours': [10.4, 10.3], 'xla': [10.4, 10.3]}) == []
    (failure,) = gpu_step.loss_failures({'ours': [10.4, 10.3], 'xla': [10.4, float('nan')]})
    assert failure.startswith("the losses of xla differ from ours's by nan")


@pytest.mark.parametrize(('ours', 'failures'), [(4.01, 0), (4.02, 1), (float('nan'), 1)])
def test_final_losses_agree_to_a_third_of_a_percent(tmp_path, ours, failures):
    for dtype, loss in (('bfloat16', ours), ('float32', 4.0)):
        (tmp_path / f'{dtype}.json').write_text(json.dumps({'final_loss': loss}))
    found = gpu_learn.compare(benchmark.Setting(smoke=True, work=tmp_path))
    assert len(found['failures']) == failures


def test_the_language_has_something_to_learn():
    rows = gpu_learn.make_language(4_096).rows(np.random.default_rng(0), 64, 256)
    pairs = gpu_learn.unigram_entropy(rows[:, :-1].astype(np.int64) * 4_096 + rows[:, 1:])
    assert rows.max() < 4_096
    # From one token to the next there is less to guess than from the frequencies alone.
    assert pairs - gpu_learn.unigram_entropy(rows) < gpu_learn.unigram_entropy(rows) - 1


def test_the_small_run_has_the_parameters_it_says():
    small = config.validated(tinyllama_120m.get_config())
    assert round(sum(flops.parameter_counts(small.model).values()) / 1e6, 1) == 124.7
    with pytest.raises(ValueError, match='no variant'):
        tinyllama_120m.get_config('large')
