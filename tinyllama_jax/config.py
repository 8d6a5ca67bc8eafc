"""Every setting of a run: frozen dataclasses and their validation.

`configs/x.py:get_config` builds a `Config`, settings/experiment.py applies
`--config.model.num_kv_heads=2`, and `validated` checks the result. An annotation says
what a field allows (fields.py): a plain number is above 0. Nothing here imports jax.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from tinyllama_jax import errors, fields
from tinyllama_jax.fields import Path

Dtype = Literal['bfloat16', 'float32']


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
    rope_scaling: float = 1.0  # how far rotation is stretched; linear: positions are divided by this
    rope_kind: Literal['linear', 'llama3', 'yarn', 'dynamic'] = 'linear'
    rope_original_seq_len: int | None = None  # length before stretching; the settings below are of llama3 and yarn, too
    # Frequencies that turn less often than the first in that length are stretched; more often than the second, kept.
    rope_slow_turns: float = 1.0
    rope_fast_turns: float = 32.0
    rope_truncate: bool = True  # yarn only, as kernels/rope_scaling.py explains
    rope_attention_factor: float = 1.0  # yarn only: factor of cosines and sines
    # normal: std 0.02, residual outputs / sqrt(2 L); original: the original code's
    init: Literal['normal', 'original'] = 'normal'
    compute_dtype: Dtype | None = None  # none: bfloat16 on GPUs, float32 on CPUs
    # One compiled layer, scanned; false unrolls: slower to compile, 15 % faster on an H100 (docs/kernels.md) and CPUs
    scan_layers: bool = True


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One named corpus and its share of the mixture."""

    path: Path | None = None  # a folder (or one file); train/, validation/, test/ inside are splits
    weight: float = 1.0  # share of rows, relative to the other sources
    format: Literal['auto', 'jsonl', 'parquet', 'arrow', 'text'] = 'auto'  # auto: by name; text: a file is one document
    text_field: str | None = None  # none: `text` in jsonl; `text` or `content`, whichever is there, in tables
    drop_sets: tuple[str, ...] = ('RedPajamaGithub',)  # records that name one of these in another field are left out


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Corpora, tokenizer and the order in which rows are trained on."""

    sources: Mapping[str, SourceConfig] = dataclasses.field(default_factory=dict)
    tokenizer: Path | None = None  # a SentencePiece .model file, a tokenizer.json or its folder; none: one is trained
    tokenizer_pieces: int | None = None  # vocabulary of the tokenizer that prepare trains on the sources
    python_corpus: bool = False  # sources without a path are written from the Python installation (the demo's corpus)
    store: Path | None = None  # prepared tokens; none: WORKDIR/store
    bos: bool = False  # put BOS before each document
    eos_per_document: Annotated[int, '>= 0'] = 1  # the paper's second fault inserted more than one
    document_mask: bool = False  # tokens see their own document only, not the others packed into their row
    restart_positions: bool = False  # rotary positions count from each document's start in the row; needs document_mask
    shuffle: Literal['rows'] = 'rows'  # rows: single rows are permuted afresh each epoch
    holdout_share: Annotated[float, '>= 0', '< 1'] = 0.001  # of the rows of a source without a validation split
    holdout_min_rows: Annotated[int, '>= 0'] = 64
    max_bad_share: Annotated[float, '>= 0', '< 1'] = 0.0  # share of bad files and of bad records that prepare accepts
    workers: int | None = None  # prepare's processes; none: one per core
    prefetch_steps: int = 4  # batches read ahead of the training step

    def store_path(self, workdir: pathlib.Path) -> pathlib.Path:
        """Returns the folder of the prepared tokens."""
        return pathlib.Path(self.store) if self.store else workdir / 'store'


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, clipping and the learning rate (paper, section 2.3). Steps are optimizer steps."""

    name: Literal['adamw'] = 'adamw'
    # After the warmup, cosine decay; or wsd: a stable rate, then linear decay over the last decay_steps.
    schedule: Literal['cosine', 'wsd'] = 'cosine'
    peak_learning_rate: float = 4e-4
    final_learning_rate: Annotated[float, '>= 0'] = 4e-5
    warmup_steps: Annotated[int, '>= 0'] = 2_000
    decay_steps: Annotated[int, '>= 0'] = 0  # wsd only
    micro_steps_per_step: int = 1  # of the schedule only; the original's 8: a step has the rate of its last micro-step
    stuck_until_step: Annotated[int, '>= 0'] = 0  # the original's fault: until then the minimum was the peak
    beta1: Annotated[float, '>= 0', '< 1'] = 0.9
    beta2: Annotated[float, '>= 0', '< 1'] = 0.95
    eps: float = 1e-8
    weight_decay: Annotated[float, '>= 0'] = 0.1
    # What weight_decay applies to. matrices: all but the norms' scales; all: as the original.
    decay: Literal['matrices', 'all'] = 'matrices'
    clip_norm: float = 1.0


