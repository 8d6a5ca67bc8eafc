"""Package versions and the commit."""

import subprocess

import pytest

from tinyllama_jax.process import versions


def test_versions_name_what_decides_the_numbers():
    assert {'python', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy'} <= set(versions.installed())


def test_the_commit_is_that_of_the_code():
    head = subprocess.run(['git', 'rev-parse', 'HEAD'], capture_output=True, text=True)
    if head.returncode:
        pytest.skip('the tests do not run in a git checkout')
    assert versions.commit().removesuffix('+changes') == head.stdout.strip()
