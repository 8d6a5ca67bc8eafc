"""Shared by the GPU benchmarks: phases in their own processes, alternating timing, errors, JSON and Markdown.

A benchmark is a module with `PHASES`, {name: function of a Setting that returns its results}. On a GPU each phase
runs in its own process, so a phase that breaks the GPU's context, or dies, does not stop the others.
Results are plain dictionaries: `rows` becomes a table, and sentences in `failures` fail the run.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from tinyllama_jax import config as config_lib
from tinyllama_jax import ops as ops_lib
from tinyllama_jax.process import versions

ROOT = pathlib.Path(__file__).resolve().parents[2]
_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'triton', 'jax-triton', 'torch', 'transformers')
_ERROR_CHARACTERS = 2_000
_SHORTEST = 30  # a phase is not begun with fewer seconds left than this
_HASTY = '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true'
_SMALL = config_lib.ModelConfig(
    vocab_size=256,
    seq_len=32,
    num_layers=1,
    embed_dim=64,
    num_heads=2,
    num_kv_heads=1,
    head_dim=64,
    hidden_dim=128,
    compute_dtype='bfloat16',
)


class Skipped(Exception):
    """A phase cannot run here; the message says why. Not a failure."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """Whether this is the smoke run on a CPU, and a folder for temporary files."""

    smoke: bool
    work: pathlib.Path

    @property
    def kernels(self) -> str:
        """The name of our implementation: triton, or interpret on a CPU."""
        return 'interpret' if self.smoke else 'triton'

    @property
    def chip(self) -> str | None:
        """The first device's compute capability, as sm_90; None for a CPU."""
        return ops_lib.chip_of(jax.devices()[0])

    @property
    def model(self) -> config_lib.ModelConfig:
        """TinyLlama 1.1 B in bfloat16, its layers unrolled; a layer of a few thousand parameters in the smoke run."""
        return _SMALL if self.smoke else config_lib.ModelConfig(compute_dtype='bfloat16', scan_layers=False)

    @property
    def batch(self) -> int:
        """Sequences a step."""
        return 1 if self.smoke else 8

    def config(
        self, impl: str | None = None, *, remat: str = 'none', attention: str | None = None
    ) -> config_lib.Config:
        """Returns a run of `model` at a constant learning rate. Every op runs `impl`, attention runs `attention`."""
        kernels = ops_lib.every_op(impl or self.kernels)
        return config_lib.validated(
            config_lib.Config(
                model=self.model,
                kernels=dataclasses.replace(kernels, attention=attention or kernels.attention),
                optimizer=config_lib.OptimizerConfig(warmup_steps=0, peak_learning_rate=1e-4, final_learning_rate=1e-4),
                train=config_lib.TrainConfig(
                    num_steps=1_000, global_batch_size=self.batch, micro_batch_size=self.batch, remat=remat
                ),
            )
        )


def in_turns(calls: dict[Any, Callable[[], Any]], *, repeats: int, count: int) -> dict[Any, list[float]]:
    """Returns seconds per call of each of `calls`: one figure per turn, `repeats` turns of `count` calls.

    Turns alternate their order, after one warm-up call each. A call starts its work; a turn waits once, at its end.
    """
    for call in calls.values():
        wait(call())
    seconds = {name: [] for name in calls}
    for repeat in range(repeats):
        for name in list(calls)[:: 1 if repeat % 2 else -1]:
            start = time.perf_counter()
            for _ in range(count):
                result = calls[name]()
            wait(result)
            seconds[name].append((time.perf_counter() - start) / count)
    return seconds


def medians(calls: dict[Any, Callable[[], Any]], *, repeats: int, count: int) -> dict[Any, float]:
    """Returns the median seconds per call, measured by `in_turns`."""
    return {name: statistics.median(each) for name, each in in_turns(calls, repeats=repeats, count=count).items()}


