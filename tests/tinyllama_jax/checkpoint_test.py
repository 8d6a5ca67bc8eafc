"""Checkpoints: whole or absent, retained as configured, resharded, and damage is noticed."""

import dataclasses
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support import tiny
from tinyllama_jax import checkpoint, errors, sharding, storage
from tinyllama_jax import step as step_lib
from tinyllama_jax.config import MeshConfig


@pytest.fixture(scope='module')
def meshes():
    return [sharding.make_mesh(MeshConfig(fsdp=count), jax.devices()[:count]) for count in (8, 4, 1)]


@pytest.fixture(scope='module')
def state(meshes):
    """A state without zeros, which orbax would compress to nothing."""
    rng = np.random.default_rng(1)

    def filled(leaf):
        return jax.device_put(np.asarray(10 * rng.standard_normal(leaf.shape), leaf.dtype), leaf.sharding)

    return jax.tree.map(filled, _abstract(meshes[0]))


def _abstract(mesh):
    return step_lib.abstract_state(tiny.CONFIG, mesh)


def _at(state, step):
    return state._replace(step=jax.device_put(np.int32(step), state.step.sharding))


def _save(folder, state, steps, **retention):
    checkpointer = checkpoint.Checkpointer(folder, **retention)
    for step in steps:
        checkpointer.save(step, _at(state, step), {'note': f'step {step}'})
    checkpointer.wait()
    return checkpointer


def test_newest_are_kept_and_multiples_for_ever(tmp_path, state):
    checkpointer = _save(tmp_path / 'c', state, range(5, 45, 5), keep=2, keep_every=20)
    assert checkpointer.steps() == [20, 35, 40]


def test_restored_on_any_mesh_bit_for_bit(tmp_path, state, meshes):
    checkpointer = _save(tmp_path / 'c', state, [3])
    for mesh in meshes:
        restored, meta = checkpointer.restore(_abstract(mesh), lambda meta: None)
        assert (meta['step'], meta['note']) == (3, 'step 3')
        assert restored.params['embed'].sharding.mesh.size == mesh.size
        for old, new in zip(jax.tree.leaves(_at(state, 3)), jax.tree.leaves(restored), strict=True):
            np.testing.assert_array_equal(np.asarray(old), np.asarray(new))


def test_training_resumes_on_fewer_devices_and_other_axes(tmp_path):
    meshes = [MeshConfig(fsdp=8), MeshConfig(fsdp=2, tensor=2), MeshConfig(data=2, fsdp=2, zero=1), MeshConfig(fsdp=1)]
    batches, losses, checkpointer = tiny.batches(8), [], checkpoint.Checkpointer(tmp_path / 'c')

    def run(mesh_config, state, mesh, steps):
        train_step, found = step_lib.jit_train_step(dataclasses.replace(tiny.CONFIG, mesh=mesh_config), mesh), []
        for rows_ABR in steps:
            state, scalars = train_step(state, rows_ABR, None)
            found.append(float(scalars['loss']))
        return state, found

    for number, mesh_config in enumerate(meshes):
        size = mesh_config.data * mesh_config.fsdp * mesh_config.tensor
        mesh = sharding.make_mesh(mesh_config, jax.devices()[:size])
        if number:
            state, _ = checkpointer.restore(_abstract(mesh), lambda meta: None)
        else:
            state = step_lib.init_state(tiny.CONFIG, mesh)
        state, found = run(mesh_config, state, mesh, batches[2 * number : 2 * number + 2])
        losses += found
        checkpointer.save(2 * number + 2, state, {})
        checkpointer.wait()
    one = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    _, whole = run(MeshConfig(), step_lib.init_state(tiny.CONFIG, one), one, batches)
    np.testing.assert_allclose(losses, whole, atol=1e-5, rtol=0)


def test_without_a_checkpoint_none_is_returned(tmp_path, meshes):
    assert checkpoint.Checkpointer(tmp_path / 'c').restore(_abstract(meshes[0]), lambda meta: None) is None


def test_a_refusal_is_passed_on_and_nothing_is_moved(tmp_path, state, meshes):
    checkpointer = _save(tmp_path / 'c', state, [3])

    def refuse(meta):
        raise errors.UsageError('another model')

    with pytest.raises(errors.UsageError, match='another model'):
        checkpointer.restore(_abstract(meshes[0]), refuse)
    assert checkpointer.steps() == [3]


