"""The process that reads a hostile file: ``python -I -m zen_turbo.text.readers.worker``, started by ``apart``.

A request is a line of JSON on standard input: path, label, kind and limits. A reply is its length in bytes, as 8 bytes with the largest
first, then JSON on standard output: documents and skipped, or error, and exhausted where the next file had better get another process.
The kernel holds this process to its memory, its time, and to writing no file; whatever a file makes of it, what started it goes on.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import struct
import sys
from pathlib import Path
from typing import Any, BinaryIO

from zen_turbo.errors import DocumentError, DocumentTooLargeError
from zen_turbo.text.readers.archive import read_archive
from zen_turbo.text.readers.document import Document, Reading
from zen_turbo.text.readers.docx import read_docx
from zen_turbo.text.readers.epub import read_epub
from zen_turbo.text.readers.kinds import Kind
from zen_turbo.text.readers.limits import Budget, Limits
from zen_turbo.text.readers.markup import html_to_text
from zen_turbo.text.readers.plain import decode_text


def read_one(kind: Kind, file: BinaryIO, label: str, budget: Budget) -> str:
    """The text of one document. Raises DocumentError and its kinds."""
    if kind is Kind.EPUB:
        return read_epub(file, label, budget)
    if kind is Kind.DOCX:
        return read_docx(file, label, budget)
    if kind is Kind.PDF:
        from zen_turbo.text.readers.pdf import read_pdf  # its library takes longer to load than most files to read

        return read_pdf(file, label, budget)
    text = decode_text(file.read(), label, declared=kind is Kind.HTML)
    if kind is Kind.HTML:
        text = html_to_text(text)
    budget.take_text(len(text))
    return text


def read(path: Path, label: str, kind: Kind, limits: Limits) -> Reading:
    """Raises DocumentError and its kinds; a file that needs too much memory is a DocumentTooLargeError."""
    budget = Budget(limits, label)
    try:
        with path.open("rb") as file:
            if kind is Kind.ZIP:
                return read_archive(file, label, budget, read_one)
            return Reading((Document(label, read_one(kind, file, label, budget)),))
    except MemoryError:
        pass  # below, when the frames that hold the memory are gone
    except RecursionError as error:
        raise DocumentError(f"{label} is nested too deeply to be read.") from error
    except DocumentError:
        raise
    except OSError as error:
        raise DocumentError(f"{label} cannot be read: {error.strerror}.") from error
    except Exception as error:  # there is no list of what the libraries let out when a file is damaged
        raise DocumentError(f"{label} is damaged: {type(error).__name__}: {str(error)[:200]}.") from error
    raise DocumentTooLargeError(f"{label} needs more than {limits.memory_bytes} bytes of memory to read.", max_memory_bytes=limits.memory_bytes)


def confine(limits: Limits) -> None:
    """Limits of this process from now on. CPU time counts from here, because one process may read many files."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    for kind, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_AS, limits.memory_bytes),
        (resource.RLIMIT_CPU, math.ceil(used.ru_utime + used.ru_stime) + limits.cpu_s),
    ):
        _, hard = resource.getrlimit(kind)
        resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def answer(request: dict[str, Any]) -> dict[str, Any]:
    limits = Limits(**request["limits"])
    confine(limits)
    try:
        reading = read(Path(request["path"]), request["label"], Kind(request["kind"]), limits)
    except DocumentError as error:
        exhausted = "max_memory_bytes" in error.details
        return {"error": {"code": error.code, "message": error.message, "details": error.details}, "exhausted": exhausted}
    return {"documents": [[document.label, document.text] for document in reading.documents], "skipped": reading.skipped}


def main() -> None:
    # Where memory runs out all the same, the kernel should end this process and not the one with the model.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a library that prints must not spoil a reply
    for line in sys.stdin.buffer:
        payload = json.dumps(answer(json.loads(line)), ensure_ascii=False).encode("utf-8", "replace")
        replies.write(struct.pack(">Q", len(payload)) + payload)
        replies.flush()


if __name__ == "__main__":
    main()
