"""The command `plan`: its output and page, exit codes, the change that makes a step fit, a search, bad input."""

import json
import os
import subprocess
import sys

import pytest

import main
from tests.conftest import ROOT
from tests.support import kernel_checks
from tests.support.planning import SMALL, large
from tinyllama_jax import config as config_lib
from tinyllama_jax.plan import report

pytestmark = kernel_checks.needs_triton


@pytest.fixture
def run(capsys):
    """run('--topology=1x1', ...) runs main.py plan in this process: exit status, stdout, the last line of stderr."""

    def call(*arguments: str):
        flags = [f'--config.{setting}' for setting in SMALL]
        status = main.main(['main.py', 'plan', '--config=configs/tinyllama_1b.py', *flags, *arguments])
        said = capsys.readouterr()
        return status or 0, said.out, said.err.strip().splitlines()[-1] if said.err.strip() else ''

    yield call
    main.FLAGS.unparse_flags()
    for name in main.FLAGS:
        main.FLAGS[name].unparse()


KEYS = {
    'fits', 'peak_bytes_per_gpu', 'capacity_bytes', 'parameters', 'devices', 'tokens_per_step', 'micro_batch_size',
    'accumulation_steps', 'remat', 'kernels', 'flops_per_token', 'collectives', 'estimated_tokens_per_second',
    'estimated_days', 'estimated_gpu_hours', 'bytes_per_second_per_axis', 'gpu_hours_per_300b_tokens', 'memory',
}  # fmt: skip


def test_json_is_one_object_and_the_page_holds_a_chart(run, tmp_path):
    status, out, _ = run(
        '--target=a100-80gb', '--topology=1x4', '--config.mesh.tensor=2', '--json', f'--output={tmp_path}/plan'
    )
    plan = json.loads(out)
    assert status == 0 and plan['fits'] is True and plan.keys() >= KEYS
    assert plan['flops_per_token'].keys() == {'C', 'F', 'N'}
    assert (plan['devices'], plan['tokens_per_step'], plan['accumulation_steps']) == (4, 64 * 128, 16)
    assert all(row.keys() >= {'kind', 'axis', 'count_per_step', 'bytes_per_step'} for row in plan['collectives'])
    axes = {row['axis'] for row in plan['collectives']}
    assert {'fsdp', 'tensor'} <= axes and 'other' not in axes
    published = {'TinyLlama-1.1B': 3_456, 'Pythia-1.0B': 4_830, 'MPT-1.3B': 7_920}
    assert plan['gpu_hours_per_300b_tokens'].items() >= published.items()
    assert '(0.9 of the device, less 1.5 GiB): fits' in report.text(plan)
    assert json.loads((tmp_path / 'plan/plan.json').read_text()) == plan
    assert (
        '<img alt="GPU-hours per 300 B tokens" src="data:image/png;base64,'
        in (tmp_path / 'plan/index.html').read_text()
    )


