"""Benchmarks training on CPU cores: ours against torch, eager and compiled.

    python bench/cpu/train.py

Trains the same tiny Llama three times from the same weights on the same batches with
the same number of threads, checks that the first five losses agree, then lets the
three take turns and prints tokens/s and the median ratios.

Shapes: B batch, T time, D model, N query heads, K key-value heads, H head dim,
F feed-forward, V vocabulary, L layers.
"""

import argparse
import contextlib
import os
import pathlib
import statistics
import sys
import time

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
sys.path.pop(0)  # this folder, whose tokenize.py would hide the standard library's
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import jax
import numpy as np
import torch
import torch.nn.functional as F

from tinyllama_jax import config as config_lib
from tinyllama_jax import sharding, step
from tinyllama_jax.process import cores, xla

TOLERANCE = 1e-3  # of a loss, in nats
CHECKED_STEPS = 5


def bench_config(batch: int, seq_len: int) -> config_lib.Config:
    """Returns the run: 4 layers, d 256, 8/2 heads, hidden 704, vocabulary 4,096; clipping and AdamW at one rate."""
    return config_lib.validated(
        config_lib.Config(
            model=config_lib.ModelConfig(
                vocab_size=4_096,
                seq_len=seq_len,
                num_layers=4,
                embed_dim=256,
                num_heads=8,
                num_kv_heads=2,
                head_dim=32,
                hidden_dim=704,
                compute_dtype='float32',
                scan_layers=False,
            ),
            optimizer=config_lib.OptimizerConfig(warmup_steps=0, final_learning_rate=4e-4),
            train=config_lib.TrainConfig(
                num_steps=1_000, global_batch_size=batch, micro_batch_size=batch, remat='none'
            ),
        )
    )


class TorchAttention(torch.nn.Module):
    """Grouped-query attention on torch's fused kernel."""

    def __init__(self, config: config_lib.ModelConfig):
        super().__init__()
        D, N, K, H = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim
        self.head_dim, self.groups = H, N // K
        self.q = torch.nn.Linear(D, N * H, bias=False)
        self.k = torch.nn.Linear(D, K * H, bias=False)
        self.v = torch.nn.Linear(D, K * H, bias=False)
        self.o = torch.nn.Linear(N * H, D, bias=False)

    def forward(self, x_BTD, cos_TH, sin_TH):
        """Returns the attention's output, [B, T, D]."""
        B, T, _ = x_BTD.shape
        q_BNTH, k_BKTH, v_BKTH = (
            project(x_BTD).view(B, T, -1, self.head_dim).transpose(1, 2) for project in (self.q, self.k, self.v)
        )
        q_BNTH, k_BKTH = (_rotated(x, cos_TH, sin_TH) for x in (q_BNTH, k_BKTH))
        k_BNTH, v_BNTH = (x.repeat_interleave(self.groups, dim=1) for x in (k_BKTH, v_BKTH))
        out_BNTH = F.scaled_dot_product_attention(q_BNTH, k_BNTH, v_BNTH, is_causal=True)
        return self.o(out_BNTH.transpose(1, 2).reshape(B, T, -1))


def _rotated(x_BNTH, cos_TH, sin_TH):
    a_BNTh, b_BNTh = x_BNTH.chunk(2, dim=-1)
    return x_BNTH * cos_TH + torch.cat((-b_BNTh, a_BNTh), dim=-1) * sin_TH


class TorchLayer(torch.nn.Module):
    """Pre-norm attention and SwiGLU."""

    def __init__(self, config: config_lib.ModelConfig):
        super().__init__()
        D, F_ = config.embed_dim, config.hidden_dim
        self.attention_norm = torch.nn.RMSNorm(D, eps=config.norm_eps)
        self.attention = TorchAttention(config)
        self.mlp_norm = torch.nn.RMSNorm(D, eps=config.norm_eps)
        self.gate = torch.nn.Linear(D, F_, bias=False)
        self.up = torch.nn.Linear(D, F_, bias=False)
        self.down = torch.nn.Linear(F_, D, bias=False)

    def forward(self, x_BTD, cos_TH, sin_TH):
        """Returns the residual stream [B, T, D] after this layer."""
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), cos_TH, sin_TH)
        y_BTD = self.mlp_norm(x_BTD)
        return x_BTD + self.down(F.silu(self.gate(y_BTD)) * self.up(y_BTD))


