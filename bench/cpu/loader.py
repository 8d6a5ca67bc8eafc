"""Benchmarks the data pipeline in rows/s, from a cold and from a warm page cache.

    python bench/cpu/loader.py [--megabytes=300] [--batch=256] [--seconds=8]

Makes a store of random tokens in a temporary folder and asks it for rows of 2,049
tokens as training does: batches in random row order, two sources, through grain
with prefetch. Goal: 5,000 rows/s on two cores, cold and warm. Eight GPUs at
80,000 tokens/s need 312. The last figure is with segment ids for document masks.

The cold figure drops the page cache (/proc/sys/vm/drop_caches where that is
permitted, else posix_fadvise on every file) and opens the store again; it is
taken over the first batches, before the cache is warm again.
"""

import pathlib
import sys

sys.path.pop(0)  # this folder, whose tokenize.py would hide the standard library's
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import argparse
import dataclasses
import os
import tempfile
import time

import numpy as np

from tinyllama_jax.config import Config, DataConfig, ModelConfig, SourceConfig, TrainConfig
from tinyllama_jax.data import pipeline, store
from tinyllama_jax.tokenizer import spm

SEQ_LEN = 2_048
TOKENS_PER_FILE = 4_000_000  # about what a SlimPajama file holds
TOKENS_PER_DOCUMENT = 1_000


def write_store(path: pathlib.Path, megabytes: int) -> None:
    """Writes a store of random tokens, two thirds of them in the first of two sources."""
    texts = (f'{i} words of some text for a tokenizer' for i in range(1_000))
    spm.train(texts, path / store.TOKENIZER, 300)
    model = spm.SentencePieceTokenizer(path / store.TOKENIZER)
    files = max(3, megabytes * 500_000 // TOKENS_PER_FILE)
    rng, sources = np.random.default_rng(0), {}
    for name, count in (('prose', files * 2 // 3), ('code', files - files * 2 // 3)):
        store.create_arrays(path, name, 'train', num_files=count, dtype=model.dtype)
        entries = [_write_file(path, name, i, rng, model) for i in range(count)]
        sources[name] = {'splits': {'train': {'files': entries}}}
    store.write_json(
        path / store.MANIFEST,
        {
            'version': store.VERSION,
            'tokenizer_sha256': model.sha256,
            'vocab_size': model.vocab_size,
            'dtype': model.dtype.name,
            'bos': False,
            'eos_per_document': 1,
            'sources': sources,
        },
    )


def _write_file(
    path: pathlib.Path, name: str, index: int, rng: np.random.Generator, model: spm.SentencePieceTokenizer
) -> dict:
    writer = store.StreamWriter(path, name, 'train', index)
    tokens = rng.integers(0, model.vocab_size, TOKENS_PER_FILE).astype(model.dtype)
    for record, start in enumerate(range(0, TOKENS_PER_FILE, TOKENS_PER_DOCUMENT)):
        writer.append(tokens[start : start + TOKENS_PER_DOCUMENT], record)
    return {'name': str(index), **writer.close()}


def drop_cache(path: pathlib.Path) -> str:
    """Empties the page cache of the store's files; returns how."""
    os.sync()
    try:
        pathlib.Path('/proc/sys/vm/drop_caches').write_text('3')
        return 'drop_caches'
    except OSError:
        for file in path.rglob('c/**/*'):
            if file.is_file():
                with open(file, 'rb') as opened:
                    os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return 'posix_fadvise'


def rows_per_second(config: Config, path: pathlib.Path, *, start: int, seconds: float, batches: int | None) -> float:
    """Returns the rate at which a freshly opened store serves rows, over `seconds` or `batches`."""
    data = pipeline.make_dataset(config, store.TokenStore(path))
    served, begin, checked = 0, time.perf_counter(), None
    for batch, _ in data.batches(start, start + (batches or 1 << 30)):
        served += batch.shape[0] * batch.shape[1]
        checked = batch if checked is None else checked
        if time.perf_counter() - begin > seconds:
            break
    elapsed = time.perf_counter() - begin
    assert (checked == data.batch(start)).all()
    return served / elapsed


def main() -> None:
    """Reads the flags, measures and prints one line per figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--megabytes', type=int, default=300, help='size of the store')
    parser.add_argument('--batch', type=int, default=256, help='rows of a step')
    parser.add_argument('--seconds', type=float, default=8.0, help='length of the warm measurement')
    parser.add_argument('--repeats', type=int, default=3, help='measurements; the median is printed')
    args = parser.parse_args()
    config = Config(
        model=ModelConfig(vocab_size=300, seq_len=SEQ_LEN),
        data=DataConfig(sources={'prose': SourceConfig(weight=0.7), 'code': SourceConfig(weight=0.3)}),
        train=TrainConfig(global_batch_size=args.batch),
    )
    with tempfile.TemporaryDirectory(prefix='tinyllama-bench-') as folder:
        path = pathlib.Path(folder)
        begin = time.perf_counter()
        write_store(path, args.megabytes)
        size = sum(file.stat().st_size for file in path.rglob('*') if file.is_file())
        print(f'store: {size / 1e6:.0f} MB written in {time.perf_counter() - begin:.1f} s; {os.cpu_count()} cores')
        # As many rows as a tenth of the store, so that few chunks are met a second time.
        few = max(2, size // 10 // (2 * (SEQ_LEN + 1)) // args.batch)
        cold = []
        for i in range(args.repeats):
            how = drop_cache(path)
            cold.append(rows_per_second(config, path, start=i * few, seconds=1e9, batches=few))
        print(f'cold: {np.median(cold):,.0f} rows/s (median of {sorted(map(int, cold))}, {few} batches each, {how})')
        masked = dataclasses.replace(config, data=dataclasses.replace(config.data, document_mask=True))
        for name, settings in (('warm', config), ('warm, with document masks', masked)):
            warm = [
                rows_per_second(settings, path, start=0, seconds=args.seconds / args.repeats, batches=None)
                for _ in range(args.repeats)
            ]
            print(f'{name}: {np.median(warm):,.0f} rows/s (median of {sorted(map(int, warm))})')


if __name__ == '__main__':
    main()
