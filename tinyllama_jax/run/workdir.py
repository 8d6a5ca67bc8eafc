"""A run's folder: what the run was (config.json), its tokenizer, and loading its parameters.

config.json        resolved configuration, command, commit, versions, devices of the last start
tokenizer.model    the tokenizer the run trains with
checkpoints/STEP   see checkpoint.py
metrics.jsonl, validation.jsonl, tensorboard/, eval/, report/, store/ (by default)
"""

import dataclasses
import json
import pathlib
from typing import Any

import jax

from tinyllama_jax import checkpoint, errors, files, model
from tinyllama_jax import config as config_lib
from tinyllama_jax.config import Config
from tinyllama_jax.process import signals, versions
from tinyllama_jax.settings import tree

_NOT_OF_WEIGHTS = ('seq_len', 'init', 'compute_dtype', 'scan_layers')


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A checkpoint's parameters (nested dict, float32) with what is needed to use them."""

    config: Config
    params: dict[str, Any]
    step: int
    tokenizer_path: pathlib.Path


def write_record(workdir: pathlib.Path, config: Config, command: str) -> dict[str, Any]:
    """Writes WORKDIR/config.json and returns its content."""
    record = {
        'config': config_lib.to_dict(config),
        'command': command,
        'commit': versions.commit(),
        'versions': versions.installed(),
        'devices': f'{jax.device_count()} x {jax.devices()[0].device_kind}',
    }
    workdir.mkdir(parents=True, exist_ok=True)
    files.write_atomically(workdir / 'config.json', json.dumps(record, indent=2) + '\n')
    return record


def read_record(workdir: pathlib.Path) -> dict[str, Any] | None:
    """The content of WORKDIR/config.json, with settings newer than it at their defaults; None where there is none."""
    path = workdir / 'config.json'
    if not path.exists():
        return None
    record = json.loads(path.read_text())
    return record | {'config': tree.completed(record['config'])}


def same_losses(before: dict[str, Any] | None, now: dict[str, Any]) -> bool:
    """Whether two starts of a run, by their records, must compute the same losses, digit for digit."""
    return (
        before is not None
        and all(before[key] == now[key] for key in ('commit', 'versions', 'devices'))
        and _decisive(before['config']) == _decisive(now['config'])
    )


_DECISIVE = ('num_steps', 'micro_batch_size', 'remat', 'gradient_dtype', 'deterministic', 'z_loss')


def _decisive(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide the losses, out of those a resume may change."""
    train = {name: config['train'][name] for name in _DECISIVE}
    return {name: config[name] for name in ('model', 'optimizer', 'mesh', 'kernels')} | train


def read_config(workdir: pathlib.Path) -> Config:
    """The configuration of a run. Raises UsageError where there is no run."""
    record = read_record(workdir)
    if record is None:
        raise errors.UsageError(f'--workdir={workdir}: there is no config.json; run main.py train or import first.')
    return tree.from_dict(record['config'])


def weights_settings(model: dict[str, Any]) -> dict[str, Any]:
    """Those of a model's settings that given weights decide: shapes, and what the numbers mean."""
    return {name: value for name, value in model.items() if name not in _NOT_OF_WEIGHTS}


def refuse_contradiction(workdir: pathlib.Path, config: Config) -> None:
    """Raises UsageError if a configuration given beside a workdir is not the workdir's own."""
    found = tree.differences(config_lib.to_dict(read_config(workdir)), config_lib.to_dict(config), 'config')
    for field, (old, new) in found.items():
        raise errors.UsageError(f'{field} is {old} in {workdir}/config.json but {new} was given; leave it out.')


def abstract_params(config: Config):
    """Shapes of the parameters, on the first device."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.eval_shape(lambda: model.init_params(config.model, jax.random.key(0)))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), shapes)


def load(workdir: pathlib.Path, config: Config | None = None, step: int | None = None) -> Loaded:
    """The parameters of the checkpoint at `step` (the newest by default), verified.

    A `config` may be given beside the workdir's own; it must describe the same model.
    Raises UsageError where there is no run, no checkpoint or no tokenizer.
    """
    if config is not None:
        refuse_contradiction(workdir, config)
    config = read_config(workdir)
    folder = workdir / 'checkpoints'
    if not folder.is_dir():
        raise errors.UsageError(f'--workdir={workdir}: there is no checkpoint yet; run main.py train first.')
    if missing := missing_tokenizer(workdir):  # said before the weights are read
        raise errors.UsageError(missing)
    checkpointer = checkpoint.Checkpointer(folder, read_only=True)
    params, meta = checkpointer.restore_params(step, abstract_params(config))
    return Loaded(config, params, meta['step'], workdir / 'tokenizer.model')


def missing_tokenizer(workdir: pathlib.Path) -> str | None:
    """What to do where a run has no tokenizer, as after an import of a folder without one; None where it has one."""
    path = workdir / 'tokenizer.model'
    if path.exists():
        return None
    return (
        f'{workdir} has no tokenizer: copy the SentencePiece file that belongs to its weights to {path} '
        '(a tokenizer.json is not enough).'
    )


def keep_tokenizer(workdir: pathlib.Path, source: pathlib.Path) -> None:
    """Copies the run's tokenizer into the workdir, so that it needs no store to be used.

    Raises UsageError where the run already has another one.
    """
    kept = workdir / 'tokenizer.model'
    if kept.exists() and kept.read_bytes() != source.read_bytes():
        raise errors.UsageError(
            f'wrong tokenizer: {workdir} was begun with its own tokenizer.model, but the data was prepared with '
            f'another, {source}; prepare the data with --config.data.tokenizer={kept}, or use a new --workdir.'
        )
    workdir.mkdir(parents=True, exist_ok=True)
    files.write_atomically(kept, source.read_bytes())


def create(workdir: pathlib.Path, config: Config, state, tokenizer_path: pathlib.Path | None, command: str) -> None:
    """Begins a run with a given TrainState of step 0 (an import). Raises UsageError where the folder is not empty."""
    if workdir.exists() and any(workdir.iterdir()):
        raise errors.UsageError(f'--workdir={workdir} is not empty; import needs a new one.')
    with signals.unfinished(workdir):
        checkpointer = checkpoint.Checkpointer(workdir / 'checkpoints')
        checkpointer.save(0, state, checkpoint.make_meta(config, None, {}))
        checkpointer.close()
        if tokenizer_path is not None:
            keep_tokenizer(workdir, tokenizer_path)
        write_record(workdir, config, command)