class TorchLlama(torch.nn.Module):
    """The peer: the same Llama as torch's users write it. Returns the mean loss."""

    def __init__(self, config: config_lib.ModelConfig):
        super().__init__()
        self.embed = torch.nn.Embedding(config.vocab_size, config.embed_dim)
        self.layers = torch.nn.ModuleList(TorchLayer(config) for _ in range(config.num_layers))
        self.final_norm = torch.nn.RMSNorm(config.embed_dim, eps=config.norm_eps)
        self.lm_head = torch.nn.Linear(config.embed_dim, config.vocab_size, bias=False)
        frequency_h = config.rope_base ** (-torch.arange(config.head_dim // 2) / (config.head_dim // 2))
        angle_Th = torch.arange(config.seq_len)[:, None] / config.rope_scaling * frequency_h
        angle_TH = torch.cat((angle_Th, angle_Th), dim=-1)
        self.register_buffer('cos_TH', angle_TH.cos(), persistent=False)
        self.register_buffer('sin_TH', angle_TH.sin(), persistent=False)

    def forward(self, tokens_BT, targets_BT):
        """Returns the mean loss in nats."""
        x_BTD = self.embed(tokens_BT)
        T = tokens_BT.shape[1]
        for layer in self.layers:
            x_BTD = layer(x_BTD, self.cos_TH[:T], self.sin_TH[:T])
        logits_BTV = self.lm_head(self.final_norm(x_BTD))
        return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())

    def load(self, params: dict) -> None:
        """Copies our parameter tree in."""
        state = {'embed.weight': params['embed'], 'final_norm.weight': params['final_norm']['scale']}
        state['lm_head.weight'] = params['lm_head'].T
        layers = params['layers']
        for i in range(len(self.layers)):
            for name in ('attention_norm', 'mlp_norm'):
                state[f'layers.{i}.{name}.weight'] = layers[name]['scale'][i]
            for name in 'qkv':
                state[f'layers.{i}.attention.{name}.weight'] = _matrix(layers['attention'][name][i], inputs=1).T
            state[f'layers.{i}.attention.o.weight'] = _matrix(layers['attention']['o'][i], inputs=2).T
            for name in ('gate', 'up', 'down'):
                state[f'layers.{i}.{name}.weight'] = layers['mlp'][name][i].T
        self.load_state_dict({name: torch.tensor(np.ascontiguousarray(x)) for name, x in state.items()})


def _matrix(weight, *, inputs: int):
    """Reshapes a weight to a matrix: its first `inputs` axes become the rows."""
    return weight.reshape(int(np.prod(weight.shape[:inputs])), -1)


def torch_optimizer(net: torch.nn.Module, config: config_lib.OptimizerConfig) -> torch.optim.Optimizer:
    """Returns torch's fused AdamW; norms are not decayed."""
    matrices = [p for p in net.parameters() if p.ndim > 1]
    scales = [p for p in net.parameters() if p.ndim == 1]
    groups = [{'params': matrices, 'weight_decay': config.weight_decay}, {'params': scales, 'weight_decay': 0.0}]
    return torch.optim.AdamW(
        groups, lr=config.peak_learning_rate, betas=(config.beta1, config.beta2), eps=config.eps, fused=True
    )


def torch_trainer(config: config_lib.Config, params: dict, *, compiled: bool):
    """Returns a function rows_BR -> loss that takes one optimizer step of the torch peer."""
    net = TorchLlama(config.model)
    net.load(params)
    optimizer = torch_optimizer(net, config.optimizer)
    loss_of = torch.compile(net) if compiled else net

    def train(rows_BR):
        rows_BR = torch.from_numpy(rows_BR.astype(np.int64))
        loss = loss_of(rows_BR[:, :-1], rows_BR[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), config.optimizer.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return train


def our_trainer(config: config_lib.Config, state: step.TrainState, mesh):
    """Returns a function rows_BR -> loss that takes one step of the product's own train step."""
    train_step = step.jit_train_step(config, mesh)

    def train(rows_BR):
        nonlocal state
        state, metrics = train_step(state, rows_BR[None], None)
        return metrics['loss']

    return train


def check_losses(trainers: dict, batches: list) -> None:
    """Runs the first steps of each trainer; exits unless their losses agree."""
    losses = {name: [float(train(rows)) for rows in batches[:CHECKED_STEPS]] for name, train in trainers.items()}
    worst = max(abs(a - b) for other in losses.values() for a, b in zip(losses['ours'], other, strict=True))
    for name, values in losses.items():
        print(f'{name:14} first losses ' + ' '.join(f'{value:.5f}' for value in values))
    print(f'largest difference {worst:.1e}')
    if not worst <= TOLERANCE:
        sys.exit(f'the losses differ by {worst:.1e}, more than {TOLERANCE}')


def seconds_of(train, batches: list) -> float:
    """Returns the wall time of one step on each batch, up to the last loss."""
    start = time.perf_counter()
    for rows in batches:
        loss = train(rows)
    float(loss)
    return time.perf_counter() - start


def measure(trainers: dict, batches: list, *, repeats: int, steps: int) -> dict:
    """Returns seconds per block of `steps` for each trainer, in turns of alternating order."""
    seconds = {name: [] for name in trainers}
    for repeat in range(repeats):
        names = list(trainers)[:: 1 if repeat % 2 else -1]
        for name in names:
            # As the command `train` does. Torch's OpenMP threads spin on their own.
            with cores.awake_cores() if name == 'ours' else contextlib.nullcontext():
                float(trainers[name](batches[0]))  # warms caches and settles the others' threads
                seconds[name].append(seconds_of(trainers[name], batches[:steps]))
    return seconds


def report(seconds: dict, tokens: int) -> None:
    """Prints tokens/s and the median ratio of ours to each peer."""
    for name, values in seconds.items():
        print(f'{name:14} {tokens / statistics.median(values):8.0f} tokens/s (best {tokens / min(values):.0f})')
    for name in seconds:
        if name != 'ours':
            ratios = [theirs / ours for theirs, ours in zip(seconds[name], seconds['ours'], strict=True)]
            print(f'ours / {name}: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})')


def main() -> None:
    """Reads the flags, runs the three and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--repeats', type=int, default=15)
    parser.add_argument('--steps', type=int, default=4, help='steps a turn')
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--batch', type=int, default=8)
    parser.add_argument('--seq_len', type=int, default=256)
    flags = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: flags.threads])  # XLA takes a thread per core it may use
    torch.set_num_threads(flags.threads)

    xla.set_up_jax()
    config = bench_config(flags.batch, flags.seq_len)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    state = step.init_state(config, mesh)
    params = jax.tree.map(np.array, state.params)
    trainers = {
        'ours': our_trainer(config, state, mesh),
        'torch.eager': torch_trainer(config, params, compiled=False),
        'torch.compile': torch_trainer(config, params, compiled=True),
    }
    shape = (max(flags.steps, CHECKED_STEPS), flags.batch, flags.seq_len + 1)
    batches = list(np.random.default_rng(0).integers(0, config.model.vocab_size, shape, dtype=np.uint16))
    check_losses(trainers, batches)
    seconds = measure(trainers, batches, repeats=flags.repeats, steps=flags.steps)
    report(seconds, flags.steps * flags.batch * flags.seq_len)


if __name__ == '__main__':
    main()
