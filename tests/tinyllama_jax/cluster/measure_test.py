"""Measurements of one process: rates of collectives and files, clocks, the speed of a device."""

import jax
import pytest

from tests.support import tiny
from tinyllama_jax import errors, sharding
from tinyllama_jax.cluster import measure
from tinyllama_jax.cluster import members as cluster
from tinyllama_jax.config import MeshConfig

ALONE = cluster.alone(tiny.CONFIG.train)


@pytest.mark.parametrize(
    ('kind', 'compiled'),
    [('all-gather', 'all-gather'), ('reduce-scatter', 'all-reduce'), ('all-reduce', 'all-reduce')],
)
def test_a_collective_moves_bytes_along_its_axis(kind, compiled):
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=4))
    rate, name = measure.collective(kind, 'fsdp', 1 << 16, mesh, ALONE)
    assert rate > 1e4 and name == compiled


def test_files_are_written_read_and_removed(tmp_path):
    written, read = measure.files(tmp_path / 'new', 1 << 20, ALONE)
    assert written > 1e4 and read > 1e4 and not list((tmp_path / 'new').iterdir())


def test_a_folder_that_is_not_shared_is_refused(tmp_path):
    class Two(cluster.Members):
        count = 2

    two = Two(ALONE.place, None)
    two.hosts = ['host-0', 'host-1']
    with pytest.raises(errors.UsageError, match='does not see in .* what process 1 on host-1 has written there'):
        measure.files(tmp_path, 1 << 10, two)
    assert not list(tmp_path.iterdir())


def test_all_have_removed_their_files_before_one_ends_the_others(tmp_path):
    class Two(cluster.Members):
        count, there = 2, {}

        def gather(self, name, value):
            self.there[name] = [path.name for path in tmp_path.iterdir()]
            return [value, None]

    two = Two(ALONE.place, None)
    two.hosts = ['host-0', 'host-1']
    (tmp_path / 'check-1.tmp').write_bytes(b'this process sees its neighbour, which does not see it')
    with pytest.raises(errors.UsageError, match='process 1 on host-1 does not see in .* what process 0 on host-0 has'):
        measure.files(tmp_path, 1 << 10, two)
    assert 'check-0.tmp' in two.there['read'] and two.there['removed'] == ['check-1.tmp']


def test_clocks_are_compared_with_that_of_process_0():
    class Two(cluster.Members):
        def gather(self, name, value):
            return [value, value + 5.0] if name.startswith('time') else [value, value]

    assert measure.clock_skews(Two(ALONE.place, None)) == pytest.approx([0.0, 5.0])


def test_a_device_has_a_speed():
    assert 1e6 < measure.slowest_device(ALONE) < 1e15
    assert jax.device_count() == 8