@dataclasses.dataclass(frozen=True)
class KernelConfig:
    """Which implementation runs each op; none: the default for the chip (docs/kernels.md). A name works or is refused.

    xla: plain JAX. triton: our kernels, on A100, H100 and H200. cudnn: NVIDIA's. interpret: the
    Triton kernels interpreted on a CPU, to check them.
    """

    attention: Literal['xla', 'triton', 'cudnn', 'interpret'] | None = None
    rms_norm: Literal['xla', 'triton', 'interpret'] | None = None
    rope: Literal['xla', 'triton', 'interpret'] | None = None
    swiglu: Literal['xla', 'triton', 'interpret'] | None = None
    cross_entropy: Literal['xla', 'triton', 'interpret'] | None = None
    self_test: bool = True  # before the first step, compare each kernel with plain JAX on the run's mesh and shapes


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; one may be -1 (the rest). Their product is the device count."""

    data: Annotated[int, '>= -1', '!= 0'] = 1  # whole copies, whose gradients are added up
    fsdp: Annotated[int, '>= -1', '!= 0'] = -1  # splits batch and weights
    tensor: Annotated[int, '>= -1', '!= 0'] = 1  # splits heads, feed-forward width and vocabulary
    # ZeRO's stage, along fsdp. 3 (FSDP): parameters, gradients and optimizer state are split, weights gathered layer by
    # layer, forward and backward. 1: a device holds a whole copy of the weights in the compute dtype through a step
    # (2.2 GB in bfloat16 for 1.1 B parameters), gathered once a step: less traffic, the more so with accumulation.
    zero: Literal[1, 3] = 3


# What each remat policy saves of a layer beside its input: names in model.py (their bytes stand there) and in the
# attention kernels; None: everything. In order of growing recomputation and shrinking memory.
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
    global_batch_size: int = 1_024  # sequences per optimizer step
    micro_batch_size: int = 8  # sequences per batch shard (one of data x fsdp) in one forward pass
    # What the backward pass finds saved, per layer and token of the 1.1 B model in bfloat16 with our kernels. none:
    # 58 KiB, everything. names: 39 KiB; norms and SwiGLU are recomputed. attention: 8 KiB, its output and log-sum-exp;
    # all other ops are recomputed. full: 4 KiB, the layer's input; everything is recomputed, a third more FLOPs.
    remat: Annotated[str, REMAT] = 'full'
    # dtype of weight gradients out of the matmul and in the reduction; none: the compute dtype. float32 doubles their
    # memory and traffic.
    gradient_dtype: Dtype | None = None
    # On GPUs: only operations with a fixed order of summation, and autotuning's choices are kept in WORKDIR/compiled
    # for the next start. CPUs are always deterministic.
    deterministic: bool = True
    z_loss: Annotated[float, '>= 0'] = 0.0  # weight of the logits' mean squared log-sum-exp (PaLM: 1e-4; paper: none)
    log_every_steps: int = 10
    eval_every_steps: Annotated[int, '>= 0'] = 5_000  # validation loss per source; 0: only at the end
    eval_rows: int = 512  # validation rows per source
    evaluate_tasks: tuple[str, ...] = ()  # lm-eval's tasks on which the model is evaluated while it trains
    evaluate_every_steps: Annotated[int, '>= 0'] = 5_000  # on evaluate_tasks; 0: only at the end
    evaluate_limit: int | None = 100  # only this many examples of each task, from its beginning
    evaluate_include_path: Path | None = None  # as evaluate's --include_path
    evaluate_task_data: Path | None = None  # as evaluate's --task_data
    checkpoint_every_steps: int = 1_000
    keep_checkpoints: int = 3  # newest ones kept
    keep_every_steps: int | None = None  # checkpoints at multiples of this are kept for ever
    mfu: Literal['C', 'F', 'N'] = 'C'  # the reported MFU counts causal or full attention, or all parameters (flops.py)
    profile_step: int | None = None  # first step of a profiler window
    profile_steps: int = 3
    join_timeout_s: float = 300.0  # for all processes to reach the coordinator
    # The run ends with 75 if one process keeps the others waiting for stuck_timeout_s, or none advances for
    # hang_timeout_s (docs/cluster.md).
    stuck_timeout_s: float = 40.0
    hang_timeout_s: Annotated[float, '>= 0'] = 1_800.0  # 0: neither is watched

    def due(self, step: int, every_steps: int) -> bool:
        """Returns whether an every-N-steps action is due at `step` (0: never; always at the last step)."""
        return step == self.num_steps or bool(every_steps and step % every_steps == 0)


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings of a run."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    kernels: KernelConfig = KernelConfig()
    train: TrainConfig = TrainConfig()
    seed: Annotated[int, '>= 0'] = 3_407


def to_dict(config: Any) -> Any:
    """Returns a tree of these dataclasses as dictionaries, lists and scalars, for JSON."""
    if dataclasses.is_dataclass(config):
        return {field.name: to_dict(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {key: to_dict(value) for key, value in config.items()}
    return list(config) if isinstance(config, tuple) else config


def validated(config: Config) -> Config:
    """Returns `config`, or raises UsageError naming the first field whose value cannot work."""
    fields.check(config, 'config')
    model, data, optimizer, train = config.model, config.data, config.optimizer, config.train
    if model.num_heads % model.num_kv_heads:
        raise errors.usage(
            'config.model.num_kv_heads', f'{model.num_kv_heads} does not divide num_heads = {model.num_heads}'
        )
    if model.head_dim % 2:
        raise errors.usage('config.model.head_dim', f'must be even for rotary embedding, got {model.head_dim}')
    original = model.rope_original_seq_len
    if model.rope_kind != 'linear' and original is None:
        raise errors.usage('config.model.rope_original_seq_len', f'is none, but rope_kind is {model.rope_kind}; set it')
    # In a longer text dynamic rotation would depend on the text's length, which packed rows and caches do not have.
    if model.rope_kind == 'dynamic' and original is not None and model.seq_len > original:
        raise errors.usage(
            'config.model.seq_len',
            f'{model.seq_len} is above rope_original_seq_len = {original}, which rope_kind=dynamic does not allow; '
            'choose yarn',
        )
    if model.rope_slow_turns >= model.rope_fast_turns:
        raise errors.usage('config.model.rope_slow_turns', f'{model.rope_slow_turns} must be below rope_fast_turns')
    for name in data.sources:
        if not name.replace('-', '_').isidentifier():
            raise errors.usage(
                f'config.data.sources.{name}', 'a source name has letters, digits, _ and - only, a letter first'
            )
    if data.restart_positions and not data.document_mask:
        raise errors.usage('config.data.restart_positions', 'is true; set --config.data.document_mask=true with it')
    if optimizer.final_learning_rate > optimizer.peak_learning_rate:
        raise errors.usage(
            'config.optimizer.final_learning_rate',
            f'{optimizer.final_learning_rate} is above peak_learning_rate = {optimizer.peak_learning_rate}',
        )
    after_warmup = train.num_steps - optimizer.warmup_steps
    if optimizer.schedule == 'wsd' and not 0 < optimizer.decay_steps <= after_warmup:
        raise errors.usage(
            'config.optimizer.decay_steps',
            f'{optimizer.decay_steps} must be between 1 and num_steps - warmup_steps = {after_warmup}',
        )
    rest = [axis for axis, size in dataclasses.asdict(config.mesh).items() if size == -1]
    if len(rest) > 1:
        raise errors.usage('config.mesh', f'at most one axis is -1 (the rest of the devices), got {" and ".join(rest)}')
    if train.global_batch_size % train.micro_batch_size:
        raise errors.usage(
            'config.train.global_batch_size',
            f'{train.global_batch_size} is not a multiple of micro_batch_size = {train.micro_batch_size}',
        )
    return config
