"""Pages on disk, so that a prefix outlives the process: append-only, checked, shared, bounded.

A store is a folder. Below it every identity (the hash of model, rotations, policy and types that keys of pages start from) has a folder of its
own, named after it and the format, so that pages of another model or of another version are not even looked at. Pages are written in
**segments** of up to ``SEGMENT_PAGES`` pages, each two files:

    NAME.pages      the records, one per page: all layers' keys and values, then summaries, as they lie in the pool
    NAME.manifest   JSON: for each record its key, its 64 tokens, a SHA-256 and its note; then a SHA-256 of the manifest itself

A segment is written once and never changed. Its manifest comes last, by an atomic rename after the records are on disk: what has no manifest does
not exist, so a crash at any moment leaves at most a file that nobody reads, which the next writer removes. Deleting goes the other way round.

Reading trusts nothing: a record counts only if its length, its tokens and its SHA-256 are right. A segment with anything wrong is set aside
and its pages are computed again. Writing happens in a thread behind the engine; when it fails (full disk, read-only folder) the store stops
writing with one warning and everything else goes on.

Any number of processes may use one store: names are unique, files appear and disappear whole, and temporary files are locked by their writer.
``quota_bytes`` bounds the whole folder; segments used least recently (the manifest's time) are deleted first.
"""

from __future__ import annotations

import atexit
import base64
import contextlib
import fcntl
import hashlib
import json
import logging
import os
import queue
import threading
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from zen_turbo.config import PAGE_TOKENS
from zen_turbo.kv.pool import PagePool

FORMAT = 1
SEGMENT_PAGES = 64
_LOG = logging.getLogger(__name__)
_HASHERS = 2  # threads that read and check


class StoredPage(NamedTuple):
    """A full page to be written: its key, its tokens, its slot (held by a reference until it is written), and an opaque note."""

    key: bytes
    tokens: Sequence[int]
    slot: int
    note: bytes


class Loaded(NamedTuple):
    """How many of the wanted pages are in their slots now, counted from the first, and their notes."""

    num_pages: int
    notes: list[bytes]


@dataclass(frozen=True)
class _Record:
    segment: Path  # without suffix
    index: int
    tokens: bytes  # int32
    sha256: str
    note: bytes


@dataclass(frozen=True)
class SegmentFacts:
    """What ``cache ls`` and ``verify`` say of a segment. problem: None if nothing is wrong."""

    identity: str
    name: str
    num_pages: int
    num_bytes: int
    last_used: float
    problem: str | None = None


