"""Paths as users give them, and files that are either complete or absent."""

import errno
import os
import pathlib
import re
from typing import Any

from tinyllama_jax import errors


def local_paths(where: str, given: Any) -> Any:
    """Returns the path that a user gave at `where`, with `~` expanded; of a list, [NAME=]PATH, each; None for None.

    Raises UsageError for an address, such as gs://bucket.
    """
    if not isinstance(given, str):
        return given and [local_paths(where, entry) for entry in given]
    name, equals, text = given.rpartition('=') if '=~' in given else ('', '', given)
    path = os.path.expanduser(text)
    if path.startswith('~'):
        raise errors.usage(where, f'there is no home folder for {text}; write ./{text} if the name begins with ~')
    if re.match(r'(.*=)?[A-Za-z][A-Za-z0-9+.-]*://', path):
        remedy = 'only folders of this machine are read and written; mount it as one, or copy it to one'
        raise errors.usage(where, f'{text} is an address, and {remedy}')
    return f'{name}{equals}{path}'


def write_atomically(path: str | os.PathLike, content: str | bytes) -> None:
    """Replaces the content of the file `path`: a crash leaves the old content or the new, never a part.

    Text is written as UTF-8. The content is on disk (fsync) before the name points to it. What is no file, such as a
    pipe or /dev/stdout, and a single file that is a mount point are written in place. Raises OSError.
    """
    path = pathlib.Path(path)
    content = content.encode() if isinstance(content, str) else content
    if path.exists() and not path.is_file():
        path.write_bytes(content)
        return
    temporary = path.with_name(path.name + '.tmp')
    with open(temporary, 'wb') as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    try:
        os.replace(temporary, path)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        path.write_bytes(content)
        temporary.unlink()
