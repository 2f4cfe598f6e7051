"""Pages on disk, so that a prefix outlives the process: append-only, checked, shared, bounded.

A store is a folder. Below it every identity (the hash of model, rotations, policy and types that keys of pages start from) has a folder of its
own, named after it and the format, so that pages of another model or of another version are not even looked at. Pages are written in
**segments** of up to ``SEGMENT_PAGES`` pages, each two files:

    NAME.pages      what the pages hold, as it lies in the pool: every layer's keys and values of all pages, then every layer's summaries, each
                    from a multiple of 4,096 bytes on
    NAME.manifest   JSON: the key, the 64 tokens and the note of each page, a SHA-256 of the other file, then one of the manifest itself

A segment is written once and never changed. Its manifest comes last, by an atomic rename after the records are on disk: what has no manifest does
not exist, so a crash at any moment leaves at most a file that nobody reads, which the next writer removes. Deleting goes the other way round.

Reading trusts nothing: a page counts only if its tokens and its segment's length and SHA-256 are right. A segment with anything wrong is set
aside and its pages are computed again. What is right is mapped over the pool's memory: a restart copies nothing, and attention reads what it selects
from the system's page cache. (As with any mapped file, a stranger who cuts a segment short in place while it is in use ends the process.)

Writing happens in a thread behind the engine; when it fails (full disk, read-only folder) the store stops writing with one warning and everything
else goes on.

Any number of processes may use one store: names are unique, files appear and disappear whole, and temporary files are locked by their writer.
``quota_bytes`` bounds the whole folder; segments used least recently (the manifest's time) are deleted first.
"""

from __future__ import annotations

import atexit
import base64
import contextlib
import fcntl
import hashlib
import itertools
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
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from zen_turbo.config import PAGE_TOKENS
from zen_turbo.kv.pool import PagePool

FORMAT = 2
SEGMENT_PAGES = 64
_ALIGNMENT = 4096
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


class ManifestPage(NamedTuple):
    """tokens: int32."""

    key: bytes
    tokens: bytes
    note: bytes


class Manifest(NamedTuple):
    """num_bytes, sha256: of the file of pages."""

    pages: list[ManifestPage]
    num_bytes: int
    sha256: str

    def check(self, file: BinaryIO) -> None:
        """Raises ValueError for pages that are not what was written."""
        if hashlib.file_digest(file, "sha256").hexdigest() != self.sha256:
            raise ValueError("its pages are damaged")


