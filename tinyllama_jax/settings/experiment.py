"""From a command line to a Config: experiment files, `--config.x.y=value` overrides, a workdir's own settings."""

import dataclasses
import difflib
import importlib.util
import json
import os
import pathlib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from tinyllama_jax import errors
from tinyllama_jax.config import Config, validated
from tinyllama_jax.settings import tree


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Takes `--config.x.y=value` (or `--config.x.y value`) out of a command line: (the rest, [(x.y, value)])."""
    rest, overrides, arguments = [], [], iter(arguments)
    for argument in arguments:
        path, equals, value = argument.lstrip('-').partition('=')
        if argument.startswith('-') and path.startswith('config.'):
            overrides.append((path.removeprefix('config.'), value if equals else next(arguments, '')))
        else:
            rest.append(argument)
    return rest, overrides


def load_experiment(spec: str) -> Config:
    """The configuration that FILE[:arg] describes: `get_config(arg)` of that Python file."""
    file, _, arg = spec.partition(':')
    if not os.path.isfile(file):
        raise errors.UsageError(f'--config={spec}: there is no file {file}; the experiments are in configs/.')
    module_spec = importlib.util.spec_from_file_location('experiment', file)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    try:
        return module.get_config(arg)
    except (ValueError, TypeError) as error:  # an unknown variant, an unknown field
        raise errors.UsageError(f'--config={spec}: {error}') from error


def resolve(
    experiment: str | None,
    workdir: pathlib.Path | None,
    overrides: Sequence[tuple[str, str]],
    *,
    required: bool = True,
) -> Config | None:
    """The validated configuration of an experiment file, else of a workdir, with overrides.

    Without either: None, or UsageError if one is `required`.
    """
    record = workdir / 'config.json' if workdir else None
    if experiment:
        config = load_experiment(experiment)
    elif record and record.exists():
        config = tree.from_dict(json.loads(record.read_text())['config'])
    elif overrides or required:
        raise errors.UsageError('--config=FILE is missing, for example --config=configs/demo.py.')
    else:
        return None
    for path, text in overrides:
        config = override(config, path, text)
    return validated(config)


def override(config: Config, path: str, text: str) -> Config:
    """Returns `config` with the field at dotted `path` set from a command line's `text`.

    `none` resets an optional field, and removes an entry of a dictionary; a path
    through a new dictionary key makes the entry. Raises UsageError naming the
    nearest valid field, or the type that was expected.
    """
    return _override(config, path.split('.'), text, f'--config.{path}')


def _override(node: Any, path: list[str], text: str, flag: str) -> Any:
    name, rest = path[0], path[1:]
    hints = typing.get_type_hints(type(node))
    if name not in hints:
        near = difflib.get_close_matches(name, hints, n=1, cutoff=0) or list(hints)
        raise errors.usage(flag, f'{type(node).__name__} has no field {name!r}; the nearest is {near[0]!r}')
    value, hint = getattr(node, name), hints[name]
    if typing.get_origin(hint) is Mapping:
        new = _override_entry(value, typing.get_args(hint)[1], rest, text, flag)
    elif dataclasses.is_dataclass(value):
        if not rest:
            fields = ', '.join(field.name for field in dataclasses.fields(value))
            raise errors.usage(flag, f'{name} is a group; set one of its fields: {fields}')
        new = _override(value, rest, text, flag)
    elif rest:
        raise errors.usage(flag, f'{name} has no fields below it')
    else:
        new = _parsed(text, hint, flag)
    return dataclasses.replace(node, **{name: new})


def _override_entry(entries: Mapping[str, Any], entry_type: type, path: list[str], text: str, flag: str):
    if not path or (len(path) == 1 and text.lower() != 'none'):
        raise errors.usage(flag, 'name an entry and one of its fields, as NAME.path=DIR (or NAME=none to remove it)')
    if len(path) == 1:
        return {name: entry for name, entry in entries.items() if name != path[0]}
    entry = _override(entries.get(path[0], entry_type()), path[1:], text, flag)
    return {**entries, path[0]: entry}


def _parsed(text: str, hint: Any, flag: str) -> Any:
    if isinstance(hint, types.UnionType):
        if text.lower() == 'none':
            return None
        hint = next(kind for kind in typing.get_args(hint) if kind is not types.NoneType)
    if typing.get_origin(hint) is tuple:
        return tuple(part.strip() for part in text.split(',') if part.strip())
    try:
        if hint is bool:
            return {'true': True, 'false': False}[text.lower()]
        return hint(text)
    except (ValueError, KeyError):
        wanted = {int: 'a whole number', float: 'a number', bool: 'true or false'}[hint]
        raise errors.usage(flag, f'expects {wanted}, got {text!r}') from None