@large
def test_what_does_not_fit_ends_with_3_and_the_change_that_helps(run):
    """A micro-batch of a million tokens."""
    model = ['--config.model.num_layers=2', '--config.model.seq_len=1024', '--config.train.remat=names']
    batch = ['--config.train.micro_batch_size=1024', '--config.train.global_batch_size=1024']
    status, out, said = run('--target=a100-40gb', '--topology=1x1', *model, *batch)
    assert status == 3 and 'DOES NOT FIT' in out
    assert 'do not fit into 34.0 GiB a GPU; it fits (' in said
    assert '--config.train.remat=attention' in said or '--config.train.remat=full' in said


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (('--topology=1x1',), '--target=: choose one of a100-40gb, a100-80gb, h100-80gb, h200-141gb'),
        (('--target=tpu', '--topology=1x1'), '--target=tpu: choose one of a100-40gb'),
        (('--target=a100-40gb',), '--topology=: write NODESxGPUS'),
        (('--target=a100-40gb', '--topology=2*8'), r'--topology=2*8: write NODESxGPUS, as 2x8'),
        (('--target=a100-40gb', '--topology=0x8'), '--topology=0x8: write NODESxGPUS'),
        (('--target=a100-40gb', '--topology=1x2x4'), '--topology=1x2x4: write NODESxGPUS'),
        (
            ('--target=a100-40gb', '--topology=1x4', '--config.mesh.data=3'),
            'config.mesh: data=3, fsdp=-1, tensor=1 do not multiply to the 4 devices',
        ),
        (
            ('--target=a100-40gb', '--topology=1x8', '--config.mesh.tensor=8'),
            'config.mesh.tensor: 8 devices do not divide',
        ),
        (
            ('--target=a100-40gb', '--topology=1x8', '--config.train.micro_batch_size=64'),
            'config.train.global_batch_size: 64 is not a multiple of micro_batch_size x batch shards = 64 x 8',
        ),
        (('--target=a100-40gb', '--topology=1x1', '--config.model.head_dim=32'), 'config.kernels.attention'),
    ],
)
def test_bad_input_is_one_line_and_status_2(run, arguments, message):
    status, out, said = run(*arguments)
    assert (status, out) == (2, '')
    assert said.startswith('main.py: ') and message in said


@large
def test_copies_that_do_not_fit_are_split_over_all_gpus(run):
    """The state of 3 B parameters does not fit into one A100-40G; an eighth of it does."""
    model = ['--config.model.num_layers=40', '--config.model.hidden_dim=49152', '--config.mesh.data=-1']
    others = ['--config.mesh.fsdp=1', '--config.train.remat=full', '--config.train.micro_batch_size=1']
    status, _, said = run('--target=a100-40gb', '--topology=1x8', *model, *others)
    assert status == 3 and said.endswith(' GiB) with --config.mesh.data=1 --config.mesh.fsdp=-1.')


@large
def test_a_search_lists_what_fits_the_fastest_first(run):
    """A GPU's share of the batch is one sequence; the configured micro-batch is 2."""
    status, out, _ = run('--target=a100-40gb', '--topology=8x8', '--search', '--json')
    rows = json.loads(out)['search']
    assert status == 0
    assert {(row['remat'], row['micro_batch_size']) for row in rows} == {(policy, 1) for policy in config_lib.REMAT}
    speeds = [row['estimated_tokens_per_second'] for row in rows]
    assert speeds == sorted(speeds, reverse=True)


@large
def test_xla_flags_of_the_environment_win():
    """Weights are all-gathered one by one if the environment says so; by plan's flags a layer's are all at once."""
    flags = f'{os.environ.get("XLA_FLAGS", "")} --xla_gpu_all_gather_combine_threshold_bytes=1'.strip()
    settings = [f'--config.{setting}' for setting in SMALL]
    command = [sys.executable, 'main.py', 'plan', '--config=configs/tinyllama_1b.py', *settings, '--json']
    command += ['--target=a100-40gb', '--topology=1x2']
    environment = {**os.environ, 'XLA_FLAGS': flags}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=environment)
    plan = json.loads(done.stdout)
    assert plan['xla_flags'] == flags and f'XLA_FLAGS={flags}' in report.text(plan)
    gathered = sum(row['count_per_step'] for row in plan['collectives'] if row['kind'] == 'all-gather')
    matrices, layers = 7, 3
    assert gathered >= plan['accumulation_steps'] * 2 * layers * matrices  # forward and backward


def test_cudnn_where_it_is_missing_is_refused(run):
    """Tracing cuDNN's attention looks for the library."""
    settings = ('--config.kernels.attention=cudnn', '--config.train.remat=none')
    status, out, said = run('--target=h100-80gb', '--topology=1x1', *settings)
    if status == 0:
        pytest.skip('cuDNN is installed')
    assert (status, out) == (2, '')
    assert said.startswith('main.py: config.kernels.attention: cudnn cannot be planned with here (cuDNN not found)')
