"""The store on disk: what is written comes back, in any process, and nothing that is wrong ever does."""

from __future__ import annotations

import errno
import itertools
import json
import logging
import os
import random
import shutil
import signal
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from zen_turbo import LLM
from zen_turbo.attention.fidelity import Note, Observation
from zen_turbo.attention.policies.adaptive import Learnt
from zen_turbo.engine.request import RequestOutput, SamplingParams
from zen_turbo.errors import InsufficientMemoryError
from zen_turbo.kv import store as store_module
from zen_turbo.kv.geometry import PageGeometry
from zen_turbo.kv.pool import PagePool
from zen_turbo.kv.store import PageStore, StoredPage, segments_of, verify

GEOMETRY = PageGeometry(num_layers=2, num_key_value_heads=1, head_dim=64, dtype=torch.bfloat16, summaries=True)
IDENTITY = bytes(range(32))
GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)


@pytest.fixture
def pool() -> Iterator[PagePool]:
    result = PagePool(GEOMETRY, 400)
    yield result
    result.close()


def open_store(folder: Path, pool: PagePool, **values: Any) -> PageStore:
    return PageStore(folder, pool, **{"identity": IDENTITY, "facts": {"model": "tiny"}, "quota_bytes": 1 << 40, **values})


def key(number: int) -> bytes:
    return number.to_bytes(16)


def content(number: int) -> bytes:
    return random.Random(number).randbytes(GEOMETRY.slot_bytes)


def write_slot(pool: PagePool, slot: int, values: bytes) -> None:
    at = 0
    for block in pool.blocks():
        block[slot] = np.frombuffer(values, np.uint8, count=block.shape[1], offset=at)
        at += block.shape[1]


def read_slot(pool: PagePool, slot: int) -> bytes:
    return b"".join(block[slot].tobytes() for block in pool.blocks())


def tokens(number: int) -> list[int]:
    return [number * 100 + at for at in range(64)]


def put(store: PageStore, pool: PagePool, numbers: range) -> None:
    for number in numbers:
        (slot,) = pool.allocate(1)
        write_slot(pool, slot, content(number))
        store.put([StoredPage(key(number), tokens(number), slot, f"note {number}".encode())])
        pool.free([slot])
    store.flush()


def get(store: PageStore, pool: PagePool, numbers: range, *, run: bool = False) -> list[int]:
    """Load what is there of these pages, from the first; every one that is given must be right. Gives their numbers."""
    count = store.find([key(number) for number in numbers])
    wanted = numbers[:count]
    slots = (pool.allocate_run if run else pool.allocate)(count)
    loaded = store.load([key(number) for number in wanted], [token for number in wanted for token in tokens(number)], slots)
    for number, slot, note in zip(wanted, slots[: loaded.num_pages], loaded.notes, strict=False):
        assert read_slot(pool, slot) == content(number), f"page {number} is wrong"
        assert note == f"note {number}".encode()
    pool.free(slots)
    return list(wanted[: loaded.num_pages])


def test_what_is_written_comes_back_in_another_process_s_view(pool: PagePool, tmp_path: Path) -> None:
    first, second = open_store(tmp_path, pool), open_store(tmp_path, pool)
    put(first, pool, range(150))
    first.wait()
    assert pool.num_free == pool.num_slots, "nothing is held once it is written"
    assert get(second, pool, range(200)) == list(range(150))
    assert get(first, pool, range(150)) == list(range(150))
    assert len(segments_of(tmp_path)) == 3
    put(second, pool, range(150))
    second.wait()
    assert len(segments_of(tmp_path)) == 3, "what is stored is not stored again"
    other = open_store(tmp_path, pool, identity=bytes(32))
    assert other.find([key(0)]) == 0
    for store in (first, second, other):
        store.close()


def test_tokens_must_be_the_same(pool: PagePool, tmp_path: Path) -> None:
    store = open_store(tmp_path, pool)
    put(store, pool, range(3))
    store.wait()
    (slot,) = pool.allocate(1)
    store.find([key(0)])
    assert store.load([key(0)], tokens(1), [slot]).num_pages == 0
    store.close()


