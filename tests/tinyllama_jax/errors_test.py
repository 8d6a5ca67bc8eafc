"""Failures: their exit status and the line of a library's error that is shown."""

import re

import pytest

from tinyllama_jax import errors


@pytest.mark.parametrize(
    ('failure', 'status'),
    [
        (errors.RunError('x'), 1),
        (errors.UsageError('x'), 2),
        (errors.DoesNotFit('x'), 3),
        (errors.Unavailable('x'), 75),
        (errors.Stopped('x', 15), 143),
        (errors.Stopped('x', 2), 130),
    ],
)
def test_each_failure_has_its_exit_status(failure, status):
    assert isinstance(failure, errors.Failure) and failure.exit_code == status and str(failure) == 'x'


def test_a_usage_error_begins_with_the_field():
    assert str(errors.usage('config.seed', 'must be >= 0, got -1')) == 'config.seed: must be >= 0, got -1.'


def test_the_first_line_of_an_error_is_its_text_or_its_type():
    assert errors.first_line(ValueError('\n\n one\ntwo')) == 'one'
    assert errors.first_line(ValueError('x' * 9), limit=4) == 'xxxx'
    assert errors.first_line(TimeoutError()) == 'TimeoutError'


@pytest.mark.parametrize(
    ('error', 'status', 'line'),
    [
        (OSError(30, 'Read-only file system', 'w/x'), 2, 'w/x: Read-only file system; give a path that can be'),
        (PermissionError(13, 'Permission denied', 'w'), 2, 'w: Permission denied; give'),
        (OSError(28, 'No space left on device'), 1, 'a file: No space left on device; make room'),
        (
            RuntimeError("Unable to initialize backend 'cuda': none"),
            2,
            "JAX_PLATFORMS=cuda: Unable .*'cuda': none; unset",
        ),
    ],
)
def test_what_is_wrong_with_the_machine_is_one_line(error, status, line, monkeypatch):
    monkeypatch.setenv('JAX_PLATFORMS', 'cuda')
    failure = errors.foreseen(error)
    assert isinstance(failure, errors.Failure) and failure.exit_code == status
    assert re.match(line, str(failure)) and '\n' not in str(failure)


@pytest.mark.parametrize(
    'error', [FileNotFoundError(2, 'x', 'w'), RuntimeError('x'), errors.RunError('x'), OSError('x')]
)
def test_other_errors_stay_as_they_are(error):
    assert errors.foreseen(error) is error
