"""Paths as users give them; files that are either complete or absent."""

import os

import pytest

from tinyllama_jax import errors, files


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


def test_what_is_no_file_is_written_in_place(tmp_path):
    os.mkfifo(tmp_path / 'pipe')
    reader = os.open(tmp_path / 'pipe', os.O_RDONLY | os.O_NONBLOCK)
    files.write_atomically(tmp_path / 'pipe', 'text')
    assert os.read(reader, 9) == b'text' and os.listdir(tmp_path) == ['pipe']
    os.close(reader)


def test_a_file_that_is_a_mount_point_is_written_in_place(tmp_path, monkeypatch):
    def busy(*_):
        raise OSError(16, 'Device or resource busy')

    monkeypatch.setattr(os, 'replace', busy)
    files.write_atomically(tmp_path / 'file', 'text')
    assert (tmp_path / 'file').read_text() == 'text' and os.listdir(tmp_path) == ['file']


@pytest.mark.parametrize(
    ('given', 'path'),
    [
        ('runs/a', 'runs/a'),
        ('~', '/elsewhere'),
        ('~/runs/a', '/elsewhere/runs/a'),
        ('a~b', 'a~b'),
        (['~/a', 'x-105b=~/b', 'c'], ['/elsewhere/a', 'x-105b=/elsewhere/b', 'c']),
        (None, None),
        ([], []),
    ],
)
def test_a_tilde_is_the_home_folder(given, path, monkeypatch):
    monkeypatch.setenv('HOME', '/elsewhere')
    assert files.local_paths('--workdir', given) == path


@pytest.mark.parametrize('given', ['gs://bucket/run', 's3://a', 'hdfs://a:1/b', ['x=gs://b'], '~no-such-user/a'])
def test_what_is_not_on_this_machine_is_refused(given):
    with pytest.raises(
        errors.UsageError, match='--workdir: .*(is an address, and only folders|there is no home folder)'
    ):
        files.local_paths('--workdir', given)
