"""The profiler of a run (train_test.py takes a real trace): what fails is one line."""

import jax

from tinyllama_jax.config import TrainConfig
from tinyllama_jax.run import profiler


def test_a_trace_that_fails_is_one_line_and_the_run_goes_on(tmp_path, monkeypatch):
    def failing(_):
        raise RuntimeError('no CUPTI here\nand more')

    said = []
    monkeypatch.setattr(jax.profiler, 'start_trace', failing)
    taken = profiler.Profiler(TrainConfig(profile_step=2, profile_steps=1), tmp_path, said.append, enabled=True)
    for step in (1, 2, 3):
        taken.before_step(step, jax.numpy.zeros(()))
    taken.stop(jax.numpy.zeros(()))
    assert said == ['no profile (RuntimeError: no CUPTI here)']
