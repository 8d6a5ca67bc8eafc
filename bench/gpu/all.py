"""Benchmarks kernels, the loss, the train step and an exact resume of TinyLlama 1.1 B on one GPU.

    bench/gpu.sh [all] [RESULTS] [--only=PHASE,...] [--smoke]

docs/gpu_benchmarks.md says what each phase does. Ends with 1 if numerics are wrong or a phase broke.
"""

import sys

import jax

from bench.gpu import attention as gpu_attention
from bench.gpu import benchmark
from bench.gpu import ops as gpu_ops
from bench.gpu import step as gpu_step
from tinyllama_jax import ops as ops_lib
from tinyllama_jax import sharding
from tinyllama_jax.run import selftest


def self_test(setting: benchmark.Setting) -> dict:
    """Compares every kernel with plain JAX at the run's shapes; in the smoke run only attention."""
    config = gpu_step.train_config(setting)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    ops = ops_lib.for_run(config, mesh)
    errors = selftest.check_kernels(config, ops)
    return {'ops': ops.table(), 'rows': [{'op': op, 'error': error} for op, error in errors.items()]}


PHASES = {
    'self_test': self_test,
    'attention': gpu_attention.attention,
    'streaming': gpu_ops.streaming,
    'cross_entropy': gpu_ops.cross_entropy,
    'step': gpu_step.step,
    'resume': gpu_step.resume,
    'sweep': gpu_attention.sweep,
    'sweep_streaming': gpu_ops.sweep_streaming,
    'unrolled': gpu_step.unrolled,
}
_HIDDEN = {'resume_first': gpu_step.resume_first, 'resume_second': gpu_step.resume_second}


def main(arguments=None) -> int:
    """Runs the command; returns its exit status."""
    return benchmark.run('bench.gpu.all', __doc__, PHASES, name='gpu', hidden=_HIDDEN, arguments=arguments)


if __name__ == '__main__':
    sys.exit(main())
