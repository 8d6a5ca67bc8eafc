"""Sets up JAX and XLA for a process: platform, flags, memory, compilation cache; and malloc."""

import ctypes
import os
import pathlib
import platform

from tinyllama_jax import errors

_NVIDIA_DEVICES = ('/dev/nvidiactl', '/dev/dxg')  # Linux, and Linux in Windows
_AMD_DEVICE = '/dev/kfd'
# glibc's mallopt: never allocate by mmap, never return memory, one arena for all threads.
_MALLOC_OPTIONS = ((-4, 0), (-1, 2_000_000_000), (-8, 1))
# For GPUs, unless XLA_FLAGS sets them; both supported versions of jaxlib know each.
GPU_XLA_FLAGS = {
    'xla_gpu_enable_latency_hiding_scheduler': 'true',  # overlaps collectives with matmuls
    # With it XLA 0.11.2 computes a matmul twice if its result is both saved and used: a sixth more FLOPs by plan.
    'xla_gpu_enable_dynamic_slice_fusion': 'false',
    'xla_gpu_all_gather_combine_threshold_bytes': str(128 << 20),  # one all-gather a layer: 88 MB in bfloat16
    'xla_gpu_reduce_scatter_combine_threshold_bytes': str(128 << 20),
    'xla_gpu_all_reduce_combine_threshold_bytes': str(128 << 20),
}
_DETERMINISTIC_XLA_FLAGS = {'xla_gpu_exclude_nondeterministic_ops': 'true'}
_GPU_ENVIRONMENT = {'XLA_PYTHON_CLIENT_MEM_FRACTION': '0.9', 'NCCL_NVLS_ENABLE': '1'}


def set_up_jax(*, deterministic: bool = False, compiled: pathlib.Path | None = None) -> None:
    """Chooses the platform and tunes for it; call it before JAX is imported. Settings of the environment win.

    Without an NVIDIA device it sets JAX_PLATFORMS=cpu, which keeps an installed CUDA plugin quiet. Each step on a CPU
    allocates hundreds of megabytes; memory that malloc keeps costs no page faults (a tenth of the demo's time).

    Args:
      deterministic: on GPUs, use only operations with a fixed order of summation.
      compiled: cache folder for compiled programs, and with them the choices of autotuning on these GPUs.

    Raises UsageError if JAX_PLATFORMS asks for GPUs that are not there.
    """
    if any(os.path.exists(device) for device in _NVIDIA_DEVICES):
        flags = [f'--{name}={value}' for name, value in gpu_xla_flags(deterministic=deterministic).items()]
        os.environ['XLA_FLAGS'] = ' '.join([*os.environ.get('XLA_FLAGS', '').split(), *flags])
        for name, value in _GPU_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        if compiled:
            os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(compiled.absolute()))
    else:
        platforms = os.environ.setdefault('JAX_PLATFORMS', 'cpu')
        if {'cuda', 'gpu'} & set(platforms.split(',')) and not os.path.exists(_AMD_DEVICE):
            raise errors.usage(
                f'JAX_PLATFORMS={platforms}', 'this machine shows no NVIDIA device; unset it, or set cpu'
            )
    if platform.libc_ver()[0] == 'glibc':
        for option, value in _MALLOC_OPTIONS:
            ctypes.CDLL(None).mallopt(option, value)


def gpu_xla_flags(*, deterministic: bool) -> dict[str, str]:
    """Returns the XLA flags for GPUs (name: value) that XLA_FLAGS does not set yet."""
    flags = GPU_XLA_FLAGS | (_DETERMINISTIC_XLA_FLAGS if deterministic else {})
    given = {flag.lstrip('-').partition('=')[0] for flag in os.environ.get('XLA_FLAGS', '').split()}
    return {name: value for name, value in flags.items() if name not in given}


def memory_fraction() -> float:
    """Returns the share of a GPU's memory that JAX takes, by the environment. Raises UsageError if it is invalid."""
    name = 'XLA_PYTHON_CLIENT_MEM_FRACTION'
    text = os.environ.get(name) or _GPU_ENVIRONMENT[name]
    try:
        fraction = float(text)
    except ValueError:
        fraction = 0.0
    if not 0 < fraction <= 1:
        raise errors.usage(f'{name}={text}', "give the share of a GPU's memory that is for JAX, as 0.9")
    return fraction


def gpu_settings() -> str:
    """Returns one line with the environment's settings for GPUs, the user's and those of `set_up_jax`."""
    names = ('XLA_FLAGS', *_GPU_ENVIRONMENT, 'JAX_COMPILATION_CACHE_DIR')
    return 'environment: ' + ' '.join(f'{name}={os.environ[name]!r}' for name in names if name in os.environ)
