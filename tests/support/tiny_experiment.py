"""An experiment of seconds, for tests that run the real command line: CORPUS is set by the test."""

import dataclasses
import os

from tests.support import tiny
from tinyllama_jax.config import DataConfig, SourceConfig


def get_config(arg=''):
    """Two sources of plain text below $CORPUS and a tokenizer trained on them."""
    corpus = os.environ['CORPUS']
    sources = {name: SourceConfig(path=f'{corpus}/{name}', weight=w) for name, w in (('prose', 0.7), ('code', 0.3))}
    return dataclasses.replace(
        tiny.CONFIG,
        model=dataclasses.replace(tiny.CONFIG.model, vocab_size=320),
        data=DataConfig(sources=sources, tokenizer_pieces=320, holdout_min_rows=8, workers=1),
        train=dataclasses.replace(tiny.CONFIG.train, num_steps=int(arg or 20)),
    )
