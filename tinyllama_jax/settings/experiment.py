"""Makes a Config from an experiment file or a workdir, and from `--config.x.y=value` overrides."""

import dataclasses
import difflib
import os
import pathlib
import runpy
import traceback
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from tinyllama_jax import config as config_lib
from tinyllama_jax import errors, fields, files
from tinyllama_jax.config import Config
from tinyllama_jax.settings import tree


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Splits a command line into (other arguments, [(x.y, value)] of `--config.x.y=value` and `--config.x.y value`)."""
    rest, overrides, remaining = [], [], iter(arguments)
    for argument in remaining:
        path, equals, value = argument.lstrip('-').partition('=')
        if argument.startswith('-') and path.startswith('config.'):
            overrides.append((path.removeprefix('config.'), value if equals else next(remaining, '')))
        else:
            rest.append(argument)
    return rest, overrides


def load_experiment(spec: str) -> Config:
    """Returns the configuration that `get_config(arg)` makes in the Python file of FILE[:arg]."""
    file, _, arg = (spec, '', '') if os.path.isfile(spec) or ':' not in spec else spec.rpartition(':')
    if not os.path.isfile(file):
        raise errors.UsageError(f'--config={spec}: there is no file {file}; the experiments are in configs/.')
    if not file.endswith('.py'):
        of_a_run = f'; the settings of a run are read by --workdir={os.path.dirname(file) or "."} alone'
        raise errors.usage(
            f'--config={spec}',
            f'an experiment is a Python file, such as configs/demo.py{of_a_run if file.endswith(".json") else ""}',
        )
    try:
        get_config = runpy.run_path(file).get('get_config')
        config = get_config(arg) if get_config else None
    except (ValueError, TypeError) as error:  # an unknown variant, an unknown field
        raise errors.UsageError(f'--config={spec}: {error}') from error
    except Exception as error:
        line = traceback.extract_tb(error.__traceback__)[-1]
        where = '' if isinstance(error, SyntaxError) else f', line {line.lineno} of {line.filename}'
        raise errors.usage(f'--config={spec}', f'{type(error).__name__}: {error}{where}') from error
    if not isinstance(config, Config):
        raise errors.usage(f'--config={spec}', f'{file} has no function get_config(arg) that returns a Config')
    return config


def resolve(
    experiment: str | None,
    workdir: pathlib.Path | None,
    overrides: Sequence[tuple[str, str]],
    *,
    required: bool = True,
) -> Config | None:
    """Returns the validated configuration of an experiment file, or else of a workdir, with overrides.

    Without either returns None, or raises UsageError if one is `required`. A `~` in a path is expanded.
    """
    path = workdir / 'config.json' if workdir else None
    try:
        saved = tree.read_file(path)['config'] if path and path.exists() else None  # refused here if it is not a run's
    except tree.Unreadable:
        if not experiment:
            raise
        saved = None
    if experiment:
        config = load_experiment(experiment)
    elif saved is not None:
        config = tree.from_dict(saved)
    elif overrides or required:
        raise errors.UsageError('--config=FILE is missing, for example --config=configs/demo.py.')
    else:
        return None
    for field, text in overrides:
        config = override(config, field, text)
    return config_lib.validated(_with_local_paths(config, 'config'))


def _with_local_paths(group: Any, prefix: str) -> Any:
    """Returns a tree of settings with `~` expanded in its paths. Raises UsageError for one that is an address."""
    changed = {}
    for name, hint in typing.get_type_hints(type(group), include_extras=True).items():
        value, field = getattr(group, name), f'{prefix}.{name}'
        if dataclasses.is_dataclass(value):
            changed[name] = _with_local_paths(value, field)
        elif isinstance(value, Mapping):
            changed[name] = {key: _with_local_paths(entry, f'{field}.{key}') for key, entry in value.items()}
        elif isinstance(value, str) and fields.kind_of(hint).is_path:
            changed[name] = files.local_paths(field, value)
    return dataclasses.replace(group, **changed)


def override(config: Config, path: str, text: str) -> Config:
    """Returns `config` with the field at dotted `path` set from a command line's `text`.

    `none` resets an optional field and removes an entry of a dictionary; a path through
    a new dictionary key adds the entry. Raises UsageError that names the nearest valid
    field, or the type that was expected.
    """
    return _override(config, path.split('.'), text, f'--config.{path}')


def _override(node: Any, path: list[str], text: str, flag: str) -> Any:
    name, rest = path[0], path[1:]
    hints = typing.get_type_hints(type(node), include_extras=True)
    if name not in hints:
        near = difflib.get_close_matches(name, hints, n=1, cutoff=0) or list(hints)
        raise errors.usage(flag, f'{type(node).__name__} has no field {name!r}; the nearest is {near[0]!r}')
    value, hint = getattr(node, name), hints[name]
    if typing.get_origin(hint) is Mapping:
        match rest:
            case [entry] if text.lower() == 'none':
                new = {other: group for other, group in value.items() if other != entry}
            case [entry, *below] if below:
                old = value.get(entry, typing.get_args(hint)[1]())
                new = {**value, entry: _override(old, below, text, flag)}
            case _:
                wanted = 'name an entry and one of its fields, as NAME.path=DIR (or NAME=none to remove it)'
                raise errors.usage(flag, wanted)
    elif dataclasses.is_dataclass(value):
        if not rest:
            names = ', '.join(field.name for field in dataclasses.fields(value))
            raise errors.usage(flag, f'{name} is a group; set one of its fields: {names}')
        new = _override(value, rest, text, flag)
    elif rest:
        raise errors.usage(flag, f'{name} has no fields below it')
    else:
        new = _parsed(text, hint, flag)
    return dataclasses.replace(node, **{name: new})


def _parsed(text: str, hint: Any, flag: str) -> Any:
    kind = fields.kind_of(hint)
    if kind.optional and text.lower() == 'none':
        return None
    if kind.type is tuple:
        return tuple(part.strip() for part in text.split(',') if part.strip())
    try:
        if kind.type is bool:
            return {'true': True, 'false': False}[text.lower()]
        return kind.type(text)
    except (ValueError, KeyError):
        raise errors.usage(flag, f'expects {fields.KINDS[kind.type][1]}, got {text!r}') from None
