"""Runs of the 1.1 B model, and of a small one, compiled by the planner for GPUs that are not there."""

import sys

import pytest

from tinyllama_jax.config import Config
from tinyllama_jax.plan import compile as compile_lib
from tinyllama_jax.plan.compile import Compiled
from tinyllama_jax.settings import experiment

# The 1.1 B model is compiled on one of the two stacks; programs are read on both.
large = pytest.mark.skipif(sys.version_info >= (3, 12), reason='takes long, and is done on Python 3.11')
SMALL = """
    model.vocab_size=512 model.seq_len=128 model.num_layers=3 model.embed_dim=512 model.num_heads=8 model.num_kv_heads=4
    model.hidden_dim=1536 train.global_batch_size=64 train.micro_batch_size=2 train.remat=names
""".split()


def config(*overrides: str) -> Config:
    """Returns the paper's configuration with settings as on a command line."""
    return experiment.resolve('configs/tinyllama_1b.py', None, [tuple(text.split('=')) for text in overrides])


def compiled(topology: str, *overrides: str, target: str = 'a100-40gb') -> Compiled:
    """Returns the step of `config(*overrides)`, compiled for a cluster."""
    return compile_lib.compile_step(config(*overrides), compile_lib.make_cluster(target, topology))
