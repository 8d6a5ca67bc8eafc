"""A run's folder: its config.json, its tokenizer, and loading its parameters.

config.json        resolved configuration, command, commit, versions and devices of the last start
tokenizer.model    the tokenizer the run trains with; or tokenizer/, the files of a tokenizer.json
imported/          of an imported model: its config.json and generation_config.json, for exports
checkpoints/STEP   see checkpoint.py
metrics.jsonl, validation.jsonl, tensorboard/, eval/, report/, store/ (by default)
"""

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from tinyllama_jax import checkpoint, errors, files, model
from tinyllama_jax import config as config_lib
from tinyllama_jax.config import Config
from tinyllama_jax.process import signals, versions
from tinyllama_jax.run import resume
from tinyllama_jax.settings import tree
from tinyllama_jax.tokenizer import json_file, loading
from tinyllama_jax.tokenizer.base import BaseTokenizer

IMPORTED = 'imported'


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A checkpoint's parameters (nested dict, float32), with the configuration and tokenizer to use them with."""

    config: Config
    params: dict[str, Any]
    step: int
    tokenizer_path: pathlib.Path


def write_config_file(workdir: pathlib.Path, config: Config, command: str) -> dict[str, Any]:
    """Writes WORKDIR/config.json and returns its content."""
    content = tree.sealed(
        {
            'config': config_lib.to_dict(config),
            'command': command,
            'commit': versions.commit(),
            'versions': versions.installed(),
            'devices': f'{jax.device_count()} x {jax.devices()[0].device_kind}',
        }
    )
    workdir.mkdir(parents=True, exist_ok=True)
    files.write_atomically(workdir / 'config.json', json.dumps(content, indent=2) + '\n')
    return content


def read_config_file(workdir: pathlib.Path) -> dict[str, Any] | None:
    """Returns the content of WORKDIR/config.json, newer settings at their defaults; None if there is no such file.

    Raises UsageError if it is not a run's.
    """
    path = workdir / 'config.json'
    if not path.exists():
        return None
    content = tree.read_file(path)
    return content | {'config': tree.completed(content['config'])}


def read_config(workdir: pathlib.Path) -> Config:
    """Returns the configuration of a run. Raises UsageError if there is no run."""
    content = read_config_file(workdir)
    if content is None:
        raise errors.UsageError(f'--workdir={workdir}: there is no config.json; run main.py train or import first.')
    return config_lib.validated(tree.from_dict(content['config']))


def refuse_contradiction(workdir: pathlib.Path, config: Config) -> None:
    """Raises UsageError if a configuration given beside a workdir differs from the workdir's own."""
    changes = tree.differences(config_lib.to_dict(read_config(workdir)), config_lib.to_dict(config), 'config')
    for field, (old, new) in changes.items():
        raise errors.UsageError(f'{field} is {old} in {workdir}/config.json but {new} was given; leave it out.')