def wait(result) -> None:
    """Waits until the JAX or torch arrays in `result` are computed."""
    jax.block_until_ready(result)  # takes torch's tensors for constants
    torch = sys.modules.get('torch')
    if torch and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def relative_error(actual, wanted) -> float:
    """Returns the norm of the difference, relative to the norm of `wanted`, in float32."""
    return float(_relative_error(actual, wanted))


@jax.jit
def _relative_error(actual, wanted):
    actual, wanted = actual.astype(jnp.float32), wanted.astype(jnp.float32)
    return jnp.linalg.norm((actual - wanted).ravel()) / jnp.maximum(jnp.linalg.norm(wanted.ravel()), 1e-30)


def peak_bytes() -> int | None:
    """Returns the peak device memory of this process so far; None on CPUs, which do not count it."""
    return (jax.devices()[0].memory_stats() or {}).get('peak_bytes_in_use')


def compiler_memory(compiled) -> dict[str, int | None]:
    """Returns the memory that the compiler plans: temporary buffers, and the peak with arguments and results."""
    analysis = compiled.memory_analysis()
    names = {'temporary_bytes': 'temp_size_in_bytes', 'predicted_peak_bytes': 'peak_memory_in_bytes'}
    return {ours: getattr(analysis, theirs, None) for ours, theirs in names.items()}


def package_versions() -> dict[str, str | None]:
    """Returns the versions of Python, the driver and the packages that decide the figures; None if missing."""
    installed: dict[str, str | None] = {'python': sys.version.split()[0], 'driver': _driver()}
    for name in _PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed[name] = None
    return installed


def _driver() -> str | None:
    command = ('nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader')
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split('\n')[0]
    except (OSError, subprocess.SubprocessError):
        return None


def device(setting: Setting) -> dict[str, Any]:
    """Describes the device. Raises RuntimeError without a GPU, except in the smoke run."""
    first = jax.devices()[0]
    if not (setting.smoke or setting.chip):
        raise RuntimeError(f'JAX finds no GPU, only {first.device_kind!r}; --smoke runs the same code on a CPU')
    limit = (first.memory_stats() or {}).get('bytes_limit')
    return {'kind': first.device_kind, 'chip': setting.chip, 'bytes_limit': limit}


def outcome(function: Callable[[Setting], dict], setting: Setting) -> dict[str, Any]:
    """Runs a phase; returns its status (ok, failed, skipped), seconds, error and results."""
    start, results, error = time.perf_counter(), {}, None
    try:
        results = function(setting)
        status = 'failed' if results.get('failures') else 'ok'
    except Skipped as reason:
        status, error = 'skipped', str(reason)
    except Exception as failure:  # the other phases still run
        traceback.print_exc()
        status, error = 'failed', f'{type(failure).__name__}: {failure}'[:_ERROR_CHARACTERS]
    return {'status': status, 'seconds': round(time.perf_counter() - start, 1), 'error': error, 'results': results}


def in_process(module: str, phase: str, setting: Setting, *, limit_s: float, env: dict[str, str] | None = None) -> dict:
    """Runs a phase of `module` in a new process, killed after `limit_s` seconds; returns its outcome."""
    file = setting.work / f'{phase}.outcome.json'
    file.unlink(missing_ok=True)
    command = [sys.executable, '-P', '-m', module, f'--phase={phase}', f'--work={setting.work}']
    path = filter(None, (str(ROOT), os.environ.get('PYTHONPATH')))
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join(path), **(env or {})}
    start = time.perf_counter()
    status = _status(command + ['--smoke'] * setting.smoke, environment, limit_s)
    if file.exists():
        return json.loads(file.read_text())
    error = f'the process of {phase} ended with status {status} and no result'
    if status is None:
        error = f'{phase} took longer than {limit_s:.0f} s and was killed'
    return {'status': 'failed', 'seconds': round(time.perf_counter() - start, 1), 'error': error, 'results': {}}


