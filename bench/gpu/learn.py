"""Trains a 125 M Llama for 300 steps on one GPU: bfloat16 with our kernels against float32 with XLA's ops.

    bench/gpu.sh learn [RESULTS] [--only=PHASE,...] [--smoke]

Both start from the same weights and read the same batches of an artificial language. Ends with 1 unless the final
losses, means over the last steps, agree. docs/gpu_benchmarks.md says more.

Shapes: A accumulation steps (1), B sequences, R = seq_len + 1.
"""

import dataclasses
import functools
import json
import sys
import time

import numpy as np

from bench.gpu import benchmark
from bench.gpu import step as gpu_step
from configs import tinyllama_120m
from tinyllama_jax import config as config_lib
from tinyllama_jax import ops as ops_lib
from tinyllama_jax import step as step_lib

STEPS = 300
TAIL = 20  # the final loss is the mean over this many last steps
TOLERANCE = 0.003  # of the final loss, relative
_SMOKE_STEPS = 24
_CLASSES = 64


@dataclasses.dataclass(frozen=True)
class Language:
    """A Markov chain over classes of tokens; within a class, tokens have Zipf's frequencies.

    A model that does not know the classes reaches the unigram entropy. A lower loss shows that it has learned them.
    """

    next_CC: np.ndarray  # cumulative probabilities of the next class
    tokens_CW: np.ndarray  # the tokens of each class, most frequent first
    word_W: np.ndarray  # cumulative probabilities of the ranks in a class

    def rows(self, rng: np.random.Generator, count: int, length: int) -> np.ndarray:
        """Returns `count` rows of `length` tokens, uint16."""
        classes = rng.integers(0, len(self.next_CC), count)
        ranks = np.searchsorted(self.word_W, rng.random((count, length)))
        chances, tokens = rng.random((length, count)), np.empty((count, length), np.uint16)
        for t in range(length):
            tokens[:, t] = self.tokens_CW[classes, np.minimum(ranks[:, t], self.tokens_CW.shape[1] - 1)]
            nearer = (self.next_CC[classes] < chances[t][:, None]).sum(axis=1)
            classes = np.minimum(nearer, len(self.next_CC) - 1)
        return tokens


def make_language(vocab_size: int) -> Language:
    """Makes the language from a fixed seed; each class is followed by few others."""
    rng, classes = np.random.default_rng(0), min(_CLASSES, vocab_size // 8)
    next_CC = rng.dirichlet(np.full(classes, 0.05), classes)
    words = vocab_size // classes
    word_W = 1 / np.arange(1, words + 1)
    tokens_CW = rng.permutation(vocab_size)[: classes * words].reshape(classes, words)
    return Language(next_CC.cumsum(axis=1), tokens_CW, (word_W / word_W.sum()).cumsum())


def unigram_entropy(rows: np.ndarray) -> float:
    """Returns nats per token of the frequencies in `rows`; slightly too low for few rows."""
    counts = np.bincount(rows.ravel())
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def learn_config(setting: benchmark.Setting, dtype: str) -> config_lib.Config:
    """Returns the run of the 125 M (or smoke) model: bfloat16 with our kernels, or float32 with XLA's ops."""
    impl = setting.kernels if dtype == 'bfloat16' and not setting.smoke else 'xla'
    kernels = ops_lib.every_op(impl)
    if setting.smoke and dtype == 'bfloat16':
        kernels = dataclasses.replace(kernels, attention='interpret')
    model = setting.model if setting.smoke else tinyllama_120m.get_config().model
    steps = _SMOKE_STEPS if setting.smoke else STEPS
    return config_lib.validated(
        config_lib.Config(
            model=dataclasses.replace(model, compute_dtype=dtype),
            kernels=kernels,
            optimizer=config_lib.OptimizerConfig(
                peak_learning_rate=1e-2 if setting.smoke else 1e-3, final_learning_rate=1e-4, warmup_steps=steps // 10
            ),
            train=config_lib.TrainConfig(
                num_steps=steps,
                global_batch_size=setting.batch,
                micro_batch_size=setting.batch,
                remat='none' if dtype == 'bfloat16' else 'full',  # XLA's attention saves whole attention matrices
            ),
        )
    )


def _batches(config: config_lib.Config) -> np.ndarray:
    rng, shape = np.random.default_rng(1), (config.train.num_steps, 1, config.train.global_batch_size)
    rows = make_language(config.model.vocab_size).rows(rng, shape[0] * shape[2], config.model.seq_len + 1)
    return rows.reshape(*shape, -1)


def learn(setting: benchmark.Setting, dtype: str) -> dict:
    """Trains in `dtype`; returns the loss of every step."""
    config = learn_config(setting, dtype)
    mesh, batches = gpu_step.make_mesh(config), _batches(config)
    train_step, state = step_lib.jit_train_step(config, mesh), step_lib.init_state(config, mesh)
    losses, start = [], time.perf_counter()
    for rows_ABR in batches:
        state, metrics = train_step(state, rows_ABR, None)
        losses.append(metrics['loss'])
    losses = [float(loss) for loss in losses]
    seconds, tokens = time.perf_counter() - start, batches.shape[0] * batches.shape[2] * config.model.seq_len
    results = {'losses': losses, 'final_loss': float(np.mean(losses[-TAIL:])), 'tokens': tokens, 'seconds': seconds}
    (setting.work / f'{dtype}.json').write_text(json.dumps(results))
    return results | {'unigram_entropy': unigram_entropy(batches)}


def compare(setting: benchmark.Setting) -> dict:
    """Compares the two final losses."""
    files = {dtype: setting.work / f'{dtype}.json' for dtype in ('bfloat16', 'float32')}
    if not all(path.exists() for path in files.values()):
        raise benchmark.Skipped('it needs the results of both phases')
    ours, wanted = (json.loads(path.read_text())['final_loss'] for path in files.values())
    difference = abs(ours - wanted) / wanted
    within = difference <= TOLERANCE
    failures = (
        [] if within else [f'final losses {ours:.4f} and {wanted:.4f} differ by {difference:.2%}, not {TOLERANCE:.1%}']
    )
    return {'bfloat16': ours, 'float32': wanted, 'difference': difference, 'tolerance': TOLERANCE, 'failures': failures}


PHASES = {
    'bfloat16': functools.partial(learn, dtype='bfloat16'),
    'float32': functools.partial(learn, dtype='float32'),
    'compare': compare,
}


def main(arguments=None) -> int:
    """Runs the command; returns its exit status."""
    return benchmark.run('bench.gpu.learn', __doc__, PHASES, name='gpu_learn', arguments=arguments)


if __name__ == '__main__':
    sys.exit(main())
