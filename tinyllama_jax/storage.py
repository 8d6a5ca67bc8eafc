"""Reads from storage that may fail for a while: three tries over half a minute, then status 75.

Failing storage is not damage: what it holds may be whole, and nothing is deleted or moved for it.
"""

import os
import re
import sys
import time
from collections.abc import Callable
from typing import TypeVar

from tinyllama_jax import errors

_WAITS_S = 10.0, 20.0  # before the second and the third try
_OS_ERROR = re.compile(r"os_error_code='(\d+)'")  # tensorstore raises only ValueErrors, which name errno like this
_MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)  # OSErrors that mean damage
_T = TypeVar('_T')


def failure(error: BaseException | None) -> OSError | None:
    """Returns the error of failing storage that caused `error`, or None if that is of what the storage holds."""
    while error is not None:
        code = _OS_ERROR.search(str(error))
        cause = OSError(int(code[1]), os.strerror(int(code[1]))) if code else error
        if isinstance(cause, OSError) and not isinstance(cause, _MISSING):
            return cause
        error = error.__cause__ or error.__context__
    return None


def retried(
    what: str,
    read: Callable[[], _T],
    failure_of: Callable[[Exception], BaseException | None] = failure,
    otherwise: str = '',
) -> _T:
    """Returns `read()`, which reads `what`, tried three times where storage fails.

    `failure_of` tells storage's failures, of which only OSErrors are worth another try. Raises Unavailable if the last
    try fails too; its message may name another way, `otherwise`. Raises what `read` raises for other causes.
    """
    for wait in (*_WAITS_S, None):
        try:
            return read()
        except errors.Failure:
            raise
        except Exception as error:
            cause = failure_of(error)
            if cause is None:
                raise
            reason = errors.first_line(cause, limit=300)
            if wait is None or not isinstance(cause, OSError):
                raise errors.Unavailable(
                    f'{what} cannot be read now ({reason}). Nothing was moved or changed. Mend the storage or its '
                    f'permissions or free memory, and run the same command again{otherwise}.'
                ) from error
            print(f'{what} cannot be read ({reason}); trying again in {wait:.0f} s', file=sys.stderr)
            time.sleep(wait)
    raise AssertionError('unreachable')
