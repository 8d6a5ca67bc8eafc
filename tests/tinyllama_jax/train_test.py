"""Training through the loop and the command line: exact resume, stops, refusals, failures."""

import dataclasses
import importlib.util
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from eval_bridge.hf import convert
from tests.conftest import OPTIMIZATION, ROOT
from tests.support import json_tokenizers, kernel_checks, tiny, tiny_export
from tinyllama_jax import errors, sharding, train
from tinyllama_jax.cluster import members as cluster
from tinyllama_jax.cluster import place
from tinyllama_jax.config import KernelConfig
from tinyllama_jax.data import pipeline, prepare
from tinyllama_jax.data import store as token_store
from tinyllama_jax.run import prompts, records
from tinyllama_jax.settings import experiment
from tinyllama_jax.tokenizer import loading

KILLS = int(os.environ.get('KILLS', '4'))  # SIGKILLs of the resume test
STEPS = 40


@pytest.fixture(scope='module')
def store(tmp_path_factory):
    """A prepared store of the tiny experiment; also sets $CORPUS, which the experiment reads."""
    folder = tmp_path_factory.mktemp('tiny')
    tiny.write_corpus(folder / 'corpus')
    os.environ['CORPUS'] = str(folder / 'corpus')
    prepare.prepare(_config(None).data, folder / 'store')
    return folder / 'store'


def _config(store, **train_fields):
    """The tiny experiment on this process's eight devices, a sequence on each."""
    train_fields = {'micro_batch_size': 1, **train_fields}
    config = experiment.load_experiment(f'{ROOT}/tests/support/tiny_experiment.py:{STEPS}')
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, store=store and str(store)))
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **train_fields))


def _with_optimizer(config, **fields):
    return dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, **fields))


def _losses(folder):
    entries = records.read_entries(folder / 'metrics.jsonl')
    steps = [entry['step'] for entry in entries]
    assert steps == list(range(1, len(steps) + 1)), 'a step is missing or written twice'
    return [entry['loss'] for entry in entries]


@pytest.fixture(scope='module')
def uninterrupted(store, tmp_path_factory):
    """The workdir of a run that nothing interrupted, on one device as the subprocesses' runs are."""
    folder = tmp_path_factory.mktemp('uninterrupted')
    finished = _main(store, folder)
    assert finished.wait() == 0, _said(folder)
    return folder


def _main(store, folder, *prefix):
    """Starts `main.py train`; what it says on stderr is in FOLDER/stderr.txt."""
    command = [
        sys.executable,
        'main.py',
        'train',
        f'--config=tests/support/tiny_experiment.py:{STEPS}',
        f'--workdir={folder}',
    ]
    environment = {**os.environ, 'XLA_FLAGS': OPTIMIZATION}
    with open(folder / 'stderr.txt', 'w') as stderr:
        return subprocess.Popen(
            [*prefix, *command, f'--config.data.store={store}'], cwd=ROOT, env=environment, stderr=stderr
        )


def _said(folder):
    return (folder / 'stderr.txt').read_text()


def _wait_for_step(folder, step, process):
    while process.poll() is None:
        entries = records.read_entries(folder / 'metrics.jsonl')
        if entries and entries[-1]['step'] >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f'ended before step {step}: {_said(folder)}')


def test_a_run_learns_and_writes_what_others_read(uninterrupted):
    losses = _losses(uninterrupted)
    assert len(losses) == STEPS and losses[-1] < losses[0] - 1
    entry = records.read_entries(uninterrupted / 'metrics.jsonl')[-1]
    assert {'step', 'loss', 'learning_rate', 'grad_norm', 'tokens_per_second', 'mfu', 'data_seconds'} <= set(entry)
    validation = records.read_entries(uninterrupted / 'validation.jsonl')
    assert [r['step'] for r in validation] == [10, 20, 30, 40] and set(validation[0]['loss']) == {'prose', 'code'}
    saved = json.loads((uninterrupted / 'config.json').read_text())
    assert set(saved) == {'config', 'command', 'commit', 'versions', 'devices', 'sha256'}
    assert sorted(int(p.name) for p in (uninterrupted / 'checkpoints').iterdir()) == [30, 35, 40]


