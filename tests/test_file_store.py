"""The folder that uploaded files lie in: what it keeps, bounds and cleans, without a server around it."""

from __future__ import annotations

import io
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from made_documents import HOSTILE_PDFS
from serving import wait_until

from zen_turbo.errors import ConfigurationError, DocumentError, ReadersBusyError, ZenTurboError
from zen_turbo.server.file_store import READERS_AT_ONCE, FileStore
from zen_turbo.text.documents import Document
from zen_turbo.text.readers.limits import Limits


def add(store: FileStore, name: str, data: bytes) -> str:
    with store.room(len(data)) as room:
        return store.add(io.BytesIO(data), name, "user_data", room).id


def test_a_named_folder_persists(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "files", quota_bytes=1000)
    file = add(store, "a.txt", b"x" * 400)
    store.set_tokens(file, "model", 7)
    used = store._used_bytes
    store.close()
    for leftover in (f".new-file-{'0' * 32}", f".gone-file-{'1' * 32}"):
        (tmp_path / "files" / leftover).mkdir()
        (tmp_path / "files" / leftover / "content").write_bytes(b"x")
    (tmp_path / "files" / ".inline-abc").write_bytes(b"x")
    damaged = tmp_path / "files" / f"file-{'2' * 32}"
    damaged.mkdir()
    (damaged / "about.json").write_text("{")
    (tmp_path / "files" / "notes").write_text("not ours")
    again = FileStore(tmp_path / "files", quota_bytes=1000)
    assert [entry.id for entry in again.all()] == [file] and again._used_bytes == used
    assert again.get(file).tokens == {"model": 7}
    assert again.documents(file) == (Document("a.txt", "x" * 400),)
    assert {path.name for path in (tmp_path / "files").iterdir()} == {file, damaged.name, "notes", ".lock"}, "only our own leavings are removed"
    with pytest.raises(ZenTurboError, match=r"only \d+ are left"):
        add(again, "b.txt", b"x" * 400)
    (tmp_path / "files" / file / "documents.json").write_text("[[")
    with pytest.raises(DocumentError, match="damaged"):
        again.documents(file)
    again.delete(file)
    assert again._used_bytes == 0
    again.close()


def test_one_folder_is_for_one_server(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    with pytest.raises(ConfigurationError, match="in use"):
        FileStore(tmp_path)
    store.close()
    FileStore(tmp_path).close()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="cannot be used"):
        FileStore(tmp_path / "file")


def test_inline_files_are_read_few_at_once(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    slow = HOSTILE_PDFS["pages without end"]
    errors: list[ZenTurboError] = []

    def read() -> None:
        try:
            store.read_inline(slow, "slow.pdf")
        except ZenTurboError as error:
            errors.append(error)

    threads = [threading.Thread(target=read) for _ in range(READERS_AT_ONCE)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(store._readers) == READERS_AT_ONCE)
    with pytest.raises(ReadersBusyError) as caught:
        store.read_inline(b"x", "a.txt")
    assert (caught.value.http_status, caught.value.details) == (429, {"max_readers": READERS_AT_ONCE})
    store.close()  # ends readers that are at work
    for thread in threads:
        thread.join()
    assert [error.code for error in errors] == ["unreadable_document"] * READERS_AT_ONCE
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_the_number_of_files_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zen_turbo.server.file_store.MAX_FILES", 2)
    store = FileStore(tmp_path, limits=Limits())
    file = add(store, "a.txt", b"x")
    add(store, "a.txt", b"x")
    with pytest.raises(ZenTurboError) as caught:
        add(store, "a.txt", b"x")
    assert (caught.value.code, caught.value.details["unit"]) == ("file_quota_exceeded", "files")
    store.delete(file)
    add(store, "a.txt", b"x")
    store.close()


def test_the_files_of_a_store_say_what_they_are(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    file = add(store, "../a.txt", b"x")
    about: dict[str, Any] = json.loads((tmp_path / file / "about.json").read_text())
    assert (about["version"], about["filename"]) == (1, "../a.txt"), "a name is data"
    store.close()
