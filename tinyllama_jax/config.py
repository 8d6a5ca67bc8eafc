"""Every setting of a run: dataclasses and their validation.

The way of a setting: `configs/x.py:get_config` builds a `Config`, experiment.py
applies `--config.model.num_kv_heads=2`, `validated` checks the whole, and
everything below receives plain frozen dataclasses. Nothing here imports jax.
"""

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from tinyllama_jax import errors


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The Llama's shape (paper, section 2.2) and how it is computed."""

    vocab_size: int = 32_000
    seq_len: int = 2_048  # tokens a row feeds the model; rows hold one more
    num_layers: int = 22
    embed_dim: int = 2_048
    num_heads: int = 32
    num_kv_heads: int = 4
    head_dim: int = 64
    hidden_dim: int = 5_632  # SwiGLU's inner width
    norm_eps: float = 1e-5
    rope_base: float = 10_000.0
    rope_scaling: float = 1.0  # linear interpolation: positions are divided by this
    init: str = 'normal'  # normal: std 0.02, residual outputs / sqrt(2 L); original: the original code's
    compute_dtype: str | None = None  # bfloat16 or float32; none: bfloat16 on GPUs, float32 on CPUs
    # One compiled layer, scanned; false unrolls: slower to compile, 15 % faster on an H100 (docs/kernels.md) and CPUs
    scan_layers: bool = True


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One named corpus and its share of the mixture."""

    path: str | None = None  # a folder (or one file); train/, validation/, test/ inside are splits
    weight: float = 1.0  # share of rows, relative to the other sources
    format: str = 'auto'  # auto, jsonl (.jsonl, .zst, .gz), parquet, text (every other file)
    text_field: str | None = None  # none: `text` in jsonl, `content` in parquet
    drop_sets: tuple[str, ...] = ('RedPajamaGithub',)  # values of meta.redpajama_set_name left out


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Corpora, tokenizer and the order in which rows are trained on."""

    sources: Mapping[str, SourceConfig] = dataclasses.field(default_factory=dict)
    tokenizer: str | None = None  # a SentencePiece .model file; none: prepare trains one if tokenizer_pieces is set
    tokenizer_pieces: int | None = None  # vocabulary of the tokenizer that prepare trains on the sources
    python_corpus: bool = False  # sources without a path are written from the Python installation (the demo's corpus)
    store: str | None = None  # prepared tokens; none: WORKDIR/store
    bos: bool = False  # put BOS before each document
    eos_per_document: int = 1  # the paper's second fault inserted more than one
    document_mask: bool = False  # tokens see their own document only, not the others packed into their row
    restart_positions: bool = False  # rotary positions count from each document's start in the row; needs document_mask
    shuffle: str = 'rows'  # rows: single rows are permuted afresh each epoch
    holdout_share: float = 0.001  # of the rows of a source without a validation split
    holdout_min_rows: int = 64
    max_bad_share: float = 0.0  # bad input files that prepare tolerates
    workers: int | None = None  # prepare's processes; none: one per core
    prefetch_steps: int = 4  # batches read ahead of the training step

    def store_path(self, workdir: pathlib.Path) -> pathlib.Path:
        """Where the prepared tokens lie."""
        return pathlib.Path(self.store) if self.store else workdir / 'store'


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, clipping and the learning rate (paper, section 2.3). Steps are optimiser steps."""

    schedule: str = 'cosine'  # cosine, or wsd: warmup, stable, linear decay over the last decay_steps
    peak_learning_rate: float = 4e-4
    final_learning_rate: float = 4e-5
    warmup_steps: int = 2_000
    decay_steps: int = 0  # wsd only
    micro_steps_per_step: int = 1  # the original's 8: a step runs at the rate of its last micro-step
    stuck_until_step: int = 0  # the original's fault: before this step the minimum was wrongly the peak
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay: str = 'matrices'  # matrices: all but the norms' scales; all: every parameter, as the original
    clip_norm: float = 1.0


@dataclasses.dataclass(frozen=True)
class KernelConfig:
    """Which implementation runs each op; none: the default for the chip (docs/kernels.md). A name works or is refused.

    xla: plain JAX. triton: our kernels, on A100, H100 and H200. cudnn: NVIDIA's. interpret: the
    Triton kernels interpreted on a CPU, to check them.
    """

    attention: str | None = None  # xla, triton, cudnn, interpret
    rms_norm: str | None = None  # xla, triton, interpret; likewise below
    rope: str | None = None
    swiglu: str | None = None
    cross_entropy: str | None = None
    self_test: bool = True  # before the first step, compare each kernel with plain JAX on the run's mesh and shapes


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; one may be -1 (the rest). Their product is the device count."""

    data: int = 1  # whole copies, whose gradients are added up
    fsdp: int = -1  # splits batch and weights
    tensor: int = 1  # splits heads, feed-forward width and vocabulary
    # ZeRO's stage, along fsdp. 3 (FSDP): parameters, gradients and optimiser state are split, weights gathered layer by
    # layer, forward and backward. 1: a device holds a whole copy of the weights in the compute dtype through a step
    # (2.2 GB in bfloat16 for 1.1 B parameters), gathered once a step: less traffic, the more so with accumulation.
    zero: int = 3


