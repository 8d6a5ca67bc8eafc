"""Checkpoints through orbax: asynchronous, complete or absent, checksummed.

A checkpoint at step n is the state after n optimizer steps, as three items:
`params`, `rest` (step and optimizer state) and `meta` (JSON: configuration, data
fingerprint, rows seen, versions, a checksum of every array and a digest of all that). orbax commits a folder
by renaming it, so a killed save leaves only a temporary folder, which the next start
removes. The checksums catch later changes of bytes, which orbax does not notice. If storage, memory or a device fails
while reading, that is not damage: nothing is moved, and the run ends with 75.
"""

import functools
import hashlib
import json
import logging
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


def make_meta(config: Config, fingerprint: str | None, seen: dict[str, int], tokenizer: str | None) -> dict[str, Any]:
    """Returns what is saved beside the arrays.

    Configuration, fingerprint of the data, rows seen of each source, SHA-256 of the tokenizer, versions.
    """
    return {
        'config': config_lib.to_dict(config),
        'data': fingerprint,
        'seen': seen,
        'tokenizer': tokenizer,
        'versions': versions.installed(),
    }


@jax.jit
def _checksums(tree):
    return jax.tree.map(_checksum, tree)


def _checksum(array):
    """Returns the sum of the array's words times odd numbers of their positions, modulo 2^32.

    Any single changed bit changes it. A sum of integers is the same for every sharding.
    """
    unsigned = jnp.dtype(f'uint{8 * array.dtype.itemsize}')
    bits = jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)
    position, stride = jnp.zeros(array.shape, jnp.uint32), 1
    for axis in reversed(range(array.ndim)):
        position += jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= array.shape[axis]
    return jnp.sum(bits * (2 * position + 1), dtype=jnp.uint32)


def _by_path(tree) -> dict[str, Any]:
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf for path, leaf in flat}


def _named_checksums(tree) -> dict[str, int]:
    return {path: int(value) for path, value in _by_path(jax.device_get(_checksums(tree))).items()}


def _digest(meta: dict[str, Any]) -> str:
    """Returns the SHA-256 of a meta without its own digest, as JSON."""
    rest = {name: value for name, value in meta.items() if name != 'digest'}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _items(state) -> dict[str, Any]:
    return {'params': state.params, 'rest': {'step': state.step, 'opt_state': state.opt_state}}