def test_killed_anywhere_any_number_of_times_the_losses_are_the_same_digits(store, uninterrupted, tmp_path):
    rng = random.Random(KILLS)
    for kill in range(KILLS):
        process = _main(store, tmp_path)
        _wait_for_step(tmp_path, (kill + 1) * STEPS // (KILLS + 2), process)
        time.sleep(rng.random() * 0.3)
        process.kill()
        process.wait()
    last = _main(store, tmp_path)
    assert last.wait() == 0, _said(tmp_path)
    assert _losses(tmp_path) == _losses(uninterrupted)
    assert (tmp_path / 'validation.jsonl').read_text() == (uninterrupted / 'validation.jsonl').read_text()


@pytest.mark.parametrize(('number', 'status'), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stop_signal_saves_and_says_how_to_resume(store, uninterrupted, tmp_path, number, status):
    process = _main(store, tmp_path)
    _wait_for_step(tmp_path, 7, process)
    process.send_signal(number)
    assert process.wait() == status
    assert 'the same command resumes from there' in _said(tmp_path)
    saved = max(int(p.name) for p in (tmp_path / 'checkpoints').iterdir())
    assert _losses(tmp_path) == _losses(uninterrupted)[:saved]


def test_a_full_disk_stops_the_run_and_keeps_the_checkpoints_before(store, tmp_path):
    process = _main(store, tmp_path, 'prlimit', '--fsize=100000')  # the stand-in for a full disk
    assert process.wait() == 1
    assert 'a checkpoint could not be written' in _said(tmp_path)
    again = _main(store, tmp_path)
    assert again.wait() == 0, _said(tmp_path)


def test_a_finished_run_says_so_and_an_extended_one_resumes(store, tmp_path, capsys):
    train.train(_config(store, num_steps=8), tmp_path)
    train.train(_config(store, num_steps=8), tmp_path)
    assert 'nothing to do for num_steps=8' in capsys.readouterr().err
    train.train(_with_optimizer(_config(store, num_steps=10), peak_learning_rate=5e-3), tmp_path)
    assert len(_losses(tmp_path)) == 10


@pytest.mark.parametrize(
    ('path', 'value', 'message'),
    [
        ('seed', '9', 'config.seed is 9, but .* was trained with 1 up to step 2'),
        ('model.norm_eps', '1e-6', 'config.model.norm_eps is 1e-06'),
        ('train.global_batch_size', '16', 'config.train.global_batch_size is 16'),
        ('data.sources.prose.weight', '0.5', 'config.data.sources.prose.weight is 0.5'),
        ('data.document_mask', 'true', 'config.data.document_mask is True, but .* was trained with False up to step 2'),
    ],
)
def test_what_may_not_change_on_resume_is_named(store, short_run, path, value, message):
    with pytest.raises(errors.UsageError, match=message) as raised:
        train.train(experiment.override(_config(store, num_steps=4), path, value), short_run)
    assert f'--workdir={short_run}-2' in str(raised.value)
    assert len(_losses(short_run)) == 2


def test_a_run_from_before_there_were_masks_resumes_without_them(store, short_run, tmp_path, capsys):
    folder = shutil.copytree(short_run, tmp_path / 'run')
    meta_path = folder / 'checkpoints' / '2' / 'meta' / 'metadata'
    for path in (folder / 'config.json', meta_path):
        digests = ('digest', 'sha256')  # there were none of these either
        content = {name: value for name, value in json.loads(path.read_text()).items() if name not in digests}
        del content['config']['data']['document_mask'], content['config']['data']['restart_positions']
        path.write_text(json.dumps(content))
    config = _config(store, num_steps=3)
    with pytest.raises(errors.UsageError, match=r'^config\.data\.document_mask is True, but'):
        train.train(experiment.override(config, 'data.document_mask', 'true'), folder)
    meta = meta_path.read_text()
    meta_path.write_text(json.dumps({**json.loads(meta), 'data': 'of another store'}))
    with pytest.raises(errors.UsageError, match=r'^data \(the store behind it\) is'):
        train.train(config, folder)
    meta_path.write_text(meta)
    capsys.readouterr()
    train.train(config, folder)
    assert len(_losses(folder)) == 3
    said = capsys.readouterr().err
    assert 'config.train.num_steps was 2, is 3' in said
    assert 'mask' not in said


def _masked(config):
    """`config` with masks, and the first seed with which a document begins early in a row of the first batch."""
    config = experiment.override(config, 'data.document_mask', 'true')
    config = experiment.override(config, 'data.restart_positions', 'true')
    tokens = token_store.TokenStore(config.data.store)
    seeds = (dataclasses.replace(config, seed=seed) for seed in range(1, 100))
    return next(config for config in seeds if pipeline.make_dataset(config, tokens).segment_ids(0)[..., 16].any())


def test_with_document_masks_a_stopped_run_resumes_with_the_same_digits(store, tmp_path):
    config = _masked(_config(store, num_steps=2, eval_every_steps=1))
    whole, stopped, plain = (tmp_path / name for name in ('whole', 'stopped', 'plain'))
    train.train(config, whole)
    with pytest.raises(errors.Stopped, match='stopped and saved at step 1'):
        train.train(config, stopped, hooks=[lambda step, params: os.kill(os.getpid(), signal.SIGTERM)])
    assert _losses(stopped) == _losses(whole)[:1]
    with pytest.raises(errors.UsageError, match='config.data.restart_positions is False, but .* trained with True'):
        train.train(experiment.override(config, 'data.restart_positions', 'false'), stopped)
    train.train(config, stopped)
    assert _losses(stopped) == _losses(whole)
    assert (stopped / 'validation.jsonl').read_text() == (whole / 'validation.jsonl').read_text()
    train.train(dataclasses.replace(config, data=_config(store).data), plain)
    assert abs(_losses(plain)[0] - _losses(whole)[0]) > 1e-6, 'masks change even the first loss'


@pytest.fixture(scope='module')
def short_run(store, tmp_path_factory):
    folder = tmp_path_factory.mktemp('short')
    train.train(_config(store, num_steps=2), folder)
    return folder


def test_a_recomputed_loss_that_differs_stops_the_run(store, tmp_path):
    config = _config(store, num_steps=8)
    train.train(config, tmp_path)
    _pretend_killed_at(tmp_path, 5, change_loss_of=7)
    for _ in range(2):
        with pytest.raises(errors.RunError, match='step 7: the loss computed again'):
            train.train(config, tmp_path)
    assert len(_losses(tmp_path)) == 6


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(store, tmp_path, capsys):
    config = _config(store, num_steps=8)
    train.train(config, tmp_path / 'run')
    copy = shutil.copytree(tmp_path / 'run', tmp_path / 'copy')  # tensorstore keeps what it wrote in memory
    for path in (copy / 'checkpoints' / '8').rglob('params/**/d/*'):
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
    train.train(config, copy)
    assert 'damaged checkpoint' in (said := capsys.readouterr().err) and 'resuming from step 5' in said
    assert _losses(copy) == _losses(tmp_path / 'run')


_FAILING_READS = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
static int fails(int fd) {
  char link[64], path[4096] = "";
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  if (readlink(link, path, sizeof path - 1) < 0 || !strstr(path, getenv("FAILING_READS"))) return 0;
  errno = EIO;
  return 1;
}
#define FAIL(name, parameters, arguments) ssize_t name parameters { \\
  ssize_t (*real) parameters = dlsym(RTLD_NEXT, #name); return fails(fd) ? -1 : real arguments; }
FAIL(read, (int fd, void *to, size_t size), (fd, to, size))
FAIL(pread, (int fd, void *to, size_t size, off_t offset), (fd, to, size, offset))
FAIL(pread64, (int fd, void *to, size_t size, off64_t offset), (fd, to, size, offset))
"""


@pytest.mark.skipif(not shutil.which('gcc'), reason='needs gcc')
@pytest.mark.parametrize('kind', ['checkpoint', 'rows'])
def test_what_storage_fails_to_read_ends_with_75_and_stays(store, tmp_path, short_run, kind):
    """EIO for every read of the arrays, by wrapping the C library's functions."""
    library = tmp_path / 'failing_reads.so'
    subprocess.run(
        ['gcc', '-shared', '-fPIC', '-x', 'c', '-', '-o', library, '-ldl'], input=_FAILING_READS, text=True, check=True
    )
    (tmp_path / 'sitecustomize.py').write_text('from tinyllama_jax import storage\nstorage._WAITS_S = 0.1, 0.1\n')
    copy = shutil.copytree(short_run, tmp_path / 'run')
    failing = {'checkpoint': f'{copy}/checkpoints/2/params/', 'rows': f'{store}/tokens/'}[kind]
    environment = f'LD_PRELOAD={library}', f'FAILING_READS={failing}', f'PYTHONPATH={tmp_path}:{ROOT}'
    process = _main(store, copy, 'env', *environment)
    assert process.wait() == 75, _said(copy)
    said = {'checkpoint': f'{copy}/checkpoints/2: the checkpoint of step 2', 'rows': f'{store}/tokens/[a-z]+/train'}
    tries = re.findall(rf'{said[kind]} cannot be read( now)? \(\[Errno 5\]', _said(copy))
    assert tries.count('') >= 2 and ' now' in tries
    assert 'Traceback' not in _said(copy) and 'delete' not in _said(copy)
    assert [path.name for path in (copy / 'checkpoints').iterdir()] == ['2']


def _pretend_killed_at(folder, step, *, change_loss_of):
    for newer in (folder / 'checkpoints').iterdir():
        if int(newer.name) > step:
            newer.rename(folder / f'gone-{newer.name}')
    path = folder / 'metrics.jsonl'
    entries = records.read_entries(path)
    for entry in entries:
        entry['loss'] += 1e-7 * (entry['step'] == change_loss_of)
    path.write_text(''.join(json.dumps(entry) + '\n' for entry in entries))


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(store, tmp_path):
    config = _with_optimizer(_config(store), peak_learning_rate=1e36, warmup_steps=0)
    with pytest.raises(errors.RunError, match=r'step \d+: the loss is .*(nan|inf)'):
        train.train(config, tmp_path)
    assert list((tmp_path / 'checkpoints').iterdir()) == []


@kernel_checks.needs_triton
def test_a_kernel_is_tested_named_and_gives_the_same_losses(store, tmp_path, short_run, capsys):
    config = dataclasses.replace(_config(store, num_steps=2), kernels=KernelConfig(swiglu='interpret'))
    train.train(config, tmp_path)
    said = capsys.readouterr().err
    assert 'ops on CPU: attention xla, rms_norm xla, rope xla, swiglu interpret, cross_entropy xla, ' in said
    assert 'self-test passed: largest errors in float32 swiglu ' in said
    first, *others = records.read_entries(tmp_path / 'metrics.jsonl')
    assert first['kernels']['swiglu'] == 'interpret' and first['kernels']['rope'] == 'xla'
    assert not any('kernels' in entry for entry in others)
    assert _losses(tmp_path) == pytest.approx(_losses(short_run), abs=1e-5)


def test_a_kernel_that_cannot_run_here_is_refused(store, tmp_path):
    config = dataclasses.replace(_config(store), kernels=KernelConfig(attention='triton'))
    with pytest.raises(errors.UsageError, match=r'config\.kernels\.attention: .* not on a CPU'):
        train.train(config, tmp_path)
    assert not list(tmp_path.glob('checkpoints/*'))


def test_hooks_and_the_profiler_run_and_a_source_may_hold_nothing_out(store, tmp_path):
    called = []
    config = _config(store, num_steps=2, eval_every_steps=1, profile_step=2, profile_steps=5)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, holdout_min_rows=0, holdout_share=0.0))
    train.train(config, tmp_path, hooks=[lambda step, params: called.append((step, params['embed'].shape))])
    assert called == [(1, (320, 32)), (2, (320, 32))]
    assert list((tmp_path / 'profile').rglob('*.xplane.pb'))
    assert records.read_entries(tmp_path / 'validation.jsonl')[-1] == {'step': 2, 'loss': {}}


def test_an_implicit_transfer_in_the_loop_raises_and_one_in_a_hook_does_not(store, tmp_path, monkeypatch):
    def implicit(step, params):
        jax.jit(lambda x: x + 1)(np.ones(3))

    train.train(_config(store, num_steps=1), tmp_path / 'hook', hooks=[implicit])
    monkeypatch.setattr(sharding, 'global_arrays', lambda batch, *_, **__: batch)  # leaves numpy arrays to the step
    with pytest.raises(jax.errors.JaxRuntimeError, match='Disallowed host-to-device transfer'):
        train.train(_config(store, num_steps=1), tmp_path / 'loop')


class Noted(cluster.Members):
    """One process that keeps what its watchdog is told: (what it does, whether that compiles)."""

    def __init__(self):
        super().__init__(place.Place('host'), None)
        self.noted = []

    def at(self, doing, **compiles):
        super().at(doing, **compiles)
        self.noted.append(self._mark[1:])


def test_resumed_one_step_before_a_validation_only_what_compiles_is_given_time_for_it(store, tmp_path, short_run):
    members, folder = Noted(), shutil.copytree(short_run, tmp_path / 'run')
    train.train(_config(store, num_steps=3, eval_every_steps=3), folder, hooks=[lambda *_: None], members=members)
    assert members.noted == [
        ('reading data', False),
        ('the step', True),
        ('waiting for a step', True),
        ('validation', True),
        ('saving', False),
        ('a hook', False),
    ]


def test_an_imported_run_trains_with_settings_of_its_own(store, tmp_path, short_run):
    convert.export_run(None, short_run, step=None, output=str(tmp_path / 'hf'), dtype='float32', format='safetensors')
    convert.import_run(None, tmp_path / 'run', input=str(tmp_path / 'hf'), command='main.py import')
    config = _config(store, num_steps=2, checkpoint_every_steps=1)
    train.train(dataclasses.replace(config, seed=9), tmp_path / 'run')
    first, imported = _losses(short_run)[0], _losses(tmp_path / 'run')[0]
    assert imported < first  # two steps of training came along
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, norm_eps=1e-6))
    convert.import_run(None, tmp_path / 'again', input=str(tmp_path / 'hf'), command='main.py import')
    with pytest.raises(errors.UsageError, match='config.model.norm_eps is 1e-06'):
        train.train(other, tmp_path / 'again')


