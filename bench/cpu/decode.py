"""Benchmarks generation on CPU cores: ours against Hugging Face's `generate` on the same export.

    python bench/cpu/decode.py [--shapes=tiny,120m] [--batches=1,16]

Random weights are exported to a Hugging Face folder, which both read, in float32. Each continues the same prompts of
32 tokens by 128, greedily; the tokens must be the same. Then the two take turns; it prints the time per token of a
row (prompt included) and the median ratio.
"""

import argparse
import contextlib
import os
import pathlib
import statistics
import sys
import time

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ['HF_HUB_OFFLINE'] = '1'
sys.path.pop(0)  # this folder, whose tokenize.py would hide the standard library's
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import dataclasses
import logging
import tempfile

import jax
import numpy as np
import torch
import transformers

from configs import tinyllama_120m
from eval_bridge.hf import convert
from tinyllama_jax import config as config_lib
from tinyllama_jax import generate, model
from tinyllama_jax.process import cores, xla
from tinyllama_jax.tokenizer import spm

SHAPES = {
    'tiny': config_lib.ModelConfig(
        vocab_size=4_096, seq_len=256, num_layers=4, embed_dim=256, num_heads=8, num_kv_heads=2, head_dim=32,
        hidden_dim=704, compute_dtype='float32',
    ),
    '120m': dataclasses.replace(tinyllama_120m.get_config().model, compute_dtype='float32'),
}  # fmt: skip


def write_export(config: config_lib.ModelConfig, folder: pathlib.Path) -> pathlib.Path:
    """Writes a Hugging Face folder with random weights and a tokenizer that nothing here uses; returns its path."""
    text = pathlib.Path(__file__).read_text(encoding='utf-8') + ''.join(map(chr, range(32, 127)))
    spm.train([text], folder / 'tokenizer.model', 400)
    params = model.init_params(config, jax.random.key(0))
    convert.export(params, config, folder / 'tokenizer.model', folder / 'export')
    return folder / 'export'


def our_generator(folder: pathlib.Path, tokens: int):
    """Returns a function from prompts [B][32] to tokens [B][128], by our generator."""
    params, config = convert.import_weights(folder)
    generator = generate.Generator(params, dataclasses.replace(config, compute_dtype='float32'))

    def run(prompts):
        *_, rows = generator.batch(prompts, max_new_tokens=tokens)
        return rows.tokens

    return run


def their_generator(folder: pathlib.Path, tokens: int):
    """Returns a function like `our_generator`'s by transformers, with its default attention and cache."""
    net = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    net.generation_config.eos_token_id = None  # so that every text reaches its full length

    def run(prompts):
        prompts_BT = torch.tensor(prompts)
        with torch.inference_mode():
            whole_BT = net.generate(
                prompts_BT, attention_mask=torch.ones_like(prompts_BT), max_new_tokens=tokens, do_sample=False
            )
        return whole_BT[:, prompts_BT.shape[1] :].tolist()

    return run


def measure(generators: dict, prompts: list, repeats: int) -> dict:
    """Returns seconds per run of each generator, in turns of alternating order."""
    seconds = {name: [] for name in generators}
    for repeat in range(repeats):
        for name in list(generators)[:: 1 if repeat % 2 else -1]:
            # As the command `generate` does. Torch's OpenMP threads spin on their own.
            with cores.awake_cores() if name == 'ours' else contextlib.nullcontext():
                generators[name](prompts[:1])  # settles the others' threads
                start = time.perf_counter()
                generators[name](prompts)
                seconds[name].append(time.perf_counter() - start)
    return seconds


def report(shape: str, batch: int, seconds: dict, tokens: int) -> None:
    """Prints ms per token and the ratio theirs / ours: median, minimum, maximum, and best against best."""
    ours, theirs = (
        f'{name} {statistics.median(values) / tokens * 1e3:6.2f} ms a token (best {min(values) / tokens * 1e3:.2f})'
        for name, values in seconds.items()
    )
    ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
    best = min(seconds['transformers']) / min(seconds['ours'])
    print(
        f'{shape:5} batch {batch:2}: {ours}, {theirs}: {statistics.median(ratios):.2f} x '
        f'({min(ratios):.2f} to {max(ratios):.2f}; best against best {best:.2f})',
        flush=True,
    )


def main() -> None:
    """Reads the flags, runs the two and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--shapes', default='tiny,120m')
    parser.add_argument('--batches', default='1,16')
    parser.add_argument('--repeats', type=int, default=7)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--prompt', type=int, default=32, help='tokens of a prompt')
    parser.add_argument('--tokens', type=int, default=128, help='new tokens of each')
    flags = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: flags.threads])  # XLA takes a thread per core it may use
    torch.set_num_threads(flags.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger('jax').setLevel(logging.ERROR)
    xla.set_up_jax()
    for shape in flags.shapes.split(','):
        with tempfile.TemporaryDirectory() as folder:
            export = write_export(SHAPES[shape], pathlib.Path(folder))
            generators = {
                'ours': our_generator(export, flags.tokens),
                'transformers': their_generator(export, flags.tokens),
            }
        for batch in map(int, flags.batches.split(',')):
            prompts = np.random.default_rng(0).integers(0, SHAPES[shape].vocab_size, (batch, flags.prompt)).tolist()
            first, second = (run(prompts) for run in generators.values())
            if first != second:
                sys.exit(f'{shape}, batch {batch}: the two give different tokens')
            report(shape, batch, measure(generators, prompts, flags.repeats), flags.tokens)


if __name__ == '__main__':
    main()