def test_a_run_of_pages_is_mapped_and_what_is_written_over_it_stays_here(tmp_path: Path) -> None:
    pool = PagePool(GEOMETRY, 1000)
    store = open_store(tmp_path, pool)
    put(store, pool, range(150))
    store.wait()
    before = {path: path.read_bytes() for path in tmp_path.glob("*/*.pages")}
    assert store.find([key(number) for number in range(3, 150)]) == 147
    slots = pool.allocate_run(147)
    mapped = Path("/proc/self/maps").read_text().count(".pages")
    loaded = store.load([key(number) for number in range(3, 150)], [token for number in range(3, 150) for token in tokens(number)], slots)
    assert loaded.num_pages == 147
    assert all(read_slot(pool, slot) == content(number) for number, slot in zip(range(3, 150), slots, strict=True))
    # Pages of 16 KiB can lie anywhere, summaries of 768 bytes only where 16 of them do: not from the third on.
    assert Path("/proc/self/maps").read_text().count(".pages") - mapped == 3 * 2
    pool.free(slots)
    again = pool.allocate_run(150)
    assert again[0] % 64 == 0 and store.find([key(number) for number in range(150)]) == 150
    assert store.load([key(number) for number in range(150)], [token for number in range(150) for token in tokens(number)], again).num_pages == 150
    assert Path("/proc/self/maps").read_text().count(".pages") - mapped == 3 * 2 + 3 * 4
    for slot in again:
        write_slot(pool, slot, content(1000 + slot))
    assert all(read_slot(pool, slot) == content(1000 + slot) for slot in again)
    store.close()
    assert {path: path.read_bytes() for path in before} == before
    pool.free(again)
    pool.verify([])


def test_slots_in_any_order_are_filled(pool: PagePool, tmp_path: Path) -> None:
    store = open_store(tmp_path, pool)
    put(store, pool, range(64))
    store.wait()
    keys, wanted = [key(number) for number in range(64)], [token for number in range(64) for token in tokens(number)]
    assert store.find(keys) == 64
    first, *between, last = pool.allocate_run(64)
    for order in ([first, *reversed(between), last], [*between, first, last]):
        assert store.load(keys, wanted, order).num_pages == 64
        assert all(read_slot(pool, slot) == content(number) for number, slot in enumerate(order))
    store.close()


