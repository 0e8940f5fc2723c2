"""Work done in shares, all but the first of them by helper processes.

A helper runs a file of this package as a script, with nothing installed in reach, so that it is there in 20 ms:
neither numpy nor detkit is imported. What it is asked and what it answers are files, since a pipe would be full while
this process is busy with its own share.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from typing import IO


def processes() -> int:
    """Return how many processes may read at a time: ``DETKIT_WORKERS``, else the cores this process may use."""
    given = os.environ.get("DETKIT_WORKERS", "")
    if given.isdecimal() and int(given):
        return int(given)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Helper(contextlib.ExitStack):
    """A process that runs a script and ends with the context, whatever it is at."""

    def __init__(self, script: str, question: bytes | IO[bytes], *arguments: str) -> None:
        """Start it; ``question``, or all of a file, is its standard input."""
        super().__init__()
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._answer = self.enter_context(tempfile.TemporaryFile())
            if isinstance(question, bytes):
                content, question = question, self.enter_context(tempfile.TemporaryFile())
                question.write(content)
                question.seek(0)
            self._process = subprocess.Popen(
                # -I and -S: neither the current folder nor anything installed is in reach.
                [sys.executable, "-I", "-S", os.path.abspath(script), *arguments],
                stdin=question,
                stdout=self._answer,
                stderr=subprocess.DEVNULL,
            )
            self.callback(self._process.wait)
            self.callback(self._process.kill)
        except (OSError, ValueError):
            pass  # then it has no answer

    def answer(self) -> bytes:
        """Wait for what it writes; nothing where it could not be started, or failed."""
        if self._process is None or self._process.wait():
            return b""
        self._answer.seek(0)
        return self._answer.read()
