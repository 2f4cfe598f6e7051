"""Reading files in a process of its own, so that a hostile one can hurt nothing but itself.

What is done apart: everything with structure (HTML, PDF, EPUB, DOCX, archives). Only decoding plain text, which takes linear time and memory,
is done where the caller is. Resource limits are no jail against code execution: the readers are Python and its standard library, which is
what they have to be trusted with.
"""

from __future__ import annotations

import dataclasses
import json
import os
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from zen_turbo.errors import BinaryDocumentError, DocumentError, DocumentTimeoutError, DocumentTooLargeError, EncryptedDocumentError
from zen_turbo.text.readers.document import Document, Reading
from zen_turbo.text.readers.kinds import Kind
from zen_turbo.text.readers.limits import Limits

_ERRORS = {kind.code: kind for kind in (DocumentError, BinaryDocumentError, DocumentTooLargeError, EncryptedDocumentError)}
_HEADER = struct.Struct(">Q")
# What is left out of an archive is reported with names and reasons of bounded length, beside the text, whose characters JSON may escape.
_SKIPPED_BYTES = 16 << 20
_ESCAPED_BYTES = 6
_LAST_WORDS_S = 5.0
# The process gets no more of our environment than it needs to start: it may hold keys.
_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TZ")


class ReaderProcess:
    """A process that reads files one after another; started by the first, and anew after a failure. Use it as a context manager.

    ``stop`` may be called from another thread: a read that is under way then fails.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False
        self._lock = threading.Lock()  # of these two; a read itself is one thread's

    def __enter__(self) -> ReaderProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            if self._process is not None:
                self._process.kill()

    def read(self, path: Path, label: str, kind: Kind) -> Reading:
        """The documents of one file. Raises DocumentError and its kinds: DocumentTooLargeError, DocumentTimeoutError,
        EncryptedDocumentError, BinaryDocumentError."""
        limits = self.limits
        deadline = time.monotonic() + limits.wall_s
        request = {"path": str(path.absolute()), "label": label, "kind": kind, "limits": dataclasses.asdict(limits)}
        process = self._started(label)
        ended = True
        try:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(json.dumps(request).encode() + b"\n")
            (length,) = _HEADER.unpack(_receive(process.stdout, _HEADER.size, deadline))
            if length > limits.text_characters * _ESCAPED_BYTES + _SKIPPED_BYTES:
                raise DocumentError(f"{label} cannot be read: its reader answered with {length} bytes.")
            reply = json.loads(_receive(process.stdout, length, deadline))
            ended = reply.get("exhausted", False)
        except TimeoutError:
            raise DocumentTimeoutError(f"{label} was not read within {limits.wall_s:g} s.", max_wall_s=limits.wall_s) from None
        except (EOFError, BrokenPipeError):
            raise self._death(process, label) from None
        finally:
            if ended:
                self._end()
        if "error" in reply:
            raise _error_of(reply["error"])
        documents = tuple(Document(where, text) for where, text in reply["documents"])
        return Reading(documents, tuple((where, reason) for where, reason in reply["skipped"]))

    def _started(self, label: str) -> subprocess.Popen[bytes]:
        with self._lock:
            if self._stopped:
                raise DocumentError(f"{label} was not read: its reader was stopped.")
            if self._process is None:
                environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
                self._process = subprocess.Popen(
                    [sys.executable, "-I", "-B", "-m", "zen_turbo.text.readers.worker"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    bufsize=0,
                    env=environment,
                    start_new_session=True,  # an interrupt from the keyboard is ours to handle
                )
            return self._process

    def _end(self) -> None:
        with self._lock:
            process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def _death(self, process: subprocess.Popen[bytes], label: str) -> DocumentError:
        """Why a process ended without an answer."""
        try:
            status = process.wait(_LAST_WORDS_S)
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
        if status == -signal.SIGXCPU:
            return DocumentTimeoutError(f"{label} was not read within {self.limits.cpu_s} s of CPU time.", max_cpu_s=self.limits.cpu_s)
        if self._stopped:
            return DocumentError(f"{label} was not read: its reader was stopped.")
        how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
        if status == -signal.SIGKILL:
            how += ", as the system does when memory runs out"
        return DocumentError(f"{label} cannot be read: its reader {how}.")


def _receive(pipe: IO[bytes], count: int, deadline: float) -> bytes:
    """Raises EOFError at the end of the pipe and TimeoutError at the deadline."""
    parts = []
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    while count:
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise TimeoutError
        part = os.read(pipe.fileno(), min(count, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _error_of(reply: dict[str, Any]) -> DocumentError:
    return _ERRORS[reply["code"]](reply["message"], **reply["details"])
