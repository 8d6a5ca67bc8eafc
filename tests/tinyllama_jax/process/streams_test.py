"""Standard output and error of a command whose reader ends, whose disk is full, or whose encoding is small."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

START = 'import sys\nfrom tinyllama_jax.process import streams\nstreams.set_up()\n'


def _run(program, **options):
    options = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True, 'cwd': ROOT} | options
    return subprocess.run([sys.executable, '-c', START + program], **options)


def _without_reader() -> int:
    read, write = os.pipe()
    os.close(read)
    return write


MUCH = "for _ in range(9999): print('text')\nprint('done', file=sys.stderr)"


def test_without_a_reader_of_its_output_a_command_ends_quietly():
    done = _run(MUCH, stdout=_without_reader())
    assert (done.returncode, done.stderr) == (141, '')


@pytest.mark.parametrize('full', [False, True])
def test_a_command_that_outlives_its_readers_goes_on(full):
    stdout = os.open('/dev/full', os.O_WRONLY) if full else _without_reader()
    assert _run(f'streams.outlive()\n{MUCH}', stdout=stdout).stderr == 'done\n'
    said = _run("for _ in range(9): print('text', file=sys.stderr)\nprint('done')", stderr=stdout)
    assert (said.returncode, said.stdout) == (0, 'done\n')


def test_a_full_disk_is_no_quiet_end():
    done = _run(MUCH, stdout=os.open('/dev/full', os.O_WRONLY))
    assert done.returncode == 1 and 'No space left on device' in done.stderr


@pytest.mark.parametrize('encoding', ['ascii', 'ascii:surrogateescape'])  # the latter: of the locale C
def test_what_the_encoding_lacks_is_replaced(encoding):
    done = _run("print('na\\u00efve \\ud800')", env=os.environ | {'PYTHONIOENCODING': encoding})
    assert (done.returncode, done.stdout) == (0, 'na?ve ?\n')


def test_closed_streams_do_not_lend_their_numbers_to_files(tmp_path):
    program = "file = open(sys.argv[1], 'w')\nprint('a')\nprint('b', file=sys.stderr)\nfile.write('kept')"
    command = ['sh', '-c', 'exec "$0" -c "$1" "$2" >&- 2>&-', sys.executable, START + program, tmp_path / 'file']
    assert subprocess.run(command, cwd=ROOT).returncode == 0 and (tmp_path / 'file').read_text() == 'kept'
