"""Uploaded files on disk: what came, the text that was read from it, and what is known about it.

    FOLDER/.lock             held by the server that uses the folder
    FOLDER/file-<random>/    content         the bytes as they came
                             documents.json  [[label, text], ...]
                             about.json      the rest; replaced as a whole

A file's folder is filled under another name and renamed when it is complete, and renamed away before it is deleted, so that a file is there
as a whole or not at all, whenever the server ends. All names are ours: what a client called its file is data inside about.json.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import logging
import os
import re
import secrets
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from zen_turbo.errors import ConfigurationError, DocumentError, FileQuotaExceededError, ReadersBusyError, UploadedFileNotFoundError
from zen_turbo.server.settings import DEFAULT_QUOTA_BYTES
from zen_turbo.text.documents import Document, Reading, documents_text, read_file
from zen_turbo.text.readers.apart import ReaderProcess
from zen_turbo.text.readers.limits import Limits

logger = logging.getLogger("zen_turbo.server")

MAX_FILES = 10_000  # beside bytes, because every file costs memory and directory entries however small it is
# Each may take the memory of Limits. Uploads wait for their turn; a request with an inline file does not, because it would wait in one of the
# few threads in which all requests are tokenised.
READERS_AT_ONCE = 2
_REPORTED = 20  # of what an archive held and was left out

_ID = re.compile(r"file-[0-9a-f]{32}")
_UNFINISHED = re.compile(r"\.(?:new|gone)-file-[0-9a-f]{32}|\.inline-\w+")
_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """What is known of one uploaded file. ``characters``: of its documents as they stand in a prompt. ``tokens``: the same in tokens, by
    fingerprint of the model that counted. ``skipped``: the first files of an archive that were left out, with reasons."""

    id: str
    filename: str
    purpose: str
    bytes: int
    created_ns: int
    characters: int
    num_documents: int
    num_skipped: int
    skipped: tuple[tuple[str, str], ...]
    stored_bytes: int
    tokens: dict[str, int] = field(default_factory=dict)


@dataclass
class Room:
    """Room that is kept for a file that is coming: at first what was announced, then what it takes."""

    num_bytes: int


class FileStore:
    """Files under random ids, bounded in bytes (content and text) and in number. All methods may be called from any thread.

    ``folder`` None is a temporary one, made when the first file comes and removed by ``close``. Raises ConfigurationError if a named folder
    cannot be used or is in use by another server.
    """

    def __init__(self, folder: Path | None, *, quota_bytes: int = DEFAULT_QUOTA_BYTES, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self.quota_bytes = quota_bytes
        self.workers = ThreadPoolExecutor(READERS_AT_ONCE, thread_name_prefix="zen-turbo-files")
        self._inline = threading.Semaphore(READERS_AT_ONCE)
        self._folder = folder
        self._temporary: Path | None = None
        self._lock = threading.RLock()
        self._lock_file: int | None = None
        self._files: dict[str, StoredFile] = {}
        self._used_bytes = 0
        self._coming = 0
        self._readers: set[ReaderProcess] = set()
        self._closed = False
        if folder is not None:
            self._open(folder)

    def _open(self, folder: Path) -> None:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock_file = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._unlock()
            raise ConfigurationError(f"The folder {folder} is in use by another server.", param="files_dir") from error
        except OSError as error:
            raise ConfigurationError(f"The folder {folder} cannot be used for files: {error.strerror}.", param="files_dir") from error
        for path in sorted(folder.iterdir()):
            if _UNFINISHED.fullmatch(path.name):
                _remove(path)
            elif _ID.fullmatch(path.name):
                try:
                    file = _about_from(json.loads((path / "about.json").read_bytes()), path.name)
                except (OSError, ValueError, TypeError, KeyError) as error:
                    logger.error("the uploaded file in %s cannot be used and is left where it is: %r", path, error)
                    continue
                self._files[file.id] = file
                self._used_bytes += file.stored_bytes

    def close(self) -> None:
        """Stop readers, forget everything, and remove the folder if it is a temporary one."""
        with self._lock:
            self._closed = True
            self._files.clear()
            for reader in self._readers:
                reader.stop()
        self.workers.shutdown(cancel_futures=True)
        if self._temporary is not None:
            _remove(self._temporary)
        self._unlock()

    def _unlock(self) -> None:
        if self._lock_file is not None:
            os.close(self._lock_file)
            self._lock_file = None

    def _root(self) -> Path:
        with self._lock:
            if self._closed:
                raise DocumentError("The server is shutting down.")
            if self._folder is not None:
                return self._folder
            if self._temporary is None:
                self._temporary = Path(tempfile.mkdtemp(prefix="zen-turbo-files-"))
                weakref.finalize(self, _remove, self._temporary)  # also when nobody closes
            return self._temporary

    # Room

    @contextlib.contextmanager
    def room(self, num_bytes: int) -> Iterator[Room]:
        """Keep room for a file that is coming, until the end of the block; ``add`` turns it into the file's own. Raises
        FileQuotaExceededError."""
        with self._lock:
            if len(self._files) + self._coming >= MAX_FILES:
                raise FileQuotaExceededError(need=1, have=0, unit="files")
            self._take(num_bytes)
            self._coming += 1
        room = Room(num_bytes)
        try:
            yield room
        finally:
            with self._lock:
                self._take(-room.num_bytes)
                self._coming -= 1

    def _take(self, num_bytes: int) -> None:
        """With the lock held."""
        left = max(self.quota_bytes - self._used_bytes, 0)
        if num_bytes > left:
            raise FileQuotaExceededError(need=num_bytes, have=left)
        self._used_bytes += num_bytes

    # Files

    def read(self, path: Path, filename: str) -> Reading:
        """The documents of a file, none of them empty. Raises DocumentError and its kinds."""
        reader = ReaderProcess(self.limits)
        with self._lock:
            if self._closed:
                raise DocumentError("The server is shutting down.")
            self._readers.add(reader)
        try:
            with reader:
                reading = read_file(path, filename, reader, limit_text=True)
        finally:
            with self._lock:
                self._readers.discard(reader)
        documents = tuple(document for document in reading.documents if document.text.strip())
        if not documents:
            raise DocumentError(f"There is no text to read in {filename}." + (f" {reading.skipped[0][1]}" if reading.skipped else ""))
        return Reading(documents, reading.skipped)

    def read_inline(self, data: bytes, filename: str) -> tuple[Document, ...]:
        """The documents of a file that comes with a message; nothing of it stays. Raises what ``read`` does, and ReadersBusyError."""
        if not self._inline.acquire(blocking=False):
            raise ReadersBusyError(
                f"{READERS_AT_ONCE} files of other requests are being read, as many as may be at once; send it again, or upload it.",
                max_readers=READERS_AT_ONCE,
            )
        try:
            with tempfile.NamedTemporaryFile(dir=self._root(), prefix=".inline-") as file:
                file.write(data)
                file.flush()
                return self.read(Path(file.name), filename).documents
        finally:
            self._inline.release()

    def add(self, content: BinaryIO, filename: str, purpose: str, room: Room) -> StoredFile:
        """Store and read a file, which takes as long as reading it. ``filename``: a clean label.

        Raises DocumentError and its kinds, and FileQuotaExceededError if content and text need more than is left; nothing stays then.
        """
        file_id = f"file-{secrets.token_hex(16)}"
        folder = self._root() / f".new-{file_id}"
        folder.mkdir(mode=0o700)
        try:
            with (folder / "content").open("wb") as target:
                shutil.copyfileobj(content, target, 1 << 20)
                num_bytes = target.tell()
            reading = self.read(folder / "content", filename)
            text = json.dumps([[document.label, document.text] for document in reading.documents], ensure_ascii=False).encode()
            stored_bytes = num_bytes + len(text)
            with self._lock:
                self._take(stored_bytes - room.num_bytes)
                room.num_bytes = stored_bytes
            (folder / "documents.json").write_bytes(text)
            file = StoredFile(
                id=file_id,
                filename=filename,
                purpose=purpose,
                bytes=num_bytes,
                created_ns=time.time_ns(),
                characters=len(documents_text(reading.documents)),
                num_documents=len(reading.documents),
                num_skipped=len(reading.skipped),
                skipped=reading.skipped[:_REPORTED],
                stored_bytes=stored_bytes,
            )
            _write_about(folder, file)
            if self._folder is not None:
                _sync(folder)
            folder.rename(folder.with_name(file_id))
        except BaseException:
            _remove(folder)
            raise
        with self._lock:
            self._files[file_id] = file
            room.num_bytes = 0  # it is the file's now
        return file

    def all(self) -> list[StoredFile]:
        """Oldest first."""
        with self._lock:
            return sorted(self._files.values(), key=lambda file: (file.created_ns, file.id))

    def get(self, file_id: str) -> StoredFile:
        """Raises UploadedFileNotFoundError."""
        with self._lock:
            file = self._files.get(file_id)
        if file is None:
            raise _not_found(file_id)
        return file

    def delete(self, file_id: str) -> None:
        """Raises UploadedFileNotFoundError."""
        with self._lock:
            file = self._files.pop(file_id, None)
            if file is None:
                raise _not_found(file_id)
            self._take(-file.stored_bytes)
        folder = self._folder_of(file)
        gone = folder.with_name(f".gone-{file.id}")
        with contextlib.suppress(FileNotFoundError):  # someone else has tidied up
            folder.rename(gone)
        _remove(gone)

    def content(self, file_id: str) -> BinaryIO:
        """The bytes as they came, open. Raises UploadedFileNotFoundError."""
        return self._open_part(file_id, "content")

    def documents(self, file_id: str) -> tuple[Document, ...]:
        """Raises UploadedFileNotFoundError, and DocumentError if what was read is damaged on disk."""
        with self._open_part(file_id, "documents.json") as part:
            try:
                return tuple(Document(label, text) for label, text in json.load(part))
            except (OSError, ValueError, TypeError) as error:
                raise DocumentError(f"What was read of {file_id} is damaged; delete it and upload the file again.") from error

    def set_tokens(self, file_id: str, fingerprint: str, count: int) -> StoredFile:
        """Keep a count. Raises UploadedFileNotFoundError."""
        with self._lock:
            file = self._files.get(file_id)
            if file is None:
                raise _not_found(file_id)
            file = dataclasses.replace(file, tokens={**file.tokens, fingerprint: count})
            self._files[file_id] = file
            _write_about(self._folder_of(file), file)
        return file

    def _open_part(self, file_id: str, name: str) -> BinaryIO:
        try:
            return (self._folder_of(self.get(file_id)) / name).open("rb")
        except FileNotFoundError:  # deleted since
            raise _not_found(file_id) from None

    def _folder_of(self, file: StoredFile) -> Path:
        # From the id in our own index, never from what a request said.
        return self._root() / file.id


def _write_about(folder: Path, file: StoredFile) -> None:
    target = folder / "about.json"
    new = folder / "about.json.new"
    new.write_text(json.dumps({"version": _VERSION, **dataclasses.asdict(file)}))
    new.replace(target)


def _about_from(values: dict[str, Any], file_id: str) -> StoredFile:
    if values.pop("version") != _VERSION or values["id"] != file_id:
        raise ValueError("written by another version")
    values["skipped"] = tuple((where, reason) for where, reason in values["skipped"])
    return StoredFile(**values)


def _not_found(file_id: str) -> UploadedFileNotFoundError:
    return UploadedFileNotFoundError(f"There is no file {file_id[:100]!r}.", param="file_id")


def _remove(path: Path) -> None:
    """Whatever it is, as far as it can be."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    """Everything in a folder onto the disk, so that what is renamed into place is also there after a power cut."""
    for path in (*folder.iterdir(), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
