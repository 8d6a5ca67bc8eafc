"""Writes files that are either complete or absent."""

import os
import pathlib


def write_atomically(path: str | os.PathLike, content: str | bytes) -> None:
    """Replaces the content of the file `path`: a crash leaves the old content or the new, never a part.

    Text is written as UTF-8. The content is on disk (fsync) before the name points to it. Raises OSError.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(path.name + '.tmp')
    with open(temporary, 'wb') as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
