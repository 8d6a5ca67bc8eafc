"""Which settings may not change when a run resumes, and which of the others change its losses."""

import pathlib
from typing import Any

from tinyllama_jax import config as config_lib
from tinyllama_jax import errors
from tinyllama_jax.config import Config
from tinyllama_jax.settings import tree

# Settings of a model that decide how its weights are used, not their shapes or what the numbers mean.
_NOT_OF_WEIGHTS = ('seq_len', 'init', 'compute_dtype', 'scan_layers')
# Settings of a model that a resumed run may change: how it is computed, not what.
_FREE_IN_MODEL = ('compute_dtype', 'scan_layers')
# Of the settings of `train` that a resumed run may change, those that decide its losses.
_DECIDES_LOSSES = ('num_steps', 'micro_batch_size', 'remat', 'gradient_dtype', 'deterministic', 'z_loss')


def fixed_settings(config: Config) -> dict[str, Any]:
    """Returns the settings that a resumed run may not change: what decides its state, its data and their order."""
    model = {name: value for name, value in config_lib.to_dict(config.model).items() if name not in _FREE_IN_MODEL}
    return {
        'model': model,
        'optimizer': {'name': config.optimizer.name},  # another one has another state
        'data': {'document_mask': config.data.document_mask, 'restart_positions': config.data.restart_positions},
        'seed': config.seed,
        'train': {'global_batch_size': config.train.global_batch_size},
    }


def weights_settings(model: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings of a model that given weights decide: their shapes, and what the numbers mean."""
    return {name: value for name, value in model.items() if name not in _NOT_OF_WEIGHTS}


def same_losses(before: dict[str, Any] | None, now: dict[str, Any]) -> bool:
    """Returns whether two starts of a run must compute the same losses, digit for digit.

    `before` and `now` are the contents of the run's config.json at the two starts; `before` is None for a new run.
    """

    def decisive(config: dict[str, Any]) -> dict[str, Any]:
        train = {name: config['train'][name] for name in _DECIDES_LOSSES}
        return {name: config[name] for name in ('model', 'optimizer', 'mesh', 'kernels')} | train

    return (
        before is not None
        and all(before[key] == now[key] for key in ('commit', 'versions', 'devices'))
        and decisive(before['config']) == decisive(now['config'])
    )


def check_resume(config: Config, fingerprint: str, folder: pathlib.Path, meta: dict[str, Any]) -> None:
    """Raises UsageError for the first setting in which `config` contradicts a checkpoint's `meta`, or for other data.

    Args:
      fingerprint: of the data that the run is about to read.
      folder: the run's workdir.
    """
    saved, wanted = fixed_settings(tree.from_dict(meta['config'])), fixed_settings(config)
    if meta['data'] is None:  # imported, and not trained since: only the weights and the optimizer's state bind
        saved, wanted = (
            {'model': weights_settings(settings['model']), 'optimizer': settings['optimizer']}
            for settings in (saved, wanted)
        )
    changes = tree.differences(saved, wanted, 'config')
    if not changes and meta['data'] and meta['data'] != fingerprint:
        before = tree.completed(meta['config'])['data']
        changes = tree.differences(before, config_lib.to_dict(config.data), 'config.data')
        changes = changes or {'data (the store behind it)': (meta['data'][:12], fingerprint[:12])}
    for field, (old, new) in changes.items():
        raise errors.UsageError(
            f'{field} is {new}, but {folder} was trained with {old} up to step {meta["step"]}. Set it back, or start '
            f'a new run with --workdir={folder}-2.'
        )
