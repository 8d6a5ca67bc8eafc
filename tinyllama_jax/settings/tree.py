"""Reads configurations back from the dictionaries of `config.to_dict`, and compares such dictionaries."""

import dataclasses
import hashlib
import json
import pathlib
import typing
from collections.abc import Mapping
from typing import Any

from tinyllama_jax import errors
from tinyllama_jax.config import Config, to_dict


class Unreadable(errors.UsageError):
    """A run's config.json that is damaged. `train --config` writes it anew."""


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the content of a config.json with its SHA-256, by which `read_file` knows later changes."""
    rest = {name: value for name, value in content.items() if name != 'sha256'}
    return rest | {'sha256': hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()}


def read_file(path: pathlib.Path) -> dict[str, Any]:
    """Returns the content of a run's config.json.

    Raises UsageError if it is not a run's, and Unreadable if it is not JSON or was changed since it was written.
    """
    anew = f'main.py train --config=FILE --workdir={path.parent} writes it anew'
    try:
        content = json.loads(path.read_text(encoding='utf-8-sig'))
    except (ValueError, RecursionError) as error:
        raise Unreadable(f'{path} is not valid JSON: {error}; mend it, or {anew}.') from None
    if isinstance(content, dict) and content.get('sha256') not in (None, sealed(content)['sha256']):
        raise Unreadable(f'{path} was changed since it was written: it does not have its sha256; {anew}.')
    if isinstance(content, dict) and isinstance(content.get('config'), dict):
        return content
    if isinstance(content, dict) and 'model_type' in content:
        remedy = f'evaluate --model={path.parent} takes it, and main.py import --input={path.parent} makes a run of it'
        raise errors.usage(f'--workdir={path.parent}', f'this is a Hugging Face folder, not a run; {remedy}')
    raise errors.usage(str(path), 'this is not the config.json of a run; give another --workdir')


def from_dict(values: Mapping[str, Any], kind: Any = Config) -> Any:
    """Inverts `to_dict`; a missing field takes its default. Raises UsageError for an unknown field, or no group."""
    if not isinstance(values, Mapping):
        raise errors.UsageError(f'{kind.__name__} is {values!r}, not a group of settings; was config.json edited?')
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise errors.UsageError(f'{kind.__name__} has no field {unknown[0]!r}; was it written by another version?')
    fields = {}
    for name, value in values.items():
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            value = from_dict(value, hint)
        elif typing.get_origin(hint) is Mapping:
            value = {key: from_dict(entry, typing.get_args(hint)[1]) for key, entry in dict(value or {}).items()}
        fields[name] = tuple(value) if isinstance(value, list) else value
    return kind(**fields)


def completed(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a saved `to_dict` tree with every field that it lacks, at its default."""
    return to_dict(from_dict(config))


def differences(old: Any, new: Any, prefix: str = '') -> dict[str, tuple[Any, Any]]:
    """Returns {dotted field: (old, new)} for every leaf in which two `to_dict` trees differ."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return {} if old == new else {prefix: (old, new)}
    changes = {}
    for key in {**old, **new}:
        changes |= differences(old.get(key), new.get(key), f'{prefix}.{key}' if prefix else key)
    return changes
