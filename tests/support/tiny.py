"""A Llama of a few thousand parameters and batches with something to learn, for tests."""

import pathlib

import numpy as np

from tinyllama_jax.config import Config, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig

MODEL = ModelConfig(
    vocab_size=64,
    seq_len=32,
    num_layers=2,
    embed_dim=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    hidden_dim=48,
    compute_dtype='float32',
)
CONFIG = Config(
    model=MODEL,
    optimizer=OptimizerConfig(warmup_steps=5, peak_learning_rate=1e-2, final_learning_rate=1e-3),
    mesh=MeshConfig(),
    train=TrainConfig(
        num_steps=20,
        global_batch_size=8,
        micro_batch_size=8,
        remat='none',
        log_every_steps=1,
        eval_every_steps=10,
        eval_rows=16,
        checkpoint_every_steps=5,
    ),
    seed=1,
)


def batches(count: int, *, accumulation: int = 1, batch: int = 8) -> list[np.ndarray]:
    """Returns `count` batches rows_ABR of arithmetic progressions modulo the vocabulary; the same on every machine."""
    model = CONFIG.model
    rows = np.arange(count * batch)[:, None]
    tokens = (7 * rows + (rows % 5 + 1) * np.arange(model.seq_len + 1)) % model.vocab_size
    return list(tokens.astype(np.uint16).reshape(count, accumulation, batch // accumulation, model.seq_len + 1))


def segment_ids(rows: np.ndarray) -> np.ndarray:
    """Returns segment ids for rows [..., R]: a document begins at every token that 11 divides."""
    begins = rows % 11 == 0
    begins[..., 0] = False
    return begins.cumsum(axis=-1, dtype=np.uint16)


def write_corpus(folder: pathlib.Path) -> None:
    """Writes two sources of plain text, numbers in words and lines of code, the same on every machine."""
    words = ('zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine')
    for i in range(40):
        (folder / 'prose').mkdir(parents=True, exist_ok=True)
        (folder / 'code').mkdir(parents=True, exist_ok=True)
        numbers = [(i * 31 + j * j) % 1000 for j in range(60)]
        prose = '. '.join(' '.join(words[int(digit)] for digit in str(n)) for n in numbers)
        code = '\n'.join(f'def f{n}(x):\n    return x + {n}\n' for n in numbers[:30])
        (folder / 'prose' / f'{i:02}.txt').write_text(prose + '.\n')
        (folder / 'code' / f'{i:02}.py').write_text(code)
