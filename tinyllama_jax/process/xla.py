"""JAX's and XLA's settings for a process: platform, flags, memory, compilation cache; malloc's options."""

import ctypes
import os
import pathlib
import platform

from tinyllama_jax import errors

_NVIDIA_DEVICES = ('/dev/nvidiactl', '/dev/dxg')  # Linux, and Linux in Windows
# glibc's mallopt: never take memory by mmap, never give it back, one arena for all threads.
_MALLOC_OPTIONS = ((-4, 0), (-1, 2_000_000_000), (-8, 1))
# For GPUs, unless XLA_FLAGS says otherwise; each is known to both versions of jaxlib.
GPU_XLA_FLAGS = {
    'xla_gpu_enable_latency_hiding_scheduler': 'true',  # collectives run beside matrix products
    # XLA 0.11.2 computes a product twice whose result is saved and used (plan counts its FLOPs: a sixth more).
    'xla_gpu_enable_dynamic_slice_fusion': 'false',
    'xla_gpu_all_gather_combine_threshold_bytes': str(128 << 20),  # a layer's weights at once: 88 MB in bfloat16
    'xla_gpu_reduce_scatter_combine_threshold_bytes': str(128 << 20),
    'xla_gpu_all_reduce_combine_threshold_bytes': str(128 << 20),
}
_DETERMINISTIC_XLA_FLAGS = {'xla_gpu_exclude_nondeterministic_ops': 'true'}
_GPU_ENVIRONMENT = {'XLA_PYTHON_CLIENT_MEM_FRACTION': '0.9', 'NCCL_NVLS_ENABLE': '1'}


def set_up_jax(*, deterministic: bool = False, compiled: pathlib.Path | None = None) -> None:
    """Chooses the platform and tunes for it; to be called before JAX is imported. The environment's own settings win.

    Without an NVIDIA device JAX is told so, which keeps an installed CUDA plugin quiet. Each step on
    a CPU allocates hundreds of megabytes anew; kept by malloc, they cost no page faults (a tenth of the demo's time).

    Args:
      deterministic: on GPUs, leave out operations whose sums come in any order.
      compiled: where compiled programs are kept, and with them what autotuning chose on these GPUs.
    """
    if any(os.path.exists(device) for device in _NVIDIA_DEVICES):
        _set_up_gpus(gpu_xla_flags(deterministic=deterministic), compiled)
    else:
        os.environ.setdefault('JAX_PLATFORMS', 'cpu')
    if platform.libc_ver()[0] == 'glibc':
        for option, value in _MALLOC_OPTIONS:
            ctypes.CDLL(None).mallopt(option, value)


def gpu_xla_flags(*, deterministic: bool) -> dict[str, str]:
    """What XLA is told on GPUs beside what XLA_FLAGS says already, by the name of the flag."""
    flags = GPU_XLA_FLAGS | (_DETERMINISTIC_XLA_FLAGS if deterministic else {})
    given = {flag.lstrip('-').partition('=')[0] for flag in os.environ.get('XLA_FLAGS', '').split()}
    return {name: value for name, value in flags.items() if name not in given}


def memory_fraction() -> float:
    """The share of a GPU's memory that JAX takes, as the environment says. Raises UsageError for what is no share."""
    name = 'XLA_PYTHON_CLIENT_MEM_FRACTION'
    text = os.environ.get(name) or _GPU_ENVIRONMENT[name]
    try:
        fraction = float(text)
    except ValueError:
        fraction = 0.0
    if not 0 < fraction <= 1:
        raise errors.usage(f'{name}={text}', "give the share of a GPU's memory that is for JAX, as 0.9")
    return fraction


def _set_up_gpus(flags: dict[str, str], compiled: pathlib.Path | None) -> None:
    given = os.environ.get('XLA_FLAGS', '').split()
    os.environ['XLA_FLAGS'] = ' '.join([*given, *(f'--{name}={value}' for name, value in flags.items())])
    for name, value in _GPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if compiled:
        os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(compiled.absolute()))


def gpu_settings() -> str:
    """One line with the environment's settings for GPUs, as `set_up_jax` and the user left them."""
    names = ('XLA_FLAGS', *_GPU_ENVIRONMENT, 'JAX_COMPILATION_CACHE_DIR')
    return 'environment: ' + ' '.join(f'{name}={os.environ[name]!r}' for name in names if name in os.environ)