class PageStore:
    """One process's view of a store, for one identity. ``find`` and ``load`` from one thread, ``close`` waits for what is being written.

    release: called, in the thread that calls ``collect``, with the slots whose pages were written or given up.
    """

    def __init__(self, folder: Path, pool: PagePool, *, identity: bytes, facts: dict[str, Any], quota_bytes: int) -> None:
        self._root = folder
        self._folder = folder / f"v{FORMAT}-{identity.hex()[:32]}"
        self._pool = pool
        self._quota_bytes = quota_bytes
        self._records: dict[bytes, _Record] = {}
        self._known: set[str] = set()  # segments whose manifests were read
        self._broken: str | None = None
        self._pending: list[StoredPage] = []
        self._written: queue.SimpleQueue[list[StoredPage]] = queue.SimpleQueue()
        self._queue: queue.Queue[list[StoredPage] | None] = queue.Queue()
        self._lock = threading.Lock()
        self._queued: set[bytes] = set()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            _write_atomic(self._folder / "identity.json", json.dumps({"format": FORMAT, **facts}).encode())
        except OSError as error:
            self._give_up(error)
        self._refresh()
        self._thread = threading.Thread(target=self._write_behind, name="page-store", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # what was read for an hour is kept though nobody closes the engine

    @property
    def record_bytes(self) -> int:
        return self._pool.geometry.slot_bytes

    # Reading.

    def find(self, keys: Sequence[bytes]) -> int:
        """How many of these pages, counted from the first, are stored."""
        self._refresh()
        count = 0
        while count < len(keys) and keys[count] in self._records:
            count += 1
        return count

    def load(self, keys: Sequence[bytes], tokens: Sequence[int], slots: Sequence[int]) -> Loaded:
        """Copy pages with these keys (``find`` said that they are there) into ``slots``, checking every one; tokens: 64 for each. Stops before
        the first that is wrong or gone."""
        wanted = np.asarray(tokens, dtype=np.int32).reshape(len(keys), PAGE_TOKENS)
        records = [self._records[key] for key in keys]
        by_segment: dict[Path, list[int]] = {}
        for at, record in enumerate(records):
            by_segment.setdefault(record.segment, []).append(at)
        good = np.zeros(len(keys), dtype=bool)

        def read(segment: Path, places: list[int]) -> None:
            try:
                with segment.with_suffix(".pages").open("rb") as file:
                    buffer = bytearray(self.record_bytes)
                    for at in places:
                        file.seek(records[at].index * self.record_bytes)
                        whole = file.readinto(buffer) == self.record_bytes
                        if not whole or records[at].tokens != wanted[at].tobytes() or hashlib.sha256(buffer).hexdigest() != records[at].sha256:
                            self._set_aside(segment, f"record {records[at].index} is damaged")
                            return
                        self._pool.write_slot(slots[at], buffer)
                        good[at] = True
                os.utime(segment.with_suffix(".manifest"))
            except OSError as error:  # deleted meanwhile, or the disk fails
                self._set_aside(segment, str(error))

        with ThreadPoolExecutor(_HASHERS) as threads:
            # Deepest first: what begins a prefix was used last, and is deleted last.
            list(threads.map(lambda item: read(*item), reversed(by_segment.items())))
        count = len(keys) if good.all() else int(good.argmin())
        return Loaded(count, [record.note for record in records[:count]])

    def _refresh(self) -> None:
        """Read manifests that are new."""
        try:
            names = {path.stem for path in self._folder.glob("*.manifest")}
        except OSError:
            return
        for name in names - self._known:
            segment = self._folder / name
            try:
                pages = read_manifest(segment, self.record_bytes)
            except (OSError, ValueError) as error:
                self._set_aside(segment, str(error))
                continue
            finally:
                self._known.add(name)
            for index, page in enumerate(pages):
                self._records.setdefault(page.key, _Record(segment, index, page.tokens, page.sha256, page.note))
        gone = self._known - names
        if gone:
            self._known -= gone
            self._records = {key: record for key, record in self._records.items() if record.segment.name not in gone}

    def _set_aside(self, segment: Path, why: str) -> None:
        _LOG.warning("Cached segment %s is not used and will be computed again: %s", segment.name, why)
        remove_segment(segment)
        with self._lock:
            self._records = {key: record for key, record in self._records.items() if record.segment != segment}

    # Writing.

    def put(self, pages: Sequence[StoredPage]) -> None:
        """Write these behind, unless they are stored or on their way. Keeps one more reference to the slot of each that it takes; ``collect``
        gives them back."""
        if self._broken:
            return
        for page in pages:
            if page.key not in self._records and page.key not in self._queued:
                self._pool.share([page.slot])
                self._queued.add(page.key)
                self._pending.append(page)
        while len(self._pending) >= SEGMENT_PAGES:
            self._queue.put(self._pending[:SEGMENT_PAGES])
            del self._pending[:SEGMENT_PAGES]

    def flush(self) -> None:
        """Hand over what is collected so far, though it does not fill a segment."""
        if self._pending:
            self._queue.put(self._pending)
            self._pending = []

    def collect(self) -> None:
        """Free the slots of what was written. Call it from the thread that owns the pool."""
        with contextlib.suppress(queue.Empty):
            while True:
                pages = self._written.get_nowait()
                self._pool.free(page.slot for page in pages)
                self._queued.difference_update(page.key for page in pages)

    def close(self) -> None:
        """Write what was handed over and end."""
        atexit.unregister(self.close)
        if self._thread.is_alive():
            self.flush()
            self._queue.put(None)
            self._thread.join()
            self.collect()

    def wait(self) -> None:
        """Until everything handed over is written."""
        self._queue.join()
        self.collect()

    def _write_behind(self) -> None:
        while (pages := self._queue.get()) is not None:
            try:
                if self._broken is None:
                    self._write(pages)
                    self._keep_quota()
            except OSError as error:
                self._give_up(error)
            finally:
                self._written.put(pages)
                self._queue.task_done()
        self._queue.task_done()

    def _write(self, pages: Sequence[StoredPage]) -> None:
        self._remove_stale()
        segment = self._folder / uuid.uuid4().hex
        temporary = segment.with_suffix(".pages.tmp")
        entries = []
        try:
            with temporary.open("xb") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                for page in pages:
                    record = self._pool.read_slot(page.slot)
                    file.write(record)
                    entries.append(
                        {
                            "key": page.key.hex(),
                            "tokens": _text(np.asarray(page.tokens, dtype=np.int32).tobytes()),
                            "sha256": hashlib.sha256(record).hexdigest(),
                            "note": _text(page.note),
                        }
                    )
                file.flush()
                os.fsync(file.fileno())
                os.replace(temporary, segment.with_suffix(".pages"))
                body = {"format": FORMAT, "record_bytes": self.record_bytes, "pages": entries}
                body["sha256"] = _digest(body)
                _write_atomic(segment.with_suffix(".manifest"), json.dumps(body).encode())
        except BaseException:
            temporary.unlink(missing_ok=True)
            segment.with_suffix(".pages").unlink(missing_ok=True)
            raise

    def _remove_stale(self) -> None:
        """What a writer that died left behind: temporary files that nobody holds a lock on, and records whose manifest never came."""
        for path in [*self._folder.glob("*.tmp"), *self._folder.glob("*.pages")]:
            if path.suffix == ".pages" and path.with_suffix(".manifest").exists():
                continue
            with contextlib.suppress(OSError), path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if path.suffix == ".tmp" or not path.with_suffix(".manifest").exists():
                    path.unlink(missing_ok=True)

    def _keep_quota(self) -> None:
        segments = sorted(segments_of(self._root), key=lambda facts: facts.last_used)
        total = sum(facts.num_bytes for facts in segments)
        for facts in segments:
            if total <= self._quota_bytes:
                break
            remove_segment(self._root / facts.identity / facts.name)
            total -= facts.num_bytes

    def _give_up(self, error: OSError) -> None:
        self._broken = str(error)
        _LOG.warning("The page store %s is not written any more: %s", self._root, error)


class ManifestPage(NamedTuple):
    key: bytes
    tokens: bytes
    sha256: str
    note: bytes


def read_manifest(segment: Path, record_bytes: int | None = None) -> list[ManifestPage]:
    """Raises OSError, and ValueError for one that is damaged, of another format, or does not fit its records."""
    try:
        body = json.loads(segment.with_suffix(".manifest").read_bytes())
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise ValueError("the manifest has another format")
        if body.pop("sha256", None) != _digest(body):
            raise ValueError("the manifest is damaged")
        size = int(body["record_bytes"])
        pages = [
            ManifestPage(bytes.fromhex(page["key"]), _bytes(page["tokens"]), page["sha256"], _bytes(page["note"])) for page in body["pages"]
        ]
    except (KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"the manifest is damaged ({type(error).__name__})") from error
    if record_bytes not in (None, size):
        raise ValueError(f"records have {size} bytes, not {record_bytes}")
    found = segment.with_suffix(".pages").stat().st_size
    if found != size * len(pages):
        raise ValueError(f"{len(pages)} records have {size * len(pages)} bytes, the file has {found}")
    return pages


def segments_of(folder: Path) -> list[SegmentFacts]:
    """Every segment of a store that has a manifest, of any identity, not checked."""
    found = []
    for manifest in folder.glob("*/*.manifest"):
        with contextlib.suppress(OSError):
            records, own = manifest.with_suffix(".pages").stat(), manifest.stat()
            size = records.st_size + own.st_size
            found.append(SegmentFacts(manifest.parent.name, manifest.stem, 0, size, own.st_mtime))
    return found


def verify(folder: Path, on_segment: Callable[[SegmentFacts], None]) -> None:
    """Read every segment whole and say what is wrong with it."""
    for facts in segments_of(folder):
        segment, problem, pages = folder / facts.identity / facts.name, None, []
        try:
            pages = read_manifest(segment)
            with segment.with_suffix(".pages").open("rb") as file:
                size = segment.with_suffix(".pages").stat().st_size // max(len(pages), 1)
                for index, page in enumerate(pages):
                    if hashlib.sha256(file.read(size)).hexdigest() != page.sha256:
                        raise ValueError(f"record {index} is damaged")
        except (OSError, ValueError) as error:
            problem = str(error)
        on_segment(SegmentFacts(facts.identity, facts.name, len(pages), facts.num_bytes, facts.last_used, problem))


def remove_segment(segment: Path) -> None:
    """The manifest first: what has none does not exist."""
    for suffix in (".manifest", ".pages"):
        with contextlib.suppress(OSError):
            segment.with_suffix(suffix).unlink(missing_ok=True)


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _bytes(text: str) -> bytes:
    return base64.b64decode(text, validate=True)


def _write_atomic(path: Path, content: bytes) -> None:
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
