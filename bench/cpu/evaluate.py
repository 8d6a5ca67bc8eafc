"""Benchmarks evaluation on CPU cores: log-likelihoods of HellaSwag's size, ours against lm-eval's own `hf` model.

    python bench/cpu/evaluate.py [--shape=tiny|120m] [--examples=64] [--data=FOLDER/eval/hellaswag/validation.jsonl.gz]

Both get the same token ids: with --data those of real examples in Llama's tokenizer (--tokenizer), else random ones of
the same lengths; four endings an example. The `hf` model runs the export of the same weights in float32 with the same
number of threads at batch sizes 1, 8 and 32; the best of them counts. First each answers everything once: that compiles
ours and is timed apart, and the answers must agree. Then all take turns. Goal: 1.2 x the best.

On a machine that others use too, --threads=1 --cpu_time counts processor time instead of wall time.
"""

import pathlib
import sys

sys.path.pop(0)  # this folder, whose tokenize.py would hide the standard library's
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import argparse
import dataclasses
import gzip
import json
import os
import statistics
import tempfile
import time

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('HF_HUB_OFFLINE', '1')

import jax
import numpy as np
import torch
from lm_eval.models import huggingface

from bench.cpu import train as cpu_train
from configs import tinyllama_120m
from eval_bridge import lm
from eval_bridge.hf import convert
from tinyllama_jax import model
from tinyllama_jax.config import ModelConfig
from tinyllama_jax.process import xla
from tinyllama_jax.tokenizer import spm

TOLERANCE = 1e-3  # nats, of a log-likelihood
BATCH_SIZES = (1, 8, 32)
ENDINGS = 4
# Of HellaSwag's validation set in Llama's tokens: mean and standard deviation of a context's and an ending's length.
CONTEXT_TOKENS, ENDING_TOKENS = (56, 21), (34, 15)


def shape(name: str) -> ModelConfig:
    """Returns the model: bench/cpu/train.py's tiny one, or configs/tinyllama_120m.py's."""
    config = cpu_train.bench_config(8, 2_048).model if name == 'tiny' else tinyllama_120m.get_config().model
    return dataclasses.replace(config, compute_dtype='float32')


def synthetic(count: int, vocab_size: int) -> list:
    """Returns (texts, context ids, continuation ids) of `count` examples with lengths like HellaSwag's."""
    rng, requests = np.random.default_rng(0), []

    def ids(mean, deviation):
        return rng.integers(3, vocab_size, max(4, round(rng.normal(mean, deviation)))).tolist()

    for number in range(count):
        context = ids(*CONTEXT_TOKENS)
        requests += [((f'{number}', f'{ending}'), context, ids(*ENDING_TOKENS)) for ending in range(ENDINGS)]
    return requests


def real(path: pathlib.Path, tokenizer: spm.SentencePieceTokenizer, count: int, vocab_size: int) -> list:
    """Returns the same as `synthetic` for random examples of a HellaSwag file; ids above the vocabulary wrap around."""
    with gzip.open(path, 'rt', encoding='utf-8') as file:
        examples = [json.loads(line) for line in file]
    requests = []
    for number in np.random.default_rng(0).permutation(len(examples))[:count]:
        example = examples[number]
        context = f'{example["activity_label"]}: {example["ctx"]}'
        head = tokenizer.encode(context)
        for ending in example['endings']:
            whole = np.array(tokenizer.encode(f'{context} {ending}')) % vocab_size
            requests.append(((context, ending), whole[: len(head)].tolist(), whole[len(head) :].tolist()))
    return requests