# What each remat policy saves of a layer beside its input: names in model.py (their bytes stand there) and in the
# attention kernels; None: everything. Ordered from the least recomputation, and the most memory, to the most.
REMAT: dict[str, tuple[str, ...] | None] = {
    'none': None,
    'names': ('attention_out', 'attention_lse', 'qkv', 'attended', 'mlp'),
    'attention': ('attention_out', 'attention_lse'),
    'full': (),
}


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The loop: how long, how much at once, what is written when."""

    num_steps: int = 1_430_512
    global_batch_size: int = 1_024  # sequences per optimiser step
    micro_batch_size: int = 8  # sequences per device in one forward pass
    # What the backward pass finds saved, per layer and token of the 1.1 B model in bfloat16 with our kernels. none:
    # 58 KiB, everything. names: 40 KiB; norms and SwiGLU are recomputed. attention: 8 KiB, its output and log-sum-exp;
    # all other ops are recomputed. full: 4 KiB, the layer's input; everything is recomputed, a third more FLOPs.
    remat: str = 'full'
    # Of weights' gradients as they leave their products and are added up between devices; none: the compute dtype.
    # float32 doubles what gradients take and move.
    gradient_dtype: str | None = None
    # On GPUs: no operation whose sums come in any order, and what autotuning chose is kept in WORKDIR/compiled for the
    # next start. On CPUs it is always so.
    deterministic: bool = True
    z_loss: float = 0.0  # weight of the mean squared log-sum-exp of the logits (PaLM: 1e-4); the paper has none
    log_every_steps: int = 10
    eval_every_steps: int = 5_000  # validation loss per source; 0: only at the end
    eval_rows: int = 512  # validation rows per source
    evaluate_tasks: tuple[str, ...] = ()  # lm-eval's tasks that are asked of the model while it trains
    evaluate_every_steps: int = 5_000  # 0: only at the end
    evaluate_limit: int | None = 100  # the first so many examples of each task
    evaluate_include_path: str | None = None  # as evaluate's --include_path
    evaluate_task_data: str | None = None  # as evaluate's --task_data
    checkpoint_every_steps: int = 1_000
    keep_checkpoints: int = 3  # newest ones kept
    keep_every_steps: int | None = None  # checkpoints at multiples of this are kept for ever
    mfu: str = 'C'  # convention of the reported MFU: C (causal), F (full attention), N (all parameters)
    profile_step: int | None = None  # first step of a profiler window
    profile_steps: int = 3
    join_timeout_s: float = 300.0  # for all processes to come to the coordinator
    stuck_timeout_s: float = 40.0  # the others wait so long for one process, and the run ends with 75 (docs/cluster.md)
    hang_timeout_s: float = 1_800.0  # no process goes on for so long: likewise; 0: neither is watched

    def due(self, step: int, every_steps: int) -> bool:
        """Whether what is done every so many steps (0: never) and at the end is to be done at `step`."""
        return step == self.num_steps or bool(every_steps and step % every_steps == 0)


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    kernels: KernelConfig = KernelConfig()
    train: TrainConfig = TrainConfig()
    seed: int = 3_407


def to_dict(config: Any) -> Any:
    """Plain dictionaries, lists and scalars, for JSON."""
    if dataclasses.is_dataclass(config):
        return {field.name: to_dict(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {key: to_dict(value) for key, value in config.items()}
    return list(config) if isinstance(config, tuple) else config


_CHOICES = {
    'model.init': ('normal', 'original'),
    'model.compute_dtype': (None, 'bfloat16', 'float32'),
    'data.shuffle': ('rows',),
    'kernels.attention': (None, 'xla', 'triton', 'cudnn', 'interpret'),
    **dict.fromkeys(
        ('kernels.rms_norm', 'kernels.rope', 'kernels.swiglu', 'kernels.cross_entropy'),
        (None, 'xla', 'triton', 'interpret'),
    ),
    'optimizer.schedule': ('cosine', 'wsd'),
    'optimizer.decay': ('matrices', 'all'),
    'train.remat': tuple(REMAT),
    'train.gradient_dtype': (None, 'bfloat16', 'float32'),
    'mesh.zero': (1, 3),
    'train.mfu': ('C', 'F', 'N'),
}
_SOURCE_FORMATS = ('auto', 'jsonl', 'parquet', 'text')
_MAY_BE_ZERO = {
    'data.eos_per_document', 'data.holdout_share', 'data.holdout_min_rows', 'data.max_bad_share',
    'optimizer.final_learning_rate', 'optimizer.warmup_steps', 'optimizer.decay_steps',
    'optimizer.stuck_until_step', 'optimizer.beta1', 'optimizer.beta2', 'optimizer.weight_decay',
    'train.eval_every_steps', 'train.evaluate_every_steps', 'train.z_loss', 'train.hang_timeout_s', 'seed',
}  # fmt: skip


def validated(config: Config) -> Config:
    """Returns `config`, or raises UsageError naming the first field whose value cannot work."""
    leaves = _leaves(to_dict(config))
    for path, value in leaves.items():
        _check_number(path, value)
    for path, choices in _CHOICES.items():
        if leaves[path] not in choices:
            raise errors.usage(f'config.{path}', f'{leaves[path]!r} is not one of {_listed(choices)}')
    _check_model(config.model)
    _check_data(config.data)
    _check_optimizer(config.optimizer, config.train.num_steps)
    _check_mesh(config.mesh)
    _check_batch(config.train)
    return config


def _leaves(tree: Any, prefix: str = '') -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {k: v for key, sub in tree.items() for k, v in _leaves(sub, f'{prefix}.{key}' if prefix else key).items()}


def _listed(choices) -> str:
    return ', '.join('none' if choice is None else str(choice) for choice in choices)


def _check_number(path: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or path.startswith('mesh.'):
        return
    if not math.isfinite(value) or value < 0 or (value == 0 and path not in _MAY_BE_ZERO):
        bound = '>= 0' if path in _MAY_BE_ZERO else '> 0'
        raise errors.usage(f'config.{path}', f'must be a finite number {bound}, got {value}')


def _check_model(model: ModelConfig) -> None:
    if model.num_heads % model.num_kv_heads:
        raise errors.usage(
            'config.model.num_kv_heads', f'{model.num_kv_heads} does not divide num_heads = {model.num_heads}'
        )
    if model.head_dim % 2:
        raise errors.usage('config.model.head_dim', f'must be even for rotary embedding, got {model.head_dim}')


def _check_data(data: DataConfig) -> None:
    for name, source in data.sources.items():
        if source.format not in _SOURCE_FORMATS:
            raise errors.usage(
                f'config.data.sources.{name}.format', f'{source.format!r} is not one of {_listed(_SOURCE_FORMATS)}'
            )
        if not name.replace('-', '_').isidentifier():
            raise errors.usage(
                f'config.data.sources.{name}', 'a source name has letters, digits, _ and - only, a letter first'
            )
    for field in ('holdout_share', 'max_bad_share'):
        if getattr(data, field) >= 1:
            raise errors.usage(f'config.data.{field}', f'is a share below 1, got {getattr(data, field)}')
    if data.restart_positions and not data.document_mask:
        raise errors.usage('config.data.restart_positions', 'is true; set --config.data.document_mask=true with it')


def _check_optimizer(optimizer: OptimizerConfig, num_steps: int) -> None:
    if max(optimizer.beta1, optimizer.beta2) >= 1:
        raise errors.usage(
            'config.optimizer.beta1', f'betas must be below 1, got {optimizer.beta1} and {optimizer.beta2}'
        )
    if optimizer.final_learning_rate > optimizer.peak_learning_rate:
        raise errors.usage(
            'config.optimizer.final_learning_rate',
            f'{optimizer.final_learning_rate} is above peak_learning_rate = {optimizer.peak_learning_rate}',
        )
    if optimizer.schedule == 'wsd' and not 0 < optimizer.decay_steps <= num_steps - optimizer.warmup_steps:
        raise errors.usage(
            'config.optimizer.decay_steps',
            f'{optimizer.decay_steps} must be between 1 and num_steps - warmup_steps = '
            f'{num_steps - optimizer.warmup_steps}',
        )


def _check_mesh(mesh: MeshConfig) -> None:
    sizes = dataclasses.asdict(mesh)
    if any(size == 0 or size < -1 for size in sizes.values()) or list(sizes.values()).count(-1) > 1:
        raise errors.usage('config.mesh', f'axes are positive and at most one is -1, got {sizes}')


def _check_batch(train: TrainConfig) -> None:
    if train.global_batch_size % train.micro_batch_size:
        raise errors.usage(
            'config.train.global_batch_size',
            f'{train.global_batch_size} is not a multiple of micro_batch_size = {train.micro_batch_size}',
        )
