"""What a request finds of earlier ones, and what it leaves: the prefix index in memory and the store on disk behind it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from zen_turbo.attention.fidelity import Note
from zen_turbo.attention.policies.adaptive import settings_of
from zen_turbo.config import PAGE_TOKENS, EngineConfig
from zen_turbo.engine.running import Running
from zen_turbo.errors import InsufficientMemoryError
from zen_turbo.kv.geometry import pages_for
from zen_turbo.kv.pool import PagePool
from zen_turbo.kv.prefix import Chain, Match, PrefixIndex
from zen_turbo.kv.sequence import SequenceCache
from zen_turbo.kv.store import PageStore, StoredPage
from zen_turbo.models.linear import linear_arithmetic
from zen_turbo.native import selected_isa

PAGE_FORMAT = 6  # of what a page holds; to be raised when kernels or policies write other numbers than before
# decode_* are among them because an answer's pages are its conversation's own.
_KNOBS_WITHOUT_EFFECT_ON_PAGES = frozenset(
    """max_model_len prefill_chunk_tokens kv_cache_bytes max_num_seqs num_threads store store_bytes decode_attention decode_pages
    decode_dense_tokens""".split()
)
_ROW_BY_ROW = ("dense", "adaptive")  # policies whose pages do not depend on the chunk that they were computed in


def cache_identity(config: EngineConfig, *, model_fingerprint: str, dual_chunk: object) -> bytes:
    """A hash of everything but tokens that keys and values depend on."""
    knobs = {name: value for name, value in config.to_dict().items() if name not in _KNOBS_WITHOUT_EFFECT_ON_PAGES}
    knobs["linear_dtype"] = linear_arithmetic(config)
    if config.attention not in _ROW_BY_ROW:
        knobs["prefill_chunk_tokens"] = config.prefill_chunk_tokens
    facts = [PAGE_FORMAT, model_fingerprint, knobs, repr(dual_chunk), config.needs_summaries, selected_isa()]
    if config.attention == "adaptive":
        facts.append(repr(settings_of(config.preset, config.fidelity)))
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).digest()


class Reuse:
    """dense_tail_tokens: rows at a prompt's end that read more because they are its end, so that their pages are the prompt's own.
    length_matters: keys depend on how long the prompt is (dynamic RoPE)."""

    def __init__(
        self,
        pool: PagePool,
        config: EngineConfig,
        *,
        model_name: str,
        model_fingerprint: str,
        dual_chunk: object,
        dense_tail_tokens: int,
        length_matters: bool,
    ) -> None:
        self._pool = pool
        self._identity = cache_identity(config, model_fingerprint=model_fingerprint, dual_chunk=dual_chunk)
        self._dense_tail = dense_tail_tokens
        # In a chunk that is sparse further on, even rows that read everything are sampled, and that steers what follows.
        self._dense_tokens = config.dense_tokens // config.prefill_chunk_tokens * config.prefill_chunk_tokens
        self._length_matters = length_matters
        self._grid_pages = 1 if config.attention in _ROW_BY_ROW else config.prefill_chunk_tokens // PAGE_TOKENS
        self.prefixes = PrefixIndex(pool)
        self.store: PageStore | None = None
        if config.store is not None:
            facts = {"model": model_name, "model_fingerprint": model_fingerprint, "engine": config.to_dict()}
            folder = Path(config.store).expanduser()
            self.store = PageStore(folder, pool, identity=self._identity, facts=facts, quota_bytes=config.store_bytes)

    def chain(self, tokens: list[int]) -> Chain:
        """The pages of a prompt by content. Its own begin where its end makes a difference: at the rows that read more because they are the
        last, unless every prompt reads all there, else at the first token that is not the prompt's."""
        identity = self._identity
        if self._length_matters:
            identity = hashlib.sha256(identity + len(tokens).to_bytes(8)).digest()
        exact_tokens = max(len(tokens) - self._dense_tail, min(len(tokens), self._dense_tokens))
        return Chain(tokens, identity, own_from=exact_tokens // PAGE_TOKENS)

    def find(self, tokens: list[int]) -> Match:
        """What memory knows of a prompt without its last token, which is always read."""
        return self.prefixes.find(self.chain(tokens), (len(tokens) - 1) // PAGE_TOKENS, grid_pages=self._grid_pages)

    def reserve(self, request: Running) -> bool:
        """Give the request a cache that begins with the longest prefix that is known and has room for all it may need. False and nothing changed
        where memory is too small at the moment."""
        reusable = _reusable_pages(request)
        if reusable:
            self._load(request)
        known = self.prefixes.find(request.chain, reusable, grid_pages=self._grid_pages)
        cache = SequenceCache(self._pool)
        cache.adopt(known.slots)
        total = request.num_prompt_tokens + request.max_tokens
        missing = pages_for(total) - len(cache.slots) - self._pool.num_free
        if missing > 0:
            self.prefixes.evict(missing)
        try:
            cache.reserve(total)
        except InsufficientMemoryError:
            cache.release()
            return False
        request.cache = cache
        request.cached_tokens = request.indexed_tokens = cache.num_tokens
        if request.fidelity is not None:
            request.fidelity.resume(known.notes)
        return True

    def worth_waiting(self, request: Running, others: tuple[Running, ...]) -> bool:
        """Whether one of ``others``, which are being read, will soon have computed at least half of what the request would have to compute
        itself: two questions about one long document then read it once."""
        most = _reusable_pages(request)
        if not most:
            return False
        for other in others:
            assert other.cache is not None
            if request.num_prompt_tokens == other.num_prompt_tokens and request.tokens == other.tokens:
                return True  # its own last pages too can be used when it is through
            common = _common_pages(request.chain, other.chain, min(most, other.num_prompt_tokens // PAGE_TOKENS))
            if common > other.cache.num_tokens // PAGE_TOKENS:
                known = self.prefixes.count_exact(request.chain, most)
                if common > known and 2 * (common - known) >= most + 1 - known:
                    return True
        return False

    def keep(self, request: Running) -> None:
        """Offer the pages that are full by now to others, and what any prompt could use to the store."""
        cache = request.cache
        assert cache is not None
        first, last = request.indexed_tokens // PAGE_TOKENS, cache.num_tokens // PAGE_TOKENS
        notes = [request.fidelity.note(page) if request.fidelity else None for page in range(first, last)]
        self.prefixes.add(request.chain, cache.slots[first:last], notes, first_page=first)
        request.indexed_tokens = last * PAGE_TOKENS
        if self.store is not None:
            exact = range(first, min(last, request.chain.own_from))
            self.store.put([_stored_page(request, page, cache.slots[page], note) for page, note in zip(exact, notes, strict=False)])
            self.store.collect()

    def end_of_prompt(self, request: Running) -> None:
        """The prompt is read: who asks the same again may use its last pages too."""
        self.prefixes.end(request.chain, (request.num_prompt_tokens - 1) // PAGE_TOKENS, same=True)

    def leave(self, request: Running) -> None:
        """The request ended, however: what it computed stays, its references go."""
        cache = request.cache
        if cache is None:
            return
        self.keep(request)
        answered = cache.num_tokens >= request.num_prompt_tokens
        (self.prefixes.end if answered else self.prefixes.touch)(request.chain, cache.num_tokens // PAGE_TOKENS)
        if self.store is not None:
            self.store.flush()
        cache.release()
        request.cache = request.answer = None

    def close(self) -> None:
        self.prefixes.clear()
        if self.store is not None:
            self.store.close()

    def _load(self, request: Running) -> None:
        """Bring exact pages that go on where the index ends from the store into the index."""
        store, chain = self.store, request.chain
        if store is None or request.asked_store:
            return
        request.asked_store = True
        store.collect()
        most = min((request.num_prompt_tokens - 1) // PAGE_TOKENS, chain.own_from)
        first = self.prefixes.count_exact(chain, most)
        count = store.find([chain.key(page) for page in range(first, most)])
        self.prefixes.evict(count - self._pool.num_free)
        count = min(count, self._pool.num_free)
        if count <= 0:
            return
        slots = self._pool.allocate_run(count)
        keys = [chain.key(page) for page in range(first, first + count)]
        loaded = store.load(keys, request.tokens[first * PAGE_TOKENS : (first + count) * PAGE_TOKENS], slots)
        notes = [Note.from_bytes(note) if note else None for note in loaded.notes]
        self.prefixes.add(chain, slots[: loaded.num_pages], notes, first_page=first)
        if loaded.num_pages < count:  # a damaged segment is gone, with the sound pages that stood before the damage
            store.put([_stored_page(request, first + at, slot, note) for at, (slot, note) in enumerate(zip(slots, notes, strict=False))])
        self._pool.free(slots)


def _reusable_pages(request: Running) -> int:
    """Pages that need not be computed if they are known: the last token is always read, and every token whose logits are wanted."""
    return 0 if request.prompt_logprobs is not None else (request.num_prompt_tokens - 1) // PAGE_TOKENS


def _common_pages(one: Chain, other: Chain, most: int) -> int:
    """Exact pages that two sequences have in common, of the first ``most``."""
    low, high = 0, min(most, one.own_from, other.own_from)
    while low < high:  # a key names everything before it, so agreement ends once
        middle = (low + high + 1) // 2
        if one.key(middle - 1) == other.key(middle - 1):
            low = middle
        else:
            high = middle - 1
    return low


def _stored_page(request: Running, page: int, slot: int, note: Note | None) -> StoredPage:
    tokens = request.tokens[page * PAGE_TOKENS : (page + 1) * PAGE_TOKENS]
    return StoredPage(request.chain.key(page), tokens, slot, note.to_bytes() if note else b"")
