"""Checkpoints through orbax: asynchronous, whole or absent, checksummed, and what may change on resume.

A checkpoint at step n is the state after n optimiser steps, as three items:
`params`, `rest` (step and optimiser state) and `meta` (JSON: configuration, data
fingerprint, rows seen, versions, a checksum of every array). orbax commits a folder
by renaming it, so a killed save leaves nothing behind; the checksums catch what
changes afterwards, which orbax does not. What cannot be read now, because storage,
memory or a device fails, is not damage: nothing is moved, and the run ends with 75.
"""

import pathlib
import shutil
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, EveryNSteps, LatestN

from tinyllama_jax import checkpoint_errors, errors
from tinyllama_jax import config as config_lib
from tinyllama_jax.config import Config
from tinyllama_jax.process import versions


def fixed_settings(config: Config) -> dict[str, Any]:
    """The settings that a resumed run may not change: the model, what its tokens see, the seed and the batch."""
    model = config_lib.to_dict(config.model)
    for free in ('compute_dtype', 'scan_layers'):  # how it is computed, not what
        del model[free]
    data = {'document_mask': config.data.document_mask, 'restart_positions': config.data.restart_positions}
    train = {'global_batch_size': config.train.global_batch_size}
    return {'model': model, 'data': data, 'seed': config.seed, 'train': train}


def make_meta(config: Config, fingerprint: str | None, seen: dict[str, int]) -> dict[str, Any]:
    """What is kept beside the arrays: configuration, data fingerprint, rows seen per source, versions."""
    return {
        'config': config_lib.to_dict(config),
        'data': fingerprint,
        'seen': seen,
        'versions': versions.installed(),
    }


@jax.jit
def _checksums(tree):
    return jax.tree.map(_checksum, tree)


def _checksum(array):
    """Sum of the array's bits weighted by odd position numbers, modulo 2^32.

    Any single changed bit changes it, and any sharding gives the same.
    """
    unsigned = jnp.dtype(f'uint{8 * array.dtype.itemsize}')
    bits = jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)
    position, stride = jnp.zeros(array.shape, jnp.uint32), 1
    for axis in reversed(range(array.ndim)):
        position += jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= array.shape[axis]
    return jnp.sum(bits * (2 * position + 1), dtype=jnp.uint32)


def _named_checksums(tree) -> dict[str, int]:
    flat, _ = jax.tree_util.tree_flatten_with_path(_checksums(tree))
    return {jax.tree_util.keystr(path, simple=True, separator='/'): int(value) for path, value in flat}


def _items(state) -> dict[str, Any]:
    return {'params': state.params, 'rest': {'step': state.step, 'opt_state': state.opt_state}}


