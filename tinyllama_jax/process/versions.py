"""The package versions and the git commit that determine a run's numbers."""

import functools
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import subprocess
import sys

_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'tensorstore', 'grain', 'numpy', 'sentencepiece')

_ROOT = pathlib.Path(__file__).parents[2]
_CODE = ('main.py', *(f'{package}/**/*.py' for package in ('kernels', 'tinyllama_jax', 'eval_bridge')))


def installed() -> dict[str, str]:
    """Returns the versions of Python and of the packages that determine a run's numbers."""
    return {'python': platform.python_version()} | {name: importlib.metadata.version(name) for name in _PACKAGES}


@functools.cache
def commit() -> str:
    """Returns what names the code: its git commit, with `+changes-` and their hash if files differ from it.

    Outside a checkout returns TINYLLAMA_COMMIT (which launch/Dockerfile sets), else `files-` and the hash of the code.
    """

    def git(*arguments) -> bytes:
        # A checkout may belong to another user, as in a container. What runs in it is its own code anyway.
        trusting = '-c', 'safe.directory=*', '-c', 'core.fsmonitor=false'
        return subprocess.run(('git', *trusting, '-C', _ROOT, *arguments), capture_output=True, check=True).stdout

    try:
        git('ls-files', '--error-unmatch', 'main.py')  # fails in a copy that lies in a checkout of something else
        head, changes = git('rev-parse', 'HEAD').decode().strip(), git('diff', 'HEAD')
        return head + (f'+changes-{hashlib.sha256(changes).hexdigest()[:8]}' if changes else '')
    except (OSError, subprocess.CalledProcessError) as error:
        if known := os.environ.get('TINYLLAMA_COMMIT'):
            return known
        code = hashlib.sha256()
        for path in sorted(path for package in _CODE for path in _ROOT.glob(package)):
            code.update(path.read_bytes())
        name = f'files-{code.hexdigest()[:16]}'
        if (_ROOT / '.git').exists():
            why = error.stderr.decode(errors='replace') if isinstance(error, subprocess.CalledProcessError) else error
            line = str(why).strip().split('\n')[0]
            print(f'the commit of {_ROOT} is unknown ({line}); config.json names the code by {name}.', file=sys.stderr)
        return name
