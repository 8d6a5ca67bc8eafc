"""A profiler's trace of a few steps of a run, for TensorBoard."""

import contextlib
import pathlib
from collections.abc import Callable

import jax

from tinyllama_jax import errors
from tinyllama_jax.config import TrainConfig


class Profiler:
    """Traces steps profile_step to profile_step + profile_steps - 1; a trace that fails is one line.

    Args:
      say: prints a line.
      enabled: false for a process that takes no profile.
    """

    def __init__(self, config: TrainConfig, folder: pathlib.Path, say: Callable[[str], None], *, enabled: bool):
        self._first, self._count = (config.profile_step if enabled else None), config.profile_steps
        self._folder, self._say, self._tracing = folder, say, False

    def before_step(self, step: int, state) -> None:
        """Starts or stops the trace if it is due before `step`."""
        if step == self._first:
            with self._trying():
                jax.profiler.start_trace(str(self._folder))
                self._tracing = True
        elif self._first and step == self._first + self._count:
            self.stop(state)

    @contextlib.contextmanager
    def _trying(self):
        """A context whose failure is one line: a profile may not end the run."""
        try:
            yield
        except Exception as error:
            self._say(f'no profile ({type(error).__name__}: {errors.first_line(error)})')

    def stop(self, state) -> None:
        """Ends the trace, if there is one, once `state` is computed."""
        if self._tracing:
            self._tracing = False
            # Steps are dispatched ahead; without waiting the trace would end in the middle of the last ones.
            jax.block_until_ready(state)
            with self._trying():
                jax.profiler.stop_trace()
                self._say(f'profile, for TensorBoard: {self._folder}')
