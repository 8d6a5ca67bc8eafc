"""Package versions and the commit."""

import os
import subprocess

import pytest

from tinyllama_jax.process import versions


def test_versions_name_what_decides_the_numbers():
    assert {'python', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy'} <= set(versions.installed())


def test_the_commit_is_that_of_the_code():
    head = subprocess.run(['git', 'rev-parse', 'HEAD'], capture_output=True, text=True)
    if head.returncode:
        pytest.skip('the tests do not run in a git checkout')
    assert versions.commit().partition('+')[0] == head.stdout.strip()


@pytest.fixture
def code(tmp_path, monkeypatch):
    (tmp_path / 'main.py').write_text('1')
    monkeypatch.setattr(versions, '_ROOT', tmp_path)
    monkeypatch.delenv('TINYLLAMA_COMMIT', raising=False)
    versions.commit.cache_clear()
    yield tmp_path
    versions.commit.cache_clear()


def _commit():
    versions.commit.cache_clear()
    return versions.commit()


def test_other_uncommitted_changes_are_another_code(code):
    for arguments in ('init -q', 'add .', '-c user.name=x -c user.email=x commit -q -m x'):
        subprocess.run(['git', *arguments.split()], cwd=code, check=True)
    clean = _commit()
    assert len(clean) == 40
    (code / 'main.py').write_text('2')
    changed = _commit()
    (code / 'main.py').write_text('3')
    assert changed.startswith(f'{clean}+changes-') and _commit().startswith(f'{clean}+changes-') != changed
    # A container's user is not the checkout's owner; git refuses to read such a checkout unless it is told to.
    if os.geteuid() == 0:
        for path in (code, *code.rglob('*')):
            os.chown(path, 1234, 1234)
        assert _commit().startswith(clean)


def test_a_copy_within_another_checkout_is_named_by_its_code(code, monkeypatch):
    for arguments in ('init -q', 'add .', '-c user.name=x -c user.email=x commit -q -m x'):
        subprocess.run(['git', *arguments.split()], cwd=code, check=True)
    (code / 'copy').mkdir()
    (code / 'copy' / 'main.py').write_text('1')
    monkeypatch.setattr(versions, '_ROOT', code / 'copy')
    first = _commit()
    (code / 'copy' / 'main.py').write_text('2')
    assert first.startswith('files-') and _commit() != first


def test_outside_a_checkout_the_code_itself_names_it(code, monkeypatch, capsys):
    monkeypatch.setenv('GIT_CEILING_DIRECTORIES', str(code.parent))
    first = _commit()
    (code / 'main.py').write_text('2')
    assert first.startswith('files-') and _commit() != first and capsys.readouterr().err == ''
    (code / '.git').mkdir()
    _commit()
    assert capsys.readouterr().err.startswith(f'the commit of {code} is unknown (')
    monkeypatch.setenv('TINYLLAMA_COMMIT', 'abc')
    assert _commit() == 'abc'
