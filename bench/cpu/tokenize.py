"""Benchmarks tokenizers in tokens/s per core: ours, sentencepiece, Hugging Face's tokenizers.

    python bench/cpu/tokenize.py [--model=tokenizer.model] [--json=tokenizer.json] [--text=DIR_OR_FILE ...]

Without --model, a model of 4,096 pieces is trained on the Python installation. That is also
the text, unless --text names raw corpora (as prepare reads them). One thread; each library
gets the same documents, alternately, and their ids are compared.
"""

import pathlib
import sys

sys.path.pop(0)  # this folder, whose tokenize.py would hide the standard library's
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import os

os.environ['TOKENIZERS_PARALLELISM'] = 'false'  # before tokenizers is imported

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable

import numpy as np
import sentencepiece

from tinyllama_jax.config import SourceConfig
from tinyllama_jax.data import corpus, inputs, readers
from tinyllama_jax.tokenizer import spm

TRAINED_PIECES = 4_096


def documents(path: str, characters: int) -> list[str]:
    """Returns the first texts of a raw corpus's training split, about `characters` in all."""
    found = inputs.find_inputs('text', SourceConfig(path=path)).splits['train']
    texts, left = [], characters
    for record in itertools.chain.from_iterable(map(readers.read_records, found)):
        if isinstance(record, readers.Record) and record.text:
            texts.append(record.text)
            left -= len(record.text)
        if left <= 0:
            break
    return texts


def timed(encode: Callable[[str], object], texts: list[str]) -> tuple[float, int]:
    """Encodes every text; returns (CPU seconds, tokens)."""
    begin, count = time.process_time(), 0
    for text in texts:
        count += len(encode(text))
    return time.process_time() - begin, count


def hugging_face(path: str) -> Callable[[str], list[int]]:
    """Returns the encoder of a tokenizer.json."""
    import tokenizers  # only where it is asked for

    model = tokenizers.Tokenizer.from_file(path)
    return lambda text: model.encode(text, add_special_tokens=False).ids


def compare(name: str, texts: list[str], model: pathlib.Path, json: str | None, repeats: int) -> None:
    """Prints a line for each library."""
    plain = sentencepiece.SentencePieceProcessor(model_file=str(model)).encode
    ours = spm.SentencePieceTokenizer(model)
    encoders = {
        'sentencepiece': plain,
        'ours, warm': lambda text: ours.encode_document(text, bos=False, eos_per_document=0),
    }
    if json:
        encoders['tokenizers'] = hugging_face(json)
    cold = timed(encoders['ours, warm'], texts)
    times = {label: [] for label in encoders}
    for _ in range(repeats):
        for label, encode in encoders.items():
            times[label].append(timed(encode, texts)[0])
    tokens = timed(plain, texts)[1]
    rates = {'ours, cold': tokens / cold[0], **{label: tokens / np.median(taken) for label, taken in times.items()}}
    for label, rate in rates.items():
        print(f'{name}: {label:14} {rate / 1e6:6.2f} Mtok/s/core, {rate / rates["sentencepiece"]:5.2f} x sentencepiece')
    for label, encode in encoders.items():
        different = sum(list(encode(text)) != plain(text) for text in texts)
        if different:
            print(f'{name}: {label} gives other ids on {different} of {len(texts)} documents')


def main() -> None:
    """Prints a block of lines for each text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', type=pathlib.Path, help='a SentencePiece model; default: one is trained')
    parser.add_argument('--json', help='the same model as a tokenizer.json, to compare with Hugging Face tokenizers')
    parser.add_argument('--text', nargs='*', default=[], help='raw corpora; default: the Python installation')
    parser.add_argument('--characters', type=int, default=8_000_000, help='of each text')
    parser.add_argument('--repeats', type=int, default=3, help='measurements; the median is printed')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix='tinyllama-bench-') as folder:
        if not args.text or not args.model:
            sources = {'prose': SourceConfig(format='jsonl'), 'code': SourceConfig(format='parquet')}
            default = [source.path for source in corpus.with_paths(sources, pathlib.Path(folder)).values()]
        model, texts = args.model, args.text or default
        if not model:
            model = pathlib.Path(folder, 'trained.model')
            sample = [text for path in default for text in documents(path, 2_000_000)]
            spm.train(sample, model, TRAINED_PIECES)
        for path in texts:
            found = documents(path, args.characters)
            print(f'{path}: {len(found)} documents, {sum(map(len, found)) / 1e6:.1f} M characters')
            compare(pathlib.Path(path).name, found, model, args.json, args.repeats)


if __name__ == '__main__':
    main()