class Checkpointer:
    """Saves and restores the TrainStates of one run.

    Keeps the newest `keep` checkpoints, and for ever those at multiples of
    `keep_every`. With `read_only` nothing is cleaned up or written, so a running
    training's folder can be read.
    """

    def __init__(self, folder: pathlib.Path, *, keep: int = 1, keep_every: int | None = None, read_only: bool = False):
        checkpoint_errors.quiet_libraries()
        self.folder = folder.absolute()
        policies = [LatestN(keep)] + ([EveryNSteps(keep_every)] if keep_every else [])
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy(policies),
            read_only=read_only,
            create=not read_only,
        )
        handlers = {'params': ocp.StandardCheckpointHandler(), 'rest': ocp.StandardCheckpointHandler()}
        handlers['meta'] = ocp.JsonCheckpointHandler()
        if not read_only:
            with checkpoint_errors.Writing(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
            for half in self.folder.glob('*.orbax-checkpoint-tmp') if jax.process_index() == 0 else ():
                shutil.rmtree(half)
                print(f'{half}: removed half a checkpoint, of a save that was broken off.', file=sys.stderr)
        with checkpoint_errors.reading(self.folder, 'the list of checkpoints'):
            self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

    def steps(self) -> list[int]:
        """Steps of the checkpoints there are, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state, meta: dict[str, Any]) -> None:
        """Begins to save; the write goes on in the background. Raises RunError if this or the last one fails."""
        items = _items(state)
        meta = meta | {'step': step, 'checksums': {name: _named_checksums(item) for name, item in items.items()}}
        arguments = {name: ocp.args.StandardSave(item) for name, item in items.items()}
        with checkpoint_errors.Writing(self.folder):
            self._manager.save(step, args=ocp.args.Composite(**arguments, meta=ocp.args.JsonSave(meta)))

    def wait(self) -> None:
        """Returns when every save is complete on disk; raises RunError if one failed."""
        with checkpoint_errors.Writing(self.folder):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def close(self) -> None:
        """Waits for the saves and releases the manager."""
        self.wait()
        self._manager.close()

    def restore(self, abstract_state, check: Callable[[dict], None]):
        """The newest whole checkpoint as (state, meta), or None where there is none at all.

        `abstract_state` gives shapes and shardings: a checkpoint of any mesh goes onto
        any other. `check` may raise UsageError on the checkpoint's meta. A damaged
        checkpoint is named and moved aside, and the one before it is used (of several
        processes: by the next start); if none is whole: RunError. Unavailable if the newest
        cannot be read for another reason.
        """

        def read(step: int):
            meta = self._restore(step, 'meta', ocp.args.JsonRestore())
            check(meta)
            return {name: self._verified(step, name, item, meta) for name, item in _items(abstract_state).items()}, meta

        if not self.steps():
            return None
        (items, meta), damaged = self._newest(self.steps(), read)
        if damaged:
            aside = checkpoint_errors.set_aside(self.folder, damaged)
            self._manager.reload()
            told = f'{checkpoint_errors.damage(self.folder, damaged)} Moved to {aside}; going on from step '
            print(f'{told}{meta["step"]}.', file=sys.stderr)
        return type(abstract_state)(items['rest']['step'], items['params'], items['rest']['opt_state']), meta

    def restore_params(self, step: int | None, abstract_params):
        """Parameters and meta of the checkpoint at `step`, or of the newest whole one."""

        def read(step: int):
            meta = self._restore(step, 'meta', ocp.args.JsonRestore())
            return self._verified(step, 'params', abstract_params, meta), meta

        steps = self.steps()
        if not steps:
            raise errors.UsageError(f'{self.folder} holds no checkpoint yet: run main.py train first.')
        if step is not None and step not in steps:
            raise errors.UsageError(f'--step={step}: {self.folder} has no such checkpoint; it has {steps}.')
        (params, meta), damaged = self._newest(steps if step is None else [step], read)
        if damaged:
            print(f'{checkpoint_errors.damage(self.folder, damaged)} Using step {meta["step"]}.', file=sys.stderr)
        return params, meta

    def _newest(self, steps: list[int], read: Callable[[int], Any]):
        """What `read` makes of the newest checkpoint it does not fail on, and {step: failure} of the newer ones."""
        checkpoint_errors.ignore_late_reads()
        damaged = {}
        for step in reversed(steps):
            try:
                with checkpoint_errors.reading(self.folder / str(step), f'the checkpoint of step {step}'):
                    return read(step), damaged
            except errors.Failure:
                raise
            except Exception as error:  # orbax and tensorstore raise many kinds for a broken file
                damaged[step] = error
                if jax.process_count() > 1 and step != steps[0]:  # the others may have read their parts of it
                    raise checkpoint_errors.moved(self.folder, damaged) from error
        raise errors.RunError(f'{checkpoint_errors.damage(self.folder, damaged)} No whole checkpoint is left here.')

    def _restore(self, step: int, name: str, argument):
        return self._manager.restore(step, args=ocp.args.Composite(**{name: argument}))[name]

    def _verified(self, step: int, name: str, abstract, meta: dict):
        item = self._restore(step, name, ocp.args.StandardRestore(abstract))
        expected = meta['checksums'][name]
        wrong = [path for path, value in _named_checksums(item).items() if expected.get(path) != value]
        if wrong:
            raise ValueError(f'the bytes of {name}/{wrong[0]} have changed since they were written')
        return item