def _status(command: list[str], env: dict[str, str], limit_s: float) -> int | None:
    """Runs a command; returns its exit status, or None if it timed out and was killed with its child processes."""
    nested = 'TINYLLAMA_BENCH_PHASE' in env  # a phase's own processes stay in its group, and end with it
    env = {**env, 'TINYLLAMA_BENCH_PHASE': '1'}
    process = subprocess.Popen(command, env=env, start_new_session=not nested)
    try:
        return process.wait(limit_s)
    except BaseException as error:
        if nested:
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            return None
        raise


def parsed(module: str, doc: str, phases, arguments=None) -> argparse.Namespace:
    """Parses the flags of every GPU benchmark."""
    parser = argparse.ArgumentParser(prog=module, description=doc.splitlines()[0])
    parser.add_argument('results', nargs='?', type=pathlib.Path, help='a folder; default: bench/results/CHIP')
    parser.add_argument('--smoke', action='store_true', help='tiny sizes on a CPU, to check the code; no figures')
    parser.add_argument(
        '--only',
        type=lambda names: names.split(','),
        default=list(phases),
        metavar='PHASE,...',
        help='of ' + ', '.join(phases),
    )
    parser.add_argument('--limit', type=float, default=530, help='seconds that all phases may take')
    parser.add_argument('--phase', help=argparse.SUPPRESS)  # the process of one phase
    parser.add_argument('--work', type=pathlib.Path, help=argparse.SUPPRESS)
    flags = parser.parse_args(arguments)
    unknown = sorted(set(flags.only) - set(phases))
    if unknown:
        parser.error(f'--only: there is no phase {unknown[0]!r}, only {", ".join(phases)}')
    return flags


def run(module: str, doc: str, phases: dict, *, name: str, hidden: dict | None = None, arguments=None) -> int:
    """Runs a benchmark's phases, writes NAME.json and NAME.md, and returns the exit status.

    Phases start the `hidden` phases in processes of their own.
    """
    flags = parsed(module, doc, phases, arguments)
    flags.deadline = time.perf_counter() + flags.limit
    if flags.smoke:
        _set_up_smoke()
    if flags.phase:
        setting = Setting(flags.smoke, flags.work)
        functions = {'device': device, **phases, **(hidden or {})}
        result = outcome(functions[flags.phase], setting)
        (flags.work / f'{flags.phase}.outcome.json').write_text(json.dumps(result))
        return 0
    with tempfile.TemporaryDirectory(prefix='tinyllama-bench-') as work:
        os.environ.setdefault('XLA_PYTHON_CLIENT_MEM_FRACTION', '0.9')
        _share_compiled(pathlib.Path(work) / 'compiled')
        setting = Setting(flags.smoke, pathlib.Path(work))
        first = outcome(device, setting) if flags.smoke else in_process(module, 'device', setting, limit_s=120)
        if first['status'] != 'ok':
            print(f'{name}: {first["error"]}', file=sys.stderr)
            return 2
        return _run_all(module, phases, setting, flags, name, first['results'])


def _set_up_smoke() -> None:
    """Chooses the CPU and fast compilation: compiling takes most of a smoke run."""
    jax.config.update('jax_platforms', 'cpu')
    os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {_HASTY}'.strip()