class _Record(NamedTuple):
    """Where a page is. segment: without suffix."""

    segment: Path
    manifest: Manifest
    index: int

    @property
    def page(self) -> ManifestPage:
        return self.manifest.pages[self.index]


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
        self._row_bytes = [block.shape[1] for block in pool.blocks()]  # of a page, in each block of a segment
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

    def _offsets(self, num_pages: int) -> list[int]:
        """Where each block begins in a segment of so many pages, at what can be mapped; then the size of the segment."""
        return [0, *itertools.accumulate(-(-num_pages * size // _ALIGNMENT) * _ALIGNMENT for size in self._row_bytes)]

    # Reading.

    def find(self, keys: Sequence[bytes]) -> int:
        """How many of these pages, counted from the first, are stored."""
        self._refresh()
        count = 0
        while count < len(keys) and keys[count] in self._records:
            count += 1
        return count

    def load(self, keys: Sequence[bytes], tokens: Sequence[int], slots: Sequence[int]) -> Loaded:
        """Put pages with these keys (``find`` said that they are there) into ``slots``, checking every one; tokens: 64 for each. Stops before
        the first that is wrong or gone."""
        wanted = np.asarray(tokens, dtype=np.int32).reshape(len(keys), PAGE_TOKENS)
        records = [self._records[key] for key in keys]
        by_segment: dict[Path, list[int]] = {}
        for at, record in enumerate(records):
            by_segment.setdefault(record.segment, []).append(at)
        good, blocks = np.zeros(len(keys), dtype=bool), self._pool.blocks()

        def read(segment: Path, places: list[int]) -> None:
            first = records[places[0]]
            try:
                with segment.with_suffix(".pages").open("rb") as file:
                    first.manifest.check(file)
                    if any(records[at].page.tokens != wanted[at].tobytes() for at in places):
                        raise ValueError("its tokens are others")
                    offsets = self._offsets(len(first.manifest.pages))
                    for run in _runs(places, [records[at].index for at in places]):
                        for block, offset in zip(blocks, offsets, strict=False):
                            begin = offset + records[run[0]].index * block.shape[1]
                            self._pool.fill(block, [slots[at] for at in run], file.fileno(), begin)
                good[places] = True
                os.utime(segment.with_suffix(".manifest"))
            except (OSError, ValueError) as error:  # deleted meanwhile, or the disk fails; or damaged
                self._set_aside(segment, str(error))

        with ThreadPoolExecutor(_HASHERS) as threads:
            # Deepest first: what begins a prefix was used last, and is deleted last.
            list(threads.map(lambda item: read(*item), reversed(by_segment.items())))
        count = len(keys) if good.all() else int(good.argmin())
        return Loaded(count, [record.page.note for record in records[:count]])

    def _refresh(self) -> None:
        """Read manifests that are new."""
        try:
            names = {path.stem for path in self._folder.glob("*.manifest")}
        except OSError:
            return
        for name in names - self._known:
            segment = self._folder / name
            try:
                manifest = read_manifest(segment)
                if manifest.num_bytes != self._offsets(len(manifest.pages))[-1]:
                    raise ValueError("its pages have another size")
            except (OSError, ValueError) as error:
                self._set_aside(segment, str(error))
                continue
            finally:
                self._known.add(name)
            for index, page in enumerate(manifest.pages):
                self._records.setdefault(page.key, _Record(segment, manifest, index))
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
        slots, offsets, digest = [page.slot for page in pages], self._offsets(len(pages)), hashlib.sha256()
        try:
            with temporary.open("xb") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                for block, (begin, end) in zip(self._pool.blocks(), itertools.pairwise(offsets), strict=True):
                    content = block[slots].tobytes().ljust(end - begin, b"\0")
                    digest.update(content)
                    file.write(content)
                file.flush()
                os.fsync(file.fileno())
                os.replace(temporary, segment.with_suffix(".pages"))
                entries = [
                    {"key": page.key.hex(), "tokens": _text(np.asarray(page.tokens, dtype=np.int32).tobytes()), "note": _text(page.note)}
                    for page in pages
                ]
                body = {"format": FORMAT, "bytes": offsets[-1], "pages_sha256": digest.hexdigest(), "pages": entries}
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


def read_manifest(segment: Path) -> Manifest:
    """Raises OSError, and ValueError for one that is damaged, of another format, or does not fit its pages."""
    try:
        body = json.loads(segment.with_suffix(".manifest").read_bytes())
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise ValueError("the manifest has another format")
        if body.pop("sha256", None) != _digest(body):
            raise ValueError("the manifest is damaged")
        pages = [ManifestPage(bytes.fromhex(page["key"]), _bytes(page["tokens"]), _bytes(page["note"])) for page in body["pages"]]
        manifest = Manifest(pages, int(body["bytes"]), body["pages_sha256"])
    except (KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"the manifest is damaged ({type(error).__name__})") from error
    found = segment.with_suffix(".pages").stat().st_size
    if found != manifest.num_bytes:
        raise ValueError(f"the pages have {manifest.num_bytes} bytes, the file has {found}")
    return manifest


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
        segment, problem, num_pages = folder / facts.identity / facts.name, None, 0
        try:
            manifest = read_manifest(segment)
            num_pages = len(manifest.pages)
            with segment.with_suffix(".pages").open("rb") as file:
                manifest.check(file)
        except (OSError, ValueError) as error:
            problem = str(error)
        on_segment(SegmentFacts(facts.identity, facts.name, num_pages, facts.num_bytes, facts.last_used, problem))


def remove_segment(segment: Path) -> None:
    """The manifest first: what has none does not exist."""
    for suffix in (".manifest", ".pages"):
        with contextlib.suppress(OSError):
            segment.with_suffix(suffix).unlink(missing_ok=True)


def _runs(places: Sequence[int], indices: Sequence[int]) -> list[list[int]]:
    """``places`` in stretches in which both they and their indices count up by one."""
    runs: list[list[int]] = []
    for number, place in enumerate(places):
        if number and place == places[number - 1] + 1 and indices[number] == indices[number - 1] + 1:
            runs[-1].append(place)
        else:
            runs.append([place])
    return runs


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
