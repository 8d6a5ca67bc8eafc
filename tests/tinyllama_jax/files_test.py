"""Files that are either complete or absent."""

import os

import pytest

from tinyllama_jax import files


def test_text_and_bytes_replace_what_was_there(tmp_path):
    path = tmp_path / 'file'
    files.write_atomically(path, 'naïve\n')
    assert path.read_bytes() == 'naïve\n'.encode()
    files.write_atomically(str(path), b'\x00\r\n')
    assert path.read_bytes() == b'\x00\r\n' and os.listdir(tmp_path) == ['file']


def test_a_write_that_fails_leaves_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / 'file'
    path.write_text('old')

    def full(_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError, match='No space'):
        files.write_atomically(path, 'new')
    assert path.read_text() == 'old'