def test_another_optimizer_s_state_is_refused_and_not_called_damaged(tmp_path, state, meshes, capsys):
    checkpointer = _save(tmp_path / 'c', state, [3, 4], keep=2)
    abstract = _abstract(meshes[0])
    momentum = abstract._replace(opt_state={'momentum': abstract.params})
    with pytest.raises(errors.UsageError, match=r'4 holds rest of another model or optimizer: opt_state/'):
        checkpointer.restore(momentum, lambda meta: None)
    assert checkpointer.steps() == [3, 4] and [path.name for path in tmp_path.iterdir()] == ['c']
    assert 'damaged' not in capsys.readouterr().err


def _damaged_copy(folder, item):
    """A copy (tensorstore keeps what it wrote in memory) in which eight bytes of each file of arrays are turned."""
    copy = folder.with_name('copy')
    shutil.copytree(folder, copy)
    for path in (copy / item).rglob('d/*'):
        data = bytearray(path.read_bytes())
        for position in range(len(data) // 2, len(data) // 2 + 8):
            data[position] ^= 0xFF
        path.write_bytes(data)
    return copy


@pytest.mark.parametrize('item', ['params', 'rest'])
def test_changed_bytes_are_named_and_the_checkpoint_before_is_used(tmp_path, state, meshes, item, capsys):
    _save(tmp_path / 'c', state, [3, 6], keep=2)
    copy = _damaged_copy(tmp_path / 'c', f'6/{item}')
    checkpointer = checkpoint.Checkpointer(copy, keep=2)
    _, meta = checkpointer.restore(_abstract(meshes[2]), lambda meta: None)
    assert meta['step'] == 3
    said = capsys.readouterr().err
    assert f'damaged checkpoint: {copy}/6' in said
    assert 'resuming from step 3' in said
    assert (tmp_path / 'copy-damaged' / '6').is_dir()
    checkpointer.save(6, _at(state, 6), {})
    checkpointer.wait()
    assert checkpointer.steps() == [3, 6]


@pytest.mark.parametrize('missing', ['params', 'rest', 'meta', '_CHECKPOINT_METADATA'])
def test_half_a_checkpoint_is_not_used(tmp_path, state, meshes, missing):
    _save(tmp_path / 'c', state, [3, 6], keep=2)
    (tmp_path / 'c' / '6' / missing).rename(tmp_path / 'gone')
    checkpointer = checkpoint.Checkpointer(tmp_path / 'c', keep=2)
    restored, meta = checkpointer.restore(_abstract(meshes[2]), lambda meta: None)
    assert (
        meta['step'] == int(restored.step) == (6 if missing.startswith('_') else 3)
    )  # the last is orbax's own note, not needed


@pytest.mark.parametrize(('old', 'new'), [(b'"step":', b'"stop":'), (b'step 6', b'step 7'), (b'6', b'5')])
def test_a_changed_meta_is_damage(tmp_path, state, meshes, old, new, capsys):
    _save(tmp_path / 'c', state, [3, 6], keep=2)
    path = tmp_path / 'c' / '6' / 'meta' / 'metadata'
    assert path.read_bytes() != path.read_bytes().replace(old, new)
    path.write_bytes(path.read_bytes().replace(old, new))
    _, meta = checkpoint.Checkpointer(tmp_path / 'c', keep=2).restore(_abstract(meshes[0]), lambda meta: None)
    assert meta['note'] == 'step 3'
    assert 'damaged checkpoint' in capsys.readouterr().err


def test_a_checkpoint_under_another_step_s_name_is_damage(tmp_path, state, meshes, capsys):
    checkpointer = _save(tmp_path / 'c', state, [3, 6], keep=3)
    checkpointer.save(8, _at(state, 7), {})
    checkpointer.close()
    (tmp_path / 'c' / '6').rename(tmp_path / 'c' / '9')
    _, meta = checkpoint.Checkpointer(tmp_path / 'c', keep=3).restore(_abstract(meshes[0]), lambda meta: None)
    assert meta['note'] == 'step 3'
    said = capsys.readouterr().err
    assert 'step 9: it was saved as step 6' in said and '/8' in said


def test_a_save_that_was_killed_is_removed_and_reported(tmp_path, state, capsys):
    _save(tmp_path / 'c', state, [3])
    (tmp_path / 'c' / '6.orbax-checkpoint-tmp' / 'params').mkdir(parents=True)
    assert checkpoint.Checkpointer(tmp_path / 'c', read_only=True).steps() == [3]
    assert checkpoint.Checkpointer(tmp_path / 'c').steps() == [3]
    assert not (tmp_path / 'c' / '6.orbax-checkpoint-tmp').exists()
    assert '6.orbax-checkpoint-tmp: removed the incomplete checkpoint' in capsys.readouterr().err


def test_without_a_whole_checkpoint_nothing_is_moved(tmp_path, state, meshes):
    _save(tmp_path / 'c', state, [3])
    copy = _damaged_copy(tmp_path / 'c', '3/params')
    with pytest.raises(errors.RunError, match='damaged checkpoint: .*No readable checkpoint is left'):
        checkpoint.Checkpointer(copy).restore(_abstract(meshes[2]), lambda meta: None)
    assert (copy / '3').is_dir()


def _unreadable_file(checkpoint):
    (checkpoint / 'meta' / 'metadata').unlink()
    (checkpoint / 'meta' / 'metadata').symlink_to('/proc/self/mem')  # its first bytes give EIO


def _unreadable_folder(checkpoint):
    shutil.rmtree(checkpoint / 'params')
    (checkpoint / 'params').symlink_to('params')  # ELOOP; to os.path.exists it is not there, as after any other error


@pytest.mark.skipif(not pathlib.Path('/proc/self/mem').exists(), reason='needs Linux')
@pytest.mark.parametrize(
    ('spoil', 'said'),
    [(_unreadable_file, 'Input/output error'), (_unreadable_folder, 'Too many levels of symbolic links')],
)
def test_what_cannot_be_read_now_is_not_damage(tmp_path, state, meshes, spoil, said, monkeypatch):
    monkeypatch.setattr(storage, '_WAITS_S', (0.0, 0.0))
    _save(tmp_path / 'c', state, [3, 6], keep=2)
    spoil(tmp_path / 'c' / '6')
    checkpointer, abstract = checkpoint.Checkpointer(tmp_path / 'c', keep=2), _abstract(meshes[2])
    for restore in (
        lambda: checkpointer.restore(abstract, lambda meta: None),
        lambda: checkpointer.restore_params(None, abstract.params),
    ):
        with pytest.raises(
            errors.Unavailable, match=rf'c/6: the checkpoint of step 6 cannot be read now .*{said}.*, move it away'
        ):
            restore()
    assert [path.name for path in tmp_path.iterdir()] == ['c']
    assert checkpointer.steps() == [3, 6]


def test_a_folder_that_cannot_be_listed_or_made_is_named(tmp_path, monkeypatch):
    (tmp_path / 'file').touch()
    with pytest.raises(errors.RunError, match='file/c: a checkpoint could not be written'):
        checkpoint.Checkpointer(tmp_path / 'file' / 'c')

    def refuse(path):
        raise PermissionError(13, 'Permission denied', str(path))

    monkeypatch.setattr(storage, '_WAITS_S', (0.0, 0.0))
    monkeypatch.setattr(os, 'listdir', refuse)  # root may list every folder, whatever its mode
    with pytest.raises(errors.Unavailable, match='c: the list of checkpoints cannot be read now .*Permission denied'):
        checkpoint.Checkpointer(tmp_path / 'c')


def test_parameters_alone_by_step(tmp_path, state, meshes):
    checkpointer = _save(tmp_path / 'c', state, [3, 6], keep=2)
    params, meta = checkpointer.restore_params(3, _abstract(meshes[2]).params)
    assert meta['step'] == 3
    np.testing.assert_array_equal(params['embed'], state.params['embed'])
    with pytest.raises(errors.UsageError, match=r'--step=4: .* it has \[3, 6\]'):
        checkpointer.restore_params(4, _abstract(meshes[2]).params)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'int32'])
def test_any_single_bit_changes_the_checksum(dtype):
    values = np.asarray(jnp.arange(24).reshape(2, 3, 4).astype(dtype))
    expected = int(checkpoint._checksum(jnp.asarray(values)))
    for byte in range(values.nbytes):
        changed = bytearray(values.tobytes())
        changed[byte] ^= 1 << byte % 8
        array = np.frombuffer(changed, values.dtype).reshape(values.shape)
        assert int(checkpoint._checksum(jnp.asarray(array))) != expected


def test_the_checksum_does_not_depend_on_sharding(state, meshes):
    moved = jax.device_put(state.params, jax.tree.map(lambda leaf: leaf.sharding, _abstract(meshes[2]).params))
    assert checkpoint._named_checksums(moved) == checkpoint._named_checksums(state.params)
