"""How a document is read in these tests: as uploads are, in a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from made_documents import SMALL

from zen_turbo.text.documents import read_file
from zen_turbo.text.readers.apart import ReaderProcess
from zen_turbo.text.readers.document import Reading


@pytest.fixture(scope="module")
def process() -> Iterator[ReaderProcess]:
    """One for all tests: it must survive every one of them."""
    with ReaderProcess(SMALL) as result:
        yield result


@pytest.fixture
def read(tmp_path: Path, process: ReaderProcess) -> Callable[[str, bytes], Reading]:
    def result(name: str, data: bytes) -> Reading:
        path = tmp_path / "file"
        path.write_bytes(data)
        return read_file(path, name, process, limit_text=True)

    return result
