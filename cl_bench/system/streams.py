"""Standard output and standard error that accept any character, and whose reader may go away."""

import errno
import io
import os
import sys
from typing import Any


class _Lasting(io.FileIO):
    """A file whose reader may go away, as with ``| head`` or a closed terminal: then all output is discarded.

    Any other error is raised once; after it, all output is discarded too.
    """

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            return len(data)


def outlive_readers() -> None:
    """Let this process go on if nobody reads its output; a run is worth more than its table."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or stream is not getattr(sys, f"__{name}__"):  # closed, or replaced by another program
            continue
        stream.flush()
        file = io.BufferedWriter(_Lasting(stream.fileno(), "wb", closefd=False))
        lasting = io.TextIOWrapper(
            file, encoding=stream.encoding, errors="backslashreplace", line_buffering=stream.line_buffering
        )
        setattr(sys, name, lasting)