def test_a_tokenizer_json_of_70000_ids_goes_from_text_to_export(store, tmp_path, capsys):
    folder = json_tokenizers.write(tmp_path / 'llama3', 'llama3', [tiny_export.text()])
    json_tokenizers.widen(folder, first=1_000, count=69_000)
    config = _config(tmp_path / 'wide', num_steps=1)
    data = dataclasses.replace(config.data, tokenizer=str(folder), tokenizer_pieces=None, bos=True)
    config = dataclasses.replace(config, data=data, model=dataclasses.replace(config.model, vocab_size=70_016))
    manifest = prepare.prepare(config.data, tmp_path / 'wide')
    assert (manifest['vocab_size'], manifest['dtype']) == (70_000, 'uint32')
    train.train(config, tmp_path / 'run')
    assert _losses(tmp_path / 'run')[0] == pytest.approx(np.log(70_016), rel=0.02)
    prompts.generate_run(None, tmp_path / 'run', prompt=('the end',), max_new_tokens=4)
    assert 'the end' in capsys.readouterr().out
    convert.export_run(None, tmp_path / 'run', step=None, output=str(tmp_path / 'hf'))
    ours = loading.load(tmp_path / 'hf')
    assert ours.sha256 == loading.load(folder).sha256
    if importlib.util.find_spec('transformers'):
        transformers = importlib.import_module('transformers')
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / 'hf')
        assert theirs.encode('the end') == ours.encode('the end', special=True)
        assert transformers.AutoConfig.from_pretrained(tmp_path / 'hf').vocab_size == 70_016


def test_checkpoints_to_keep_must_be_among_those_that_are_saved(store, tmp_path):
    with pytest.raises(errors.UsageError, match='keep_every_steps: 8 is not a multiple of .* = 5.*; set it to 10'):
        train.train(_config(store, keep_every_steps=8), tmp_path)


def test_a_batch_that_does_not_divide_over_the_mesh_names_the_field(store, tmp_path):
    with pytest.raises(errors.UsageError, match='global_batch_size: 8 is not a multiple of .* 8 x 8'):
        train.train(_config(store, micro_batch_size=8), tmp_path)
