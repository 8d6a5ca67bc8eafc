"""Fixes the world the tests run in, for this process and those it starts.

8 CPU devices, no network, caches in a folder of this run instead of the home folder. The folder also keeps what XLA
has compiled: compiling is most of the tests' time, and many tests and processes compile the same small programs.
"""

import atexit
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile

import pytest

ROOT = pathlib.Path(__file__).parent.parent
DEVICES = '--xla_force_host_platform_device_count'

# Started in the background by a shell, the tests would ignore Ctrl-C, and so would the processes that they interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# All of this must be set before jax and the Hugging Face libraries are imported.
os.environ['JAX_PLATFORMS'] = 'cpu'
# XLA compiles twice as fast without optimization. The commands that tests start have it too, and find the programs
# compiled; those of tests/demo keep what XLA itself chooses, as a user's do.
OPTIMIZATION = '--xla_backend_optimization_level=0'
os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {DEVICES}=8 {OPTIMIZATION}'.strip()
os.environ['JAX_NUMPY_DTYPE_PROMOTION'] = 'strict'  # a bfloat16 plus a float32 is an error, not a silent float32
os.environ['JAX_NUMPY_RANK_PROMOTION'] = 'raise'  # so is a [D] added to a [B, T, D] by mistake
os.environ['HF_HUB_OFFLINE'] = '1'
os.environ['HF_DATASETS_OFFLINE'] = '1'
if 'TEST_CACHES' not in os.environ:  # the first process of a run makes it, pytest-xdist's workers share it
    os.environ['TEST_CACHES'] = tempfile.mkdtemp(prefix='tinyllama-tests-')
    atexit.register(shutil.rmtree, os.environ['TEST_CACHES'], ignore_errors=True)
CACHES = os.environ['TEST_CACHES']
os.environ['HF_HOME'] = f'{CACHES}/huggingface'
os.environ['JAX_COMPILATION_CACHE_DIR'] = f'{CACHES}/jax'
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.2'
os.environ['TOKENIZERS_PARALLELISM'] = 'false'


# The files that take longest begin first, so that both processes end together.
_LONGEST = (
    'tinyllama_jax/cluster/members', 'kernels/resources', 'tinyllama_jax/train', 'bench/gpu', 'demo/run',
    'tinyllama_jax/plan/compile', 'tinyllama_jax/plan/command', 'tinyllama_jax/cluster/watchdog',
    'tinyllama_jax/sharding', 'kernels/attention', 'tinyllama_jax/checkpoint', 'eval_bridge/hf/convert', 'main',
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """Orders the tests by `_LONGEST`."""
    rank = {ROOT / f'tests/{name}_test.py': number for number, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))


@pytest.fixture(scope='session')
def test_data_dir() -> pathlib.Path:
    """The folder with the larger real corpora; skips the test where TEST_DATA_DIR does not name one."""
    if not os.environ.get('TEST_DATA_DIR'):
        pytest.skip('TEST_DATA_DIR, the folder of the larger real corpora, is not set')
    return pathlib.Path(os.environ['TEST_DATA_DIR'])


def _run_main(*arguments, devices: int = 1, timeout: float = 300) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, 'main.py', *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, 'XLA_FLAGS': f'{DEVICES}={devices} {OPTIMIZATION}'},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.fixture(scope='session')
def run_main():
    """run_main('train', '--workdir=...', devices=1): main.py as a user runs it; a CompletedProcess with its text."""
    return _run_main


@pytest.fixture(scope='session')
def tiny_store(tmp_path_factory) -> pathlib.Path:
    """A prepared store of tests/support/tiny_experiment.py, which finds its corpus by $CORPUS."""
    from tests.support import tiny, tiny_experiment
    from tinyllama_jax.data import prepare

    folder = tmp_path_factory.mktemp('tiny')
    tiny.write_corpus(folder / 'corpus')
    os.environ['CORPUS'] = str(folder / 'corpus')
    prepare.prepare(tiny_experiment.get_config().data, folder / 'store')
    return folder / 'store'
