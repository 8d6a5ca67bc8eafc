"""Standard output and error that outlast their readers and replace the characters that they cannot encode."""

import io
import os
import sys

_READER_GONE = 141  # the status of a process that SIGPIPE ends
_outlive = False


class _Outlasting(io.FileIO):
    """An open file that becomes the null device when what it is written to is gone."""

    def write(self, data) -> int:
        """Writes bytes, and returns how many."""
        try:
            return super().write(data)
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            if self.fileno() == 1 and not _outlive:
                if isinstance(error, BrokenPipeError):
                    raise SystemExit(_READER_GONE) from None
                error.filename = 'standard output'
                raise
            return memoryview(data).nbytes


def set_up() -> None:
    """Makes both streams replace, by `?`, what they cannot encode, and drop what nobody can read any more.

    A command whose standard output loses its reader (`| head`) ends quietly, with status 141 as by SIGPIPE, unless
    `outlive` was called. Without a reader of standard error every command goes on.
    """
    for number, name in ((1, 'stdout'), (2, 'stderr')):
        stream = getattr(sys, name)
        if stream is None:  # closed by the caller; the next file that is opened would get its number
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
            stream = open(number, 'w', closefd=False)
        wrapper = io.TextIOWrapper(
            io.BufferedWriter(_Outlasting(number, 'w', closefd=False)),
            encoding=stream.encoding,
            errors='replace'
            if stream.errors in ('strict', 'surrogateescape')
            else stream.errors,  # the latter: locale C
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        setattr(sys, name, wrapper)


def outlive() -> None:
    """Makes this command go on when its standard output loses its reader or its disk."""
    global _outlive
    _outlive = True