def peers(config: ModelConfig, folder: pathlib.Path) -> dict:
    """Returns {name: function from requests to (log-likelihood, greedy) pairs}, all of the same random weights."""
    params = jax.tree.map(np.asarray, jax.jit(model.init_params, static_argnums=0)(config, jax.random.key(0)))
    texts = (f'{i} words of some text for a tokenizer' for i in range(1_000))
    spm.train(texts, folder / 'tokenizer.model', 300)
    convert.export(params, config, folder / 'tokenizer.model', folder / 'export')
    ours = lm.JaxLM(params, config, spm.SentencePieceTokenizer(folder / 'tokenizer.model'))
    theirs = huggingface.HFLM(pretrained=str(folder / 'export'), dtype='float32', device='cpu', add_bos_token=False)

    def hf(batch_size: int):
        def answer(requests):
            theirs.batch_size_per_gpu = batch_size
            return theirs._loglikelihood_tokens(requests, disable_tqdm=True)

        return answer

    return {'ours': lambda requests: ours._loglikelihood_tokens(requests, disable_tqdm=True)} | {
        f'hf, batch {size}': hf(size) for size in BATCH_SIZES
    }


def seconds_of(answer, requests, clock) -> tuple[float, list]:
    """Returns (seconds for all requests, the answers)."""
    start = clock()
    answers = answer(requests)
    return clock() - start, answers


def check_answers(answers: dict) -> None:
    """Exits unless all log-likelihoods agree."""
    first, *others = answers.items()
    for name, theirs in others:
        worst = max(abs(a - b) for (a, _), (b, _) in zip(first[1], theirs, strict=True))
        print(f'{first[0]} and {name}: largest difference {worst:.1e} nats')
        if not worst <= TOLERANCE:
            sys.exit(f'the log-likelihoods differ by {worst:.1e}, more than {TOLERANCE}')


def measure(answerers: dict, requests: list, repeats: int, clock) -> dict:
    """Returns seconds of each for all requests, in turns of alternating order."""
    seconds = {name: [] for name in answerers}
    for repeat in range(repeats):
        for name in list(answerers)[:: 1 if repeat % 2 else -1]:
            seconds[name].append(seconds_of(answerers[name], requests, clock)[0])
    return seconds


def report(seconds: dict, examples: int) -> float:
    """Prints examples/s and ratios; returns the ratio to the best of the others."""
    for name, values in seconds.items():
        print(f'{name:12} {examples / statistics.median(values):8.2f} examples/s (best {examples / min(values):.2f})')
    best = min((name for name in seconds if name != 'ours'), key=lambda name: statistics.median(seconds[name]))
    ratios = [theirs / ours for theirs, ours in zip(seconds[best], seconds['ours'], strict=True)]
    print(f'ours / {best}: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})')
    return statistics.median(ratios)


def main() -> None:
    """Reads the flags, runs all and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--shape', choices=('tiny', '120m'), default='tiny')
    parser.add_argument('--examples', type=int, default=64)
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--cpu_time', action='store_true', help='measure processor time instead of wall time')
    parser.add_argument('--data', type=pathlib.Path, help="HellaSwag's validation.jsonl.gz; else random ids")
    parser.add_argument('--tokenizer', type=pathlib.Path, help="Llama's tokenizer.model, with --data")
    flags = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: flags.threads])  # XLA takes a thread per core it may use
    torch.set_num_threads(flags.threads)

    xla.set_up_jax()
    config = shape(flags.shape)
    if flags.data:
        requests = real(flags.data, spm.SentencePieceTokenizer(flags.tokenizer), flags.examples, config.vocab_size)
    else:
        requests = synthetic(flags.examples, config.vocab_size)
    tokens = sum(len(context) + len(continuation) for _, context, continuation in requests)
    print(f'{flags.shape}: {flags.examples} examples, {len(requests)} requests, {tokens:,} tokens')
    with tempfile.TemporaryDirectory(prefix='tinyllama-bench-') as folder:
        answerers = peers(config, pathlib.Path(folder))
        first = {name: seconds_of(answer, requests, time.perf_counter) for name, answer in answerers.items()}
        for name, (seconds, _) in first.items():
            print(f'{name:12} first time {seconds:.1f} s')
        check_answers({name: answers for name, (_, answers) in first.items()})
        clock = time.process_time if flags.cpu_time else time.perf_counter
        report(measure(answerers, requests, flags.repeats, clock), flags.examples)


if __name__ == '__main__':
    main()