def _share_compiled(folder: pathlib.Path) -> None:
    """Shares compiled programs between phases, so that both processes of a resume run the same program."""
    os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(folder))
    os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.2')
    jax.config.update('jax_compilation_cache_dir', os.environ['JAX_COMPILATION_CACHE_DIR'])  # this process's own
    seconds = float(os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'])
    jax.config.update('jax_persistent_cache_min_compile_time_secs', seconds)


def _run_all(module: str, phases: dict, setting: Setting, flags, name: str, about: dict) -> int:
    folder = flags.results or _default_folder(setting, about)
    result = {'benchmark': name, 'smoke': setting.smoke, 'device': about, 'versions': package_versions()}
    result |= {'commit': versions.commit(), 'phases': {}}
    for phase, phase_result in _outcomes(module, phases, setting, flags):
        result['phases'][phase] = phase_result
        status, seconds, error = (phase_result[key] for key in ('status', 'seconds', 'error'))
        print(f'== {phase}: {status} in {seconds:.0f} s', error or '', flush=True)
        for row in phase_result['results'].get('rows', ()):
            print('   ', ', '.join(f'{key} {shown(value)}' for key, value in row.items() if value is not None))
        write(result, folder, name)
    print(f'written: {folder / f"{name}.json"} and {name}.md')
    for failure in result['failures']:
        print(f'FAILED: {failure}', file=sys.stderr)
    return 1 if result['failures'] else 0


def _outcomes(module: str, phases: dict, setting: Setting, flags) -> Iterator[tuple[str, dict]]:
    """Runs the phases; yields each one's name and outcome."""
    for phase in flags.only:
        left = flags.deadline - time.perf_counter()
        print(f'== {phase} ({max(left, 0):.0f} s of {flags.limit:.0f} left)', flush=True)
        if left <= _SHORTEST:
            error = f'the {flags.limit:.0f} s were over; run it with --only={phase}'
            yield phase, {'status': 'skipped', 'seconds': 0.0, 'error': error, 'results': {}}
        elif setting.smoke:
            yield phase, outcome(phases[phase], setting)
        else:
            yield phase, in_process(module, phase, setting, limit_s=left)


def _default_folder(setting: Setting, about: dict) -> pathlib.Path:
    if setting.smoke:
        return pathlib.Path(tempfile.mkdtemp(prefix='tinyllama-bench-smoke-'))
    commit = (versions.commit() or 'unknown')[:7]
    return ROOT / 'bench/results' / about['kind'].replace(' ', '-').lower() / commit


def failures_of(result: dict) -> list[str]:
    """Returns a sentence for each failure of a run."""
    failures = []
    for phase, phase_result in result['phases'].items():
        failures += [f'{phase}: {failure}' for failure in phase_result['results'].get('failures', ())]
        if phase_result['status'] == 'failed' and phase_result['error']:
            failures.append(f'{phase}: {phase_result["error"]}')
    return failures


def write(result: dict, folder: pathlib.Path, name: str) -> None:
    """Writes NAME.json and NAME.md, with all failures, into `folder`."""
    result['failures'] = failures_of(result)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f'{name}.json').write_text(json.dumps(result, indent=1) + '\n')
    (folder / f'{name}.md').write_text(markdown(result))


def markdown(result: dict) -> str:
    """Formats a result as Markdown: the device, the versions, and a table for each phase."""
    known = ', '.join(f'{name} {version}' for name, version in result['versions'].items() if version)
    lines = [f'# {result["benchmark"]} on {result["device"]["kind"]}', '', f'{known}; commit {result["commit"]}.', '']
    if result['smoke']:
        lines += ['A smoke run on a CPU: it shows that the code runs, and its times mean nothing.', '']
    lines += [f'- FAILED: {failure}' for failure in result['failures']]
    for phase, phase_result in result['phases'].items():
        lines += ['', f'## {phase}: {phase_result["status"]} in {phase_result["seconds"]:.0f} s', '']
        if phase_result['error']:
            lines += [phase_result['error'], '']
        scalars = {key: value for key, value in phase_result['results'].items() if isinstance(value, int | float | str)}
        lines += [f'- {key}: {shown(value)}' for key, value in scalars.items()]
        lines += ['', *_table(phase_result['results'].get('rows', []))]
    return '\n'.join(lines).rstrip() + '\n'


def _table(rows: list[dict]) -> list[str]:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    if not columns:
        return []
    body = ['| ' + ' | '.join(shown(row.get(key)) for key in columns) + ' |' for row in rows]
    return ['| ' + ' | '.join(columns) + ' |', '|' + '---|' * len(columns), *body]


def shown(value) -> str:
    """Formats a figure to four digits; None as an empty cell."""
    if isinstance(value, float):
        return f'{value:.4g}' if abs(value) < 10_000 else f'{value:.0f}'
    return '' if value is None else str(value).replace('|', '/').replace('\n', ' ')
