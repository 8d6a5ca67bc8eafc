"""Storage that fails for a while is tried again; damage is not; what fails for good ends with 75."""

import errno

import pytest

from tinyllama_jax import errors, storage

EIO = ValueError("UNKNOWN: Failed to read 8 bytes: Input/output error [tensorstore_spec='x'] [os_error_code='5']")


@pytest.fixture
def waited(monkeypatch):
    """The seconds that were slept."""
    slept = []
    monkeypatch.setattr(storage.time, 'sleep', slept.append)
    return slept


def _failing(*failures):
    left = list(failures)

    def read():
        if left:
            raise left.pop(0)
        return 'content'

    return read


@pytest.mark.parametrize('failures', [(), (EIO,), (EIO, OSError(errno.ESTALE, 'Stale file handle'))])
def test_it_is_tried_three_times(failures, waited, capsys):
    assert storage.retried('s/rows', _failing(*failures)) == 'content'
    assert waited == [10.0, 20.0][: len(failures)]
    assert capsys.readouterr().err.count('s/rows cannot be read (') == len(failures)


def test_for_good_it_ends_with_75_and_nothing_is_called_damaged(waited):
    with pytest.raises(errors.Unavailable, match='^s/rows cannot be read now .*Input/output error.*Nothing was moved'):
        storage.retried('s/rows', _failing(EIO, EIO, EIO))
    assert sum(waited) == 30


@pytest.mark.parametrize(
    'error', [ValueError('DATA_LOSS: wrong checksum'), FileNotFoundError(2, 'gone'), KeyError('a')]
)
def test_what_the_storage_holds_is_not_tried_again(error, waited):
    with pytest.raises(type(error)):
        storage.retried('s/rows', _failing(error))
    with pytest.raises(errors.UsageError):
        storage.retried('s/rows', _failing(errors.UsageError('no')))
    assert not waited