def abstract_params(config: Config):
    """Returns the parameters' shapes, dtypes and sharding on the first device."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.eval_shape(lambda: model.init_params(config.model, jax.random.key(0)))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), shapes)


def load(workdir: pathlib.Path, config: Config | None = None, step: int | None = None) -> Loaded:
    """Loads and verifies the parameters of the checkpoint at `step`, by default the newest.

    A `config` given beside the workdir's own must equal it. Raises UsageError if there is no run, no checkpoint
    or no tokenizer.
    """
    if config is not None:
        refuse_contradiction(workdir, config)
    config = read_config(workdir)
    folder = workdir / 'checkpoints'
    if not folder.is_dir():
        raise errors.UsageError(f'--workdir={workdir}: there is no checkpoint yet; run main.py train first.')
    if missing := missing_tokenizer(workdir):  # before the weights, which take longer, are read
        raise errors.UsageError(missing)
    checkpointer = checkpoint.Checkpointer(folder, read_only=True)
    params, meta = checkpointer.restore_params(step, abstract_params(config))
    trained = resume.changes(config_lib.to_dict(config), tree.completed(meta['config']), 'weights')
    for field, (here, there) in trained.items():
        raise errors.UsageError(
            f'{field} is {here} in {workdir}/config.json, but {there} in the checkpoint of step {meta["step"]}; '
            f'main.py train --config=FILE --workdir={workdir} writes config.json anew.'
        )
    return Loaded(config, params, meta['step'], _trained_with(workdir, meta))


def _trained_with(workdir: pathlib.Path, meta: Mapping[str, Any]) -> pathlib.Path:
    """Returns the path of the tokenizer that a checkpoint was trained with. Raises UsageError if it is not there."""
    expected, kept = meta.get('tokenizer'), loading.kept(workdir)
    if expected is None:  # from an earlier version
        return kept
    for path in (kept, workdir / json_file.MODEL):  # an import may have both kinds
        if path.exists() and loading.load(path).sha256 == expected:
            return path
    raise errors.UsageError(
        f'{kept} is not the tokenizer of the checkpoint of step {meta["step"]}, whose sha256 begins with '
        f'{expected[:12]}; copy that one there, for example from the store.'
    )


def load_tokenizer(workdir: pathlib.Path, config: Config, path: pathlib.Path | None = None) -> BaseTokenizer:
    """Returns the run's tokenizer, by default the one that the workdir keeps.

    Of an imported model, the ids that end a text are those of the folder's settings.
    """
    tokenizer = loading.load(path or loading.kept(workdir), adds_bos=config.data.bos)
    if (workdir / IMPORTED).is_dir():
        tokenizer.stop_ids = json_file.stop_ids(workdir / IMPORTED, tokenizer.eos_id)
    return tokenizer


def missing_tokenizer(workdir: pathlib.Path) -> str | None:
    """Returns what to do if the run has no tokenizer (its import had none), or None if it has one."""
    path = loading.kept(workdir)
    if path.exists():
        return None
    return (
        f'{workdir} has no tokenizer: copy the SentencePiece file that belongs to its weights to {path}, or their '
        f'tokenizer.json with the files beside it into {workdir / loading.FOLDER}.'
    )


def keep_tokenizer(workdir: pathlib.Path, source: pathlib.Path) -> None:
    """Copies the tokenizer into the workdir, so that the model can be used without the store.

    Raises UsageError if the workdir already has another one.
    """
    if (kept := loading.kept(workdir)).exists():
        if source.is_dir():
            same = kept.is_dir() and loading.load(kept).sha256 == loading.load(source).sha256
        else:  # an import may have both kinds
            kept = workdir / json_file.MODEL if (workdir / json_file.MODEL).exists() else kept
            same = kept.is_file() and kept.read_bytes() == source.read_bytes()
        if not same:
            raise errors.UsageError(
                f'wrong tokenizer: {workdir} has its own {kept.name}, but the data was prepared with another one, '
                f'{source}; prepare the data with --config.data.tokenizer={kept}, or use a new --workdir.'
            )
        return
    workdir.mkdir(parents=True, exist_ok=True)
    loading.keep(source, workdir)


def create(
    workdir: pathlib.Path,
    config: Config,
    state,
    tokenizer_path: pathlib.Path | None,
    command: str,
    *,
    imported: Sequence[pathlib.Path] = (),
) -> None:
    """Creates a run from a TrainState at step 0 (an import), with copies of the files `imported`.

    Raises UsageError if the folder is not empty.
    """
    if workdir.exists() and any(workdir.iterdir()):
        raise errors.UsageError(f'--workdir={workdir} is not empty; import needs a new one.')
    with signals.unfinished(workdir):
        tokenizer = None
        if tokenizer_path is not None:
            keep_tokenizer(workdir, tokenizer_path)
            tokenizer = loading.load(loading.kept(workdir)).sha256
        checkpointer = checkpoint.Checkpointer(workdir / 'checkpoints')
        checkpointer.save(0, state, checkpoint.make_meta(config, None, {}, tokenizer))
        checkpointer.close()
        (workdir / IMPORTED).mkdir(parents=True, exist_ok=True)
        for path in imported:
            shutil.copyfile(path, workdir / IMPORTED / path.name)
        write_config_file(workdir, config, command)
