"""The GPUs that `plan` knows: how XLA describes each and how fast it is, with the source of every figure.

A new GPU is a row in `TARGETS`; a new chip is also a row in kernels/chips.py, which has the peaks.

[xla]     XLA's descriptions of these GPUs (openxla/xla, xla/backends/gpu/target_config/specs)
[sheet]   NVIDIA's data sheets of A100, H100, H200; NVLink is half the total, which counts both directions
[dgx]     NVIDIA's DGX A100 and H100: one adapter of 200 and 400 Gb/s a GPU
[matmul]  the fastest bf16 product measured (Bekman, ML Engineering, compute/accelerator): on A100 the "maximum
          achievable"; on H200, whose power limit slows long runs down, the "maximum sustainable". H100: the same chip
[triton]  Triton's tutorial 06 as published, run on an A100: 32 heads of 64, T 2,048, causal
[fa3]     the charts of FlashAttention-3 (Shah et al., 2024): H100, heads of 64, T 2,048; forward Triton's, causal;
          backward FlashAttention-2's 264 TFLOP/s without a mask, times 0.78 for a causal one at that length (96.5 of
          124.8 on an RTX 4090, apache/tvm tl_doc/flash_perf.md; 231 of 293 in Triton's tutorial on a B200)

No source as complete is known for heads of 128: they take the rates of 64.
"""

import dataclasses

from tinyllama_jax import errors, flops

# The shares of a data sheet's bandwidth that the best programs reach: kernels 0.9 of the memory's (NVIDIA's developer
# forum, topic 339083), nccl-tests 230 of NVLink's 300 GB/s on A100 and 340 of 450 on H100 (NVIDIA/nccl issues 583,
# 1218) and 96 of a network's 100 GB/s (NVIDIA/nccl-tests issue 119).
MEMORY_SHARE, NVLINK_SHARE, NETWORK_SHARE = 0.9, 0.76, 0.96
# NCCL takes a multiprocessor for each of its blocks, which other kernels cannot share (NVIDIA/nccl issue 689): two for
# each NVLink (issue 1703) or adapter (issue 689: 16 on a DGX of 8), at most 32 (issue 1429).
CHANNELS_PER_LINK, MOST_CHANNELS = 2, 32
# Seconds between kernels of a stream: 3.8 us for kernels of 2.9 us (NVIDIA, Getting Started with CUDA Graphs).
KERNEL_GAP = 0.9e-6


@dataclasses.dataclass(frozen=True)
class Target:
    """A kind of GPU to plan for. Rates and bandwidths are per second; bandwidths are for one direction."""

    device_name: str
    compute_capability: tuple[int, int]
    memory_bytes: int  # [xla]
    memory_bandwidth: float  # [sheet]
    matmul_flops: float  # [matmul]
    attention_flops: tuple[float, float]  # forward, backward; a backward pass counts 2.5 times the forward's FLOPs
    nvlink_bandwidth: float  # [sheet]
    nvlinks: int  # [sheet]
    network_bandwidth: float  # [dgx] of one GPU's adapter, between nodes
    description: dict[str, float | int]  # [xla] further properties that XLA's compiler reads

    @property
    def peak_flops(self) -> float:
        """Dense bf16 FLOP/s [sheet]. Raises ValueError if kernels/chips.py has no peak for the GPU."""
        if peak := flops.peak_flops(self.device_name):
            return peak
        raise ValueError(f'{self.device_name} has no peak_flops in kernels/chips.py')

    @property
    def multiprocessors(self) -> int:
        """The number of multiprocessors."""
        return int(self.description['core_count'])


_A100 = {
    'core_count': 108,
    'fpus_per_core': 64,
    'clock_rate_ghz': 1.41,
    'l2_cache_size': 41_943_040,
    'shared_memory_per_core': 167_936,
    'shared_memory_per_block_optin': 166_912,
}
_H100 = {
    'core_count': 132,
    'fpus_per_core': 128,
    'clock_rate_ghz': 1.98,
    'l2_cache_size': 52_428_800,
    'shared_memory_per_core': 233_472,
    'shared_memory_per_block_optin': 232_448,
}
_A100_ATTENTION = (136e12, 76e12)  # [triton]
_H100_ATTENTION = (342e12, 206e12)  # [fa3]

TARGETS = {
    'a100-40gb': Target(
        'NVIDIA A100-SXM4-40GB', (8, 0), 42_331_013_120, 1_555e9, 271.2e12, _A100_ATTENTION, 300e9, 12, 25e9, _A100
    ),
    'a100-80gb': Target(
        'NVIDIA A100-SXM4-80GB', (8, 0), 85_100_068_864, 2_039e9, 271.2e12, _A100_ATTENTION, 300e9, 12, 25e9, _A100
    ),
    'h100-80gb': Target(
        'NVIDIA H100 80GB HBM3', (9, 0), 84_942_979_072, 3_352e9, 755e12, _H100_ATTENTION, 450e9, 18, 50e9, _H100
    ),
    'h200-141gb': Target(
        'NVIDIA H200 141GB HBM3e', (9, 0), 151_397_597_184, 4_800e9, 755e12, _H100_ATTENTION, 450e9, 18, 50e9, _H100
    ),
}


def find(name: str | None) -> Target:
    """Returns the target of that name in `TARGETS`; raises UsageError for another name."""
    if name not in TARGETS:
        raise errors.usage(f'--target={name or ""}', f'choose one of {", ".join(TARGETS)}')
    return TARGETS[name]


def xla_description(target: Target) -> str:
    """Returns the GPU as XLA's compiler reads it: a GpuTargetConfigProto in text form."""
    major, minor = target.compute_capability
    features = 'ACCELERATED_FEATURES' if major >= 9 else 'NONE'
    own = ''.join(f'  {name}: {value}\n' for name, value in target.description.items())
    size, bandwidth = target.memory_bytes, int(target.memory_bandwidth)
    versions = {'major': major, 'minor': minor, 'features': features}
    return _DESCRIPTION.format(name=target.device_name, memory=size, bandwidth=bandwidth, own=own, **versions)


# The properties that these GPUs share, with versions of CUDA that both stacks of requirements.txt know.
_DESCRIPTION = """gpu_device_info {{
{own}  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  memory_bandwidth: {bandwidth}
  device_memory_size: {memory}
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {features} }}
  device_vendor: "NVIDIA Corporation"
  name: "{name}"
  driver_version: "13.0.0"
  runtime_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
runtime_version {{ major: 12 minor: 8 patch: 0 }}
device_description_str: "{name}"
"""