def test_mappings_that_the_system_refuses_are_copies(pool: PagePool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(tmp_path, pool)
    put(store, pool, range(64))
    store.wait()

    def refuse(*arguments: int) -> None:
        raise OSError(errno.ENOMEM, "no more mappings")

    monkeypatch.setattr("zen_turbo.kv.pool.map_over", refuse)
    assert get(store, pool, range(64), run=True) == list(range(64))
    store.close()


def test_a_prompt_may_begin_anywhere_in_a_run(pool: PagePool) -> None:
    one, run = pool.allocate(3), pool.allocate_run(200)
    assert run == list(range(64, 264))
    pool.verify([one, run])
    rest = pool.allocate(pool.num_free)
    assert sorted([*one, *run, *rest]) == list(range(400))
    pool.free([*run, *rest])
    assert len(set(pool.allocate_run(390))) == 390, "nothing is left that was never used"
    with pytest.raises(InsufficientMemoryError):
        pool.allocate_run(8)


def test_500_damages_are_noticed(pool: PagePool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Bit flips, truncations, exchanged, missing and foreign files: what is loaded is right, and the rest can be written again."""
    good = tmp_path / "good"
    store = open_store(good, pool)
    put(store, pool, range(128))
    store.close()
    generator = random.Random(5)
    lost = 0
    with caplog.at_level(logging.CRITICAL):
        for _ in range(500):
            folder = tmp_path / "bad"
            shutil.copytree(good, folder)
            files = sorted(path for path in folder.glob("*/*") if path.suffix in (".pages", ".manifest"))
            path, damage = generator.choice(files), generator.choice(["flip", "cut", "exchange", "grow", "missing"])
            data = bytearray(path.read_bytes())
            if damage == "flip":
                data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
                path.write_bytes(data)
            elif damage == "cut":
                path.write_bytes(data[: generator.randrange(len(data))])
            elif damage == "grow":
                path.write_bytes(data + b"0")
            elif damage == "missing":
                path.unlink()
            else:
                other = next(item for item in files if item.suffix == path.suffix and item != path)
                path.write_bytes(other.read_bytes())
                other.write_bytes(data)
            store = open_store(folder, pool)
            found = get(store, pool, range(128))
            lost += len(found) < 128
            put(store, pool, range(128))
            store.wait()
            assert get(store, pool, range(128)) == list(range(128)), damage
            store.close()
            shutil.rmtree(folder)
    assert lost > 300
    pool.verify([])


def test_killed_200_times_while_writing(pool: PagePool, tmp_path: Path) -> None:
    """kill -9 at random moments: what is left is sound, and after the last one the store still works and has no litter."""
    generator = random.Random(7)
    slots = pool.allocate(8)
    for number, slot in enumerate(slots):
        write_slot(pool, slot, content(number))
    for run in range(200):
        reader, writer = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads: the child starts its own and never returns
            child = os.fork()
        if child == 0:
            try:
                store = open_store(tmp_path, pool)
                os.write(writer, b"x")
                for batch in itertools.count():
                    first = (run * 1000 + batch) * 8
                    store.put([StoredPage(key(first + at), tokens(at), slot, b"") for at, slot in enumerate(slots)])
                    store.flush()
                    store.wait()
            finally:
                os._exit(1)
        os.read(reader, 1)
        time.sleep(generator.random() * 0.03)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reader)
        os.close(writer)
    problems: list[str] = []
    seen = []

    def note(facts: store_module.SegmentFacts) -> None:
        seen.append(facts)
        if facts.problem:
            problems.append(facts.problem)

    verify(tmp_path, note)
    assert problems == [] and len(seen) > 0
    store, copies = open_store(tmp_path, pool), pool.allocate(8)
    for facts in seen:
        keys = [page.key for page in store_module.read_manifest(tmp_path / facts.identity / facts.name).pages]
        assert store.find(keys) == 8
        assert store.load(keys, [token for at in range(8) for token in tokens(at)], copies).num_pages == 8
        assert all(read_slot(pool, slot) == content(at) for at, slot in enumerate(copies))
    put(store, pool, range(5000, 5010))
    store.close()
    names = [path for path in tmp_path.glob("*/*") if path.name != "identity.json"]
    assert not [path for path in names if path.suffix == ".tmp"]
    assert {path.stem for path in names if path.suffix == ".pages"} == {path.stem for path in names if path.suffix == ".manifest"}


def test_the_quota_is_kept_and_the_oldest_go(pool: PagePool, tmp_path: Path) -> None:
    store = open_store(tmp_path, pool, quota_bytes=GEOMETRY.slot_bytes * 64 * 3)
    for part in range(5):
        put(store, pool, range(part * 50, part * 50 + 50))
        store.wait()
        time.sleep(0.02)
        if part == 2:
            assert len(get(store, pool, range(50))) == 50, "used again: now the youngest"
            time.sleep(0.02)
    assert sum(facts.num_bytes for facts in segments_of(tmp_path)) <= GEOMETRY.slot_bytes * 64 * 3
    assert [len(get(store, pool, range(part * 50, part * 50 + 50))) for part in range(5)] == [50, 0, 0, 50, 50]
    store.close()


def test_a_disk_that_fills_up_ends_writing_with_one_warning(
    pool: PagePool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(tmp_path, pool)
    put(store, pool, range(64))
    store.wait()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    put(store, pool, range(64, 256))
    put(store, pool, range(256, 300))
    store.close()
    assert [record.getMessage() for record in caplog.records if "No space left" in record.getMessage()] == [caplog.records[-1].getMessage()]
    assert pool.num_free == pool.num_slots
    monkeypatch.undo()
    again = open_store(tmp_path, pool)
    assert get(again, pool, range(300)) == list(range(64))
    assert not list(tmp_path.glob("*/*.tmp"))
    again.close()


def test_notes_come_back_as_they_were() -> None:
    generator = torch.Generator().manual_seed(0)
    learnt = Learnt(*(torch.rand(2, 3, generator=generator) for _ in range(3)))
    seen = tuple(Observation(8192 + at, at, torch.rand(3, generator=generator), torch.rand(3, generator=generator)) for at in range(4))
    for note in (Note(None, ()), Note(learnt, ()), Note(None, seen), Note(learnt, seen)):
        found = Note.from_bytes(note.to_bytes())
        assert (found.learnt is None) == (note.learnt is None)
        if note.learnt is not None and found.learnt is not None:
            assert all(torch.equal(a, b) for a, b in zip(found.learnt, note.learnt, strict=True))
        assert len(found.observations) == len(note.observations)
        for a, b in zip(found.observations, note.observations, strict=True):
            assert a[:2] == b[:2] and torch.equal(a.error, b.error) and torch.equal(a.pages, b.pages)


# In the engine


def ask(folder: Path, store: Path, prompt: list[int], **knobs: Any) -> RequestOutput:
    settings: dict[str, Any] = {
        "attention": "dense",
        "dense_tokens": 256,
        "prefill_chunk_tokens": 128,
        "kv_cache_bytes": 32 << 20,
        "max_model_len": 4096,
    }
    llm = LLM(folder, store=str(store), **{**settings, **knobs})
    try:
        return llm.generate(prompt, GREEDY)
    finally:
        llm.engine.close()


@pytest.mark.parametrize("knobs", [{}, {"attention": "adaptive"}, {"attention": "adaptive", "kv_dtype": "int8"}, {"attention": "tri_shape"}])
def test_a_restart_goes_on_from_the_store(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, knobs: dict[str, Any]) -> None:
    monkeypatch.setattr("zen_turbo.attention.fidelity.WINDOW_TOKENS", 512)
    document = tiny.tokens(1300)
    prompts = [[*document, *tiny.tokens(150, seed=seed)] for seed in (1, 2)]
    ask(tiny_folder, tmp_path / "store", prompts[0], **knobs)
    warm = ask(tiny_folder, tmp_path / "store", prompts[1], **knobs)
    cold = ask(tiny_folder, tmp_path / "other", prompts[1], **knobs)
    assert warm.cached_tokens == (1280 if knobs.get("attention") != "tri_shape" else 1280 // 128 * 128) and cold.cached_tokens == 0
    assert warm.token_ids == cold.token_ids
    assert ask(tiny_folder, tmp_path / "store", prompts[1], **{**knobs, "dca_local_size": 64}).cached_tokens == 0, "other settings, other pages"
    assert json.loads(next((tmp_path / "store").glob("*/identity.json")).read_text())["engine"]["dense_tokens"] == 256


def test_a_store_that_cannot_be_is_no_reason_to_fail(tiny_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("not a folder")
    prompt = tiny.tokens(500)
    output = ask(tiny_folder, tmp_path / "file", prompt)
    assert output.token_ids == ask(tiny_folder, tmp_path / "store", prompt).token_ids
    assert sum("is not written" in record.getMessage() for record in caplog.records) == 1


def test_damage_is_recomputed(tiny_folder: Path, tmp_path: Path) -> None:
    prompt = tiny.tokens(900)
    cold = ask(tiny_folder, tmp_path, prompt)
    (records,) = tmp_path.glob("*/*.pages")
    data = bytearray(records.read_bytes())
    data[len(data) // 2] ^= 1
    records.write_bytes(data)
    damaged = ask(tiny_folder, tmp_path, prompt)
    assert damaged.token_ids == cold.token_ids and damaged.cached_tokens == 0, "all 14 pages are in one segment"
    again = ask(tiny_folder, tmp_path, prompt)
    assert (again.token_ids, again.cached_tokens) == (cold.token_ids, 896)


SLOT_BYTES = 64 * 2 * 2 * 2 * 64 * 2  # of the tiny model in bfloat16


def test_memory_that_is_short_takes_what_fits(tiny_folder: Path, tmp_path: Path) -> None:
    prompt = tiny.tokens(900)
    cold = ask(tiny_folder, tmp_path, prompt)
    tight = ask(tiny_folder, tmp_path, prompt, kv_cache_bytes=SLOT_BYTES * 15, max_model_len=950)
    assert (tight.token_ids, tight.cached_tokens) == (cold.token_ids, 896)


@pytest.mark.parametrize("knobs", [{}, {"attention": "adaptive", "kv_dtype": "int8"}])
def test_a_request_may_exceed_memory(tiny_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, knobs: dict[str, Any]) -> None:
    """Pages lie in a file without a name then, which goes with the engine; where that cannot be, the limit is what memory holds."""
    prompt = tiny.tokens(1500)
    cold = ask(tiny_folder, tmp_path / "one", prompt, **knobs)
    large = ask(tiny_folder, tmp_path / "two", prompt, kv_cache_bytes=SLOT_BYTES * 5, **knobs)
    assert large.token_ids == cold.token_ids
    assert {path.suffix for path in (tmp_path / "two").rglob("*") if path.is_file()} == {".json", ".pages", ".manifest"}
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(InsufficientMemoryError):
        ask(tiny_folder, tmp_path / "file", prompt, kv_cache_bytes=SLOT_BYTES * 5, **knobs)
    assert "stay in memory" in caplog.text
