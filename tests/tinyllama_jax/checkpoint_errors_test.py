"""Which errors of a checkpoint are damage, which have an outside cause, and what is moved aside."""

import json

import jax
import pytest

from tinyllama_jax import checkpoint_errors, errors

# What tensorstore said of reads that failed with EIO, ENOMEM and ESTALE, and of files that were cut and taken away.
_SAID = 'Error opening "zarr" driver: Error reading "lm_head/.zarray": Failed to read 1341 bytes from file at offset 0'


@pytest.mark.parametrize(
    ('error', 'outside'),
    [
        (ValueError(f"UNKNOWN: {_SAID}: Input/output error [tensorstore_spec='x'] [os_error_code='5']"), True),
        (ValueError(f"RESOURCE_EXHAUSTED: {_SAID}: Cannot allocate memory [os_error_code='12']"), True),
        (ValueError(f"ABORTED: {_SAID}: Stale file handle [os_error_code='116'] [source locations='x']"), True),
        (ValueError('OUT_OF_RANGE: Requested byte range [0, 1341) is not valid for value of size 670'), False),
        (ValueError(f"NOT_FOUND: {_SAID}: No such file or directory [os_error_code='2']"), False),
        (PermissionError(13, 'Permission denied'), True),
        (FileNotFoundError('Checkpoint does not exist at /x/6'), False),
        (IsADirectoryError(21, 'Is a directory'), False),
        (MemoryError(), True),
        (jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 bytes.'), True),
        (json.JSONDecodeError('Expecting value', '', 0), False),
    ],
)
def test_which_errors_are_not_the_checkpoint_s_fault(error, outside):
    wrapped = Exception('Encountered error while reading array index')
    wrapped.__cause__ = error
    assert (checkpoint_errors._outside_cause(error) is not None) is outside
    assert (checkpoint_errors._outside_cause(wrapped) is not None) is outside


def test_damaged_checkpoints_are_moved_beside_the_folder_again_and_again(tmp_path):
    folder, errors_by_step = tmp_path / 'checkpoints', {6: ValueError('bad\nbytes'), 4: ValueError('gone')}
    for content in ('first', 'second'):
        for step in ('4', '6', '2'):
            (folder / step).mkdir(parents=True, exist_ok=True)
            (folder / step / 'data').write_text(content)
        failure = checkpoint_errors.move_aside(folder, errors_by_step)
        assert isinstance(failure, errors.Unavailable)
        assert f'damaged checkpoint: {folder}/6, {folder}/4 (step 6: bad).' in str(failure)
        assert [path.name for path in folder.iterdir()] == ['2']
        aside = tmp_path / 'checkpoints-damaged'
        assert {(path.parent.name, path.read_text()) for path in aside.rglob('data')} == {
            ('4', content),
            ('6', content),
        }
    checkpoint_errors.set_aside(folder, errors_by_step)  # another process was quicker


def test_a_write_that_fails_names_folder_and_reason(tmp_path):
    reason = r'c: a checkpoint could not be written \(OSError: .*No space left'
    with pytest.raises(errors.RunError, match=reason), checkpoint_errors.writing(tmp_path / 'c'):
        raise OSError(28, 'No space left on device')
    with pytest.raises(errors.Stopped), checkpoint_errors.writing(tmp_path / 'c'):
        raise errors.Stopped('told to', 15)
