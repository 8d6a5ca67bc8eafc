"""Whether a run may go on from a checkpoint: what must not have changed since, and what to do where it has."""

import pathlib
from typing import Any

from tinyllama_jax import checkpoint, errors
from tinyllama_jax import config as config_lib
from tinyllama_jax.config import Config
from tinyllama_jax.run import workdir
from tinyllama_jax.settings import tree


def check(config: Config, fingerprint: str, folder: pathlib.Path, command: str, meta: dict[str, Any]) -> None:
    """Raises UsageError for the first setting in which `config` contradicts a checkpoint's `meta`, or for other data.

    `fingerprint` is the data's now, `folder` and `command` are the run's.
    """
    saved = checkpoint.fixed_settings(tree.from_dict(meta['config']))
    wanted = checkpoint.fixed_settings(config)
    if meta['data'] is None:  # imported, not trained yet: only the weights' shapes and meaning bind
        saved, wanted = ({'model': workdir.weights_settings(settings['model'])} for settings in (saved, wanted))
    found = tree.differences(saved, wanted, 'config')
    if not found and meta['data'] not in (None, fingerprint):
        changed = tree.differences(
            tree.completed(meta['config'])['data'], config_lib.to_dict(config.data), 'config.data'
        )
        found = changed or {'data (the store behind it)': (meta['data'][:12], fingerprint[:12])}
    for field, (old, new) in found.items():
        raise errors.UsageError(
            f'{field} is {new}, but {folder} was trained with {old} up to step {meta["step"]}. Set it back, '
            f'or start a new run: python {command.replace(str(folder), f"{folder}-2")}'
        )