class Checkpointer:
    """Saves and restores the TrainStates of one run.

    Keeps the newest `keep` checkpoints, and all at multiples of `keep_every`. With
    `read_only` it neither cleans up nor writes, so it can read the folder of a run
    that is training.
    """

    def __init__(self, folder: pathlib.Path, *, keep: int = 1, keep_every: int | None = None, read_only: bool = False):
        for library in ('absl', 'orbax'):
            logging.getLogger(library).setLevel(logging.ERROR)
        self.folder = folder.absolute()
        policies = [LatestN(keep)] + ([EveryNSteps(keep_every)] if keep_every else [])
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy(policies),
            read_only=read_only,
            create=not read_only,
        )
        handlers: dict[str, ocp.CheckpointHandler] = {
            'params': ocp.StandardCheckpointHandler(),
            'rest': ocp.StandardCheckpointHandler(),
            'meta': ocp.JsonCheckpointHandler(),
        }
        if not read_only:
            with checkpoint_errors.writing(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
            for half in self.folder.glob('*.orbax-checkpoint-tmp') if jax.process_index() == 0 else ():
                shutil.rmtree(half)
                print(f'{half}: removed the incomplete checkpoint of an interrupted save.', file=sys.stderr)
        self._manager = checkpoint_errors.read(
            self.folder,
            'the list of checkpoints',
            lambda: ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers),
        )

    def steps(self) -> list[int]:
        """Returns the steps of the complete checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state, meta: dict[str, Any]) -> None:
        """Starts a save, which continues in the background. Raises RunError if this or the previous save failed."""
        items = _items(state)
        meta = meta | {'step': step, 'checksums': {name: _named_checksums(item) for name, item in items.items()}}
        meta['digest'] = _digest(meta)
        arguments = {name: ocp.args.StandardSave(item) for name, item in items.items()}
        with checkpoint_errors.writing(self.folder):
            self._manager.save(step, args=ocp.args.Composite(**arguments, meta=ocp.args.JsonSave(meta)))

    def wait(self) -> None:
        """Returns when every save is complete on disk. Raises RunError if one failed."""
        with checkpoint_errors.writing(self.folder):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def close(self) -> None:
        """Waits for all saves and closes the manager."""
        self.wait()
        self._manager.close()

    def restore(self, abstract_state, check: Callable[[dict], None]):
        """Returns (state, meta) of the newest readable checkpoint, or None if there is no checkpoint.

        `abstract_state` gives shapes and shardings; a checkpoint of any mesh restores onto any other. A damaged
        checkpoint is named and moved aside, and the one before it is restored (with several processes, by their
        next start).

        Args:
          check: may raise UsageError on a checkpoint's meta.

        Raises UsageError if the checkpoint's arrays are not those of `abstract_state`, RunError if all checkpoints are
        damaged, Unavailable if the newest cannot be read for an outside cause.
        """

        def read(step: int):
            meta = self._verified_meta(step)
            check(meta)
            items = {name: self._verified(step, name, item, meta) for name, item in _items(abstract_state).items()}
            if int(items['rest']['step']) != step:
                raise ValueError(f'its state is that of step {items["rest"]["step"]}')
            return items, meta

        if not self.steps():
            return None
        (items, meta), damaged = self._newest(self.steps(), read)
        if damaged:
            aside = checkpoint_errors.set_aside(self.folder, damaged)
            self._manager.reload()
            damage = checkpoint_errors.damage(self.folder, damaged)
            print(f'{damage} Moved to {aside}; resuming from step {meta["step"]}.', file=sys.stderr)
        return type(abstract_state)(items['rest']['step'], items['params'], items['rest']['opt_state']), meta

    def restore_params(self, step: int | None, abstract_params):
        """Returns (parameters, meta) of the checkpoint at `step`, by default the newest readable one."""

        def read(step: int):
            meta = self._verified_meta(step)
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
        """Returns (read(step) for the newest readable checkpoint, {step: error} of the newer, unreadable ones)."""
        checkpoint_errors.ignore_late_reads()
        damaged = {}
        for step in reversed(steps):
            try:
                what, call = f'the checkpoint of step {step}', functools.partial(read, step)
                return checkpoint_errors.read(self.folder / str(step), what, call), damaged
            except errors.Failure:
                raise
            except Exception as error:  # orbax and tensorstore raise many kinds for a broken file
                damaged[step] = error
                if jax.process_count() > 1 and step != steps[0]:  # other processes may have read their parts
                    raise checkpoint_errors.move_aside(self.folder, damaged) from error
        raise errors.RunError(f'{checkpoint_errors.damage(self.folder, damaged)} No readable checkpoint is left here.')

    def _restore(self, step: int, name: str, argument):
        return self._manager.restore(step, args=ocp.args.Composite(**{name: argument}))[name]

    def _verified_meta(self, step: int) -> dict[str, Any]:
        meta = self._restore(step, 'meta', ocp.args.JsonRestore())
        if meta.get('digest', _digest(meta)) != _digest(meta):  # earlier versions wrote none
            raise ValueError('the bytes of meta have changed since they were written')
        if meta['step'] != step:
            raise ValueError(f'it was saved as step {meta["step"]}')
        return meta

    def _verified(self, step: int, name: str, abstract, meta: dict):
        expected = meta['checksums'][name]
        if difference := sorted(expected.keys() ^ _by_path(abstract).keys()):
            where = 'only in the checkpoint' if difference[0] in expected else 'not in the checkpoint'
            raise errors.UsageError(
                f'{self.folder / str(step)} holds {name} of another model or optimizer: {difference[0]} is {where}. '
                'Set model and optimizer back, or start a new run with another --workdir.'
            )
        item = self._restore(step, name, ocp.args.StandardRestore(abstract))
        wrong = [path for path, value in _named_checksums(item).items() if expected.get(path) != value]
        if wrong:
            raise ValueError(f'the bytes of {name}/{wrong[0]} have changed since they were written')
        return item
