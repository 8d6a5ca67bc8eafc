"""What each setting decides about a run, and so which may change when the run resumes."""

import fnmatch
import pathlib
import shlex
from typing import Any

from tinyllama_jax import config as config_lib
from tinyllama_jax import errors
from tinyllama_jax.config import Config
from tinyllama_jax.settings import tree

# (setting, what it decides); the first row that fits counts. A setting without a row decides none of these. Data is
# bound by its fingerprint instead.
#   weights  the shapes and the meaning of the saved numbers: it may never change
#   run      what has been trained on and how: it may change only where nothing has been trained yet, after an import
#   losses   losses of steps to come: it may change; losses logged before are then not compared with recomputed ones
_DECIDES = (
    ('model.compute_dtype', 'losses'),
    ('model.scan_layers', 'losses'),
    ('model.seq_len', 'run'),
    ('model.init', 'run'),
    ('model.*', 'weights'),
    ('optimizer.name', 'weights'),  # another one has another state
    ('optimizer.*', 'losses'),
    ('data.document_mask', 'run'),
    ('data.restart_positions', 'run'),
    ('seed', 'run'),
    ('train.global_batch_size', 'run'),
    ('train.num_steps', 'losses'),  # the learning rate's schedule ends there
    ('train.micro_batch_size', 'losses'),
    ('train.remat', 'losses'),
    ('train.gradient_dtype', 'losses'),
    ('train.deterministic', 'losses'),
    ('train.z_loss', 'losses'),
    ('mesh.*', 'losses'),
    ('kernels.*', 'losses'),
)


def changes(before: Any, now: Any, *kinds: str) -> dict[str, tuple[Any, Any]]:
    """Returns {dotted field: (before, now)} of the settings that differ and decide one of `kinds`.

    `before` and `now` are trees of `config.to_dict`, or the same parts of two.
    """

    def decides(field: str) -> str | None:
        return next((kind for setting, kind in _DECIDES if fnmatch.fnmatchcase(field, setting)), None)

    different = tree.differences(before, now)
    return {f'config.{field}': values for field, values in different.items() if decides(field) in kinds}


def same_losses(before: dict[str, Any] | None, now: dict[str, Any]) -> bool:
    """Returns whether two starts of a run must compute the same losses, digit for digit.

    `before` and `now` are the contents of the run's config.json at the two starts; `before` is None for a new run.
    """
    if before is None or any(before[key] != now[key] for key in ('commit', 'versions', 'devices')):
        return False
    return not changes(before['config'], now['config'], 'weights', 'run', 'losses')


def check_resume(config: Config, fingerprint: str, folder: pathlib.Path, meta: dict[str, Any]) -> None:
    """Raises UsageError for the first setting in which `config` contradicts a checkpoint's `meta`, or for other data.

    Args:
      fingerprint: of the data that the run is about to read.
      folder: the run's workdir.
    """
    saved, wanted = tree.completed(meta['config']), config_lib.to_dict(config)
    trained = meta['data'] is not None  # None: imported, and not trained since
    contradictions = changes(saved, wanted, 'weights', *['run'] * trained)
    if trained and not contradictions and meta['data'] != fingerprint:
        contradictions = tree.differences(saved['data'], wanted['data'], 'config.data') or {
            'data (the store behind it)': (meta['data'][:12], fingerprint[:12])
        }
    for field, (old, new) in contradictions.items():
        raise errors.UsageError(
            f'{field} is {new}, but {folder} was trained with {old} up to step {meta["step"]}. Set it back, or start '
            f'a new run with --workdir={shlex.quote(f"{folder}-2")}.'
        )
