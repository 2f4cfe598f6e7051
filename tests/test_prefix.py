"""The prefix index against a plain model of what is known, and through any history of arrivals, forks, aborts and evictions."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from zen_turbo import LLM
from zen_turbo.engine.request import Event, SamplingParams, TokenDelta
from zen_turbo.errors import InsufficientMemoryError
from zen_turbo.kv.geometry import PageGeometry
from zen_turbo.kv.pool import PagePool
from zen_turbo.kv.prefix import Chain, PrefixIndex
from zen_turbo.kv.sequence import SequenceCache

GEOMETRY = PageGeometry(num_layers=1, num_key_value_heads=1, head_dim=64, dtype=torch.bfloat16)
IDENTITY = b"model and settings"
FAR = 1 << 30
GREEDY = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)


@pytest.fixture
def pool() -> Iterator[PagePool]:
    result = PagePool(GEOMETRY, 64)
    yield result
    result.close()


def tokens(num_pages: int, *, seed: int = 0, rest: int = 0) -> list[int]:
    return [random.Random(seed * 1000 + at // 64).randrange(1000) + at for at in range(num_pages * 64 + rest)]


def fill(pool: PagePool, index: PrefixIndex, chain: Chain, num_pages: int, *, ends: bool = True) -> list[int]:
    """A sequence that computes so many pages, leaves them to the index and ends. Gives their slots."""
    slots = pool.allocate(num_pages)
    index.add(chain, slots, [f"note {page}" for page in range(num_pages)], first_page=0)
    if ends:
        index.end(chain, num_pages)
    pool.free(slots)
    return slots


def test_a_prefix_is_found_as_far_as_tokens_agree(pool: PagePool) -> None:
    index = PrefixIndex(pool)
    slots = fill(pool, index, Chain(tokens(5), IDENTITY, own_from=FAR), 5)
    other = [*tokens(3), *tokens(2, seed=1)]
    found = index.find(Chain(other, IDENTITY, own_from=FAR), 5)
    assert (found.slots, found.notes, found.exact) == (slots[:3], ["note 0", "note 1", "note 2"], 3)
    assert index.find(Chain(tokens(5), IDENTITY, own_from=FAR), 2).slots == slots[:2], "no more than asked for"
    assert index.find(Chain(tokens(5), b"another model", own_from=FAR), 5).slots == []
    assert index.find(Chain(tokens(5)[1:], IDENTITY, own_from=FAR), 4).slots == [], "the same tokens elsewhere are other pages"
    assert index.find(Chain(tokens(5), IDENTITY, own_from=FAR), 5, grid_pages=2).slots == slots[:4], "whole chunks"


def test_own_pages_are_for_the_same_prompt_and_for_those_who_go_on(pool: PagePool) -> None:
    """Pages 3 and on are the first sequence's own; it ends with 20 tokens after its last full page."""
    index = PrefixIndex(pool)
    whole = tokens(6, rest=20)
    slots = fill(pool, index, Chain(whole, IDENTITY, own_from=3), 6)

    def find(prompt: list[int], own_from: int) -> list[int]:
        return index.find(Chain(prompt, IDENTITY, own_from=own_from), (len(prompt) - 1) // 64).slots

    assert find([*whole, *tokens(4, seed=2)], 9) == slots, "goes on after all of it"
    assert find([*whole[:-1], 5, *tokens(4, seed=2)], 9) == slots[:3], "one token of the end differs"
    assert find(whole[:-1], 5) == slots[:3], "shorter"
    index.end(Chain(whole[:400], IDENTITY, own_from=3), 6, same=True)
    assert find(whole[:400], 3) == slots, "the same prompt again"
    assert find([*whole[:400], 7, *tokens(4, seed=2)], 9) == slots[:3], "that prompt, but not its answer"


def test_what_follows_own_pages_is_own(pool: PagePool) -> None:
    index = PrefixIndex(pool)
    first = tokens(4)
    fill(pool, index, Chain(first, IDENTITY, own_from=2), 4)
    second = [*first, *tokens(4, seed=3)]
    chain = Chain(second, IDENTITY, own_from=7)
    assert len(index.find(chain, 8).slots) == 4
    assert chain.own_from == 2
    fill(pool, index, chain, 8)
    assert len(index.find(Chain([*first, *tokens(2, seed=3), *tokens(5, seed=4)], IDENTITY, own_from=FAR), 10).slots) == 4
    assert len(index.find(Chain([*second, *tokens(1, seed=5)], IDENTITY, own_from=FAR), 8).slots) == 8
    cold = index.find(Chain([*tokens(4, seed=9)], IDENTITY, own_from=FAR), 4)
    assert cold.slots == []


def test_the_oldest_go_first_and_never_before_what_follows_them(pool: PagePool) -> None:
    index = PrefixIndex(pool)
    old, young = Chain(tokens(4, seed=1), IDENTITY, own_from=FAR), Chain(tokens(4, seed=2), IDENTITY, own_from=FAR)
    fill(pool, index, old, 4)
    fill(pool, index, young, 4)
    assert index.evict(3) == 3
    assert (len(index.find(old, 4).slots), len(index.find(young, 4).slots)) == (1, 4)
    index.find(old, 4)
    assert index.evict(2) == 2
    assert (len(index.find(old, 4).slots), len(index.find(young, 4).slots)) == (1, 2)
    assert index.evict(10) == 3 and len(index) == 0 and pool.num_free == pool.num_slots


def test_pages_in_use_are_not_evicted(pool: PagePool) -> None:
    index = PrefixIndex(pool)
    chain = Chain(tokens(6), IDENTITY, own_from=FAR)
    fill(pool, index, chain, 6)
    cache = SequenceCache(pool)
    cache.adopt(index.find(chain, 4).slots)
    assert index.evict(6) == 2
    assert len(index.find(chain, 6).slots) == 4
    cache.release()
    assert index.evict(6) == 4


def test_two_who_computed_the_same_share_the_first_ones_pages(pool: PagePool) -> None:
    index = PrefixIndex(pool)
    first = fill(pool, index, Chain(tokens(3), IDENTITY, own_from=FAR), 3)
    fill(pool, index, Chain(tokens(3), IDENTITY, own_from=FAR), 3)
    assert sorted(index.slots) == sorted(first)
    assert pool.num_free == pool.num_slots - 3


def test_any_history(pool: PagePool) -> None:
    """10,000 steps: prompts over a tree of prefixes arrive, go on, end and are aborted while memory is short. After each, every slot is held
    exactly as often as sequences and index say, and what a prompt finds are pages of its own tokens."""
    generator = random.Random(1)
    index = PrefixIndex(pool)
    running: list[tuple[Chain, SequenceCache]] = []
    content: dict[int, tuple[int, ...]] = {}  # slot -> every token up to its page's end
    admitted = waited = 0
    for step in range(10_000):
        if running and generator.random() < 0.6:
            chain, cache = running[generator.randrange(len(running))]
            page = cache.num_tokens // 64
            if generator.random() < 0.1 or page == len(cache.slots):
                index.end(chain, page)
                cache.release()
                running = [item for item in running if item[1] is not cache]
            else:
                slot = cache.slots[page]
                content[slot] = tuple(chain.tokens[: page * 64 + 64])
                cache.commit(page * 64 + 64)
                index.add(chain, [slot], [page], first_page=page)
        else:
            prompt: list[int] = []
            for depth in range(generator.randrange(1, 12)):
                prompt += tokens(1, seed=depth * 3 + generator.randrange(2))
            chain = Chain(prompt, IDENTITY, own_from=generator.randrange(len(prompt) // 64 + 1))
            found = index.find(chain, len(prompt) // 64)
            for page, slot in enumerate(found.slots):
                assert content[slot] == tuple(prompt[: page * 64 + 64])
            assert found.notes == list(range(len(found.slots)))
            cache = SequenceCache(pool)
            cache.adopt(found.slots)
            index.evict(max(0, len(prompt) // 64 - len(cache.slots) - pool.num_free))
            try:
                cache.reserve(len(prompt))
            except InsufficientMemoryError:
                cache.release()
                waited += 1
                _, cache = running.pop(0)
                cache.release()
            else:
                admitted += 1
                running.append((chain, cache))
        if step % 20 == 0:
            pool.verify([*(cache.slots for _, cache in running), index.slots])
    assert admitted > 2000 and waited > 10
    for _, cache in running:
        cache.release()
    index.clear()
    pool.verify([])


@pytest.mark.parametrize("attention", ["dense", "adaptive"])
def test_a_document_between_others_is_still_known(tiny_folder: Path, attention: str) -> None:
    """Not only the last request's prefix: documents take turns, and one that memory cannot keep is read again."""
    settings: dict[str, Any] = {"prefill_chunk_tokens": 128, "kv_cache_bytes": 32 << 20, "max_model_len": 4096, "dense_tokens": 128}
    llm = LLM(tiny_folder, attention=attention, **settings)
    documents = [tiny.tokens(600, seed=seed) for seed in range(3)]
    cold = [llm.generate([*document, *tiny.tokens(200, seed=9)], GREEDY) for document in documents]
    warm = [llm.generate([*document, *tiny.tokens(200, seed=9)], GREEDY) for document in documents]
    assert [output.cached_tokens for output in cold] == [0, 0, 0]
    assert [output.cached_tokens for output in warm] == [768] * 3
    assert [output.token_ids for output in warm] == [output.token_ids for output in cold]
    other = [llm.generate([*document, *tiny.tokens(200, seed=8)], GREEDY) for document in documents]
    assert [output.cached_tokens for output in other] == [576] * 3
    engine = llm.engine
    engine.pool.verify([engine.reuse.prefixes.slots])
    small = LLM(tiny_folder, attention=attention, **{**settings, "kv_cache_bytes": engine.geometry.slot_bytes * 20})
    for document, expected in zip([*documents, *documents], [*cold, *cold], strict=True):
        found = small.generate([*document, *tiny.tokens(200, seed=9)], GREEDY)
        assert (found.cached_tokens, found.token_ids) == (0, expected.token_ids)


@pytest.mark.parametrize("first", [250, 300])
def test_the_end_of_a_short_prompt_is_its_own_only_where_a_longer_one_would_be_sparse(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, first: int
) -> None:
    monkeypatch.setattr("zen_turbo.attention.fidelity.WINDOW_TOKENS", 512)
    settings: dict[str, Any] = {"prefill_chunk_tokens": 128, "kv_cache_bytes": 32 << 20, "max_model_len": 4096, "dense_tokens": 320}
    greedy = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True, logprobs=2)

    def ask(llm: LLM) -> tuple[int, list[Event]]:
        events: list[Event] = []
        output = llm.generate(tiny.tokens(1500), greedy, on_event=events.append)
        return output.cached_tokens, [event for event in events if isinstance(event, TokenDelta)]

    cold, expected = ask(LLM(tiny_folder, attention="adaptive", **settings))
    llm = LLM(tiny_folder, attention="adaptive", **settings)
    llm.generate(tiny.tokens(1500)[:first], GREEDY)
    warm, found = ask(llm)
    assert (cold, warm) == (0, {250: 192, 300: 256}[first])
    assert [(delta.text, delta.logprobs) for delta in found] == [(delta.text, delta.logprobs) for delta in expected]
