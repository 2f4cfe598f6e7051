"""The prefix index: which pages hold the keys and values of which tokens, whoever computed them.

Pages are content-addressed. The key of a page is a hash of the key of the page before it and of its own 64 tokens, so it names the whole
prefix; the first key starts from an identity, a hash of everything else that keys and values depend on (model, rotations, policy, types). Two
prompts share pages exactly as far as they share tokens.

There are two kinds of pages. **Exact** ones are what any prompt that begins with these tokens computes. **Own** ones belong to one conversation:
an answer's tokens, and with a sparse policy the rows at a prompt's end, which read more because they are its end, and whatever follows
them. Another prompt would have computed these differently, so they are found in two cases only: by the very same prompt, and by one that
continues the conversation, with all tokens of a request that ended, the answer included.

The index holds one reference to each of its pages. Least recently used ones go first; a page is always used after those that follow it, so a
prefix is never evicted before its continuations.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from zen_turbo.config import PAGE_TOKENS
from zen_turbo.kv.pool import PagePool

_KEY_BYTES = 16


def _key(before: bytes, tokens: Sequence[int], *, own: bool) -> bytes:
    content = array("i", tokens).tobytes()
    return hashlib.blake2b(content, key=before, digest_size=_KEY_BYTES, person=b"own" if own else b"exact").digest()


class Chain:
    """The keys of one sequence's pages, each computed once. ``tokens`` may grow. From page ``own_from`` on pages are its own."""

    def __init__(self, tokens: Sequence[int], identity: bytes, *, own_from: int) -> None:
        self.tokens = tokens
        self.own_from = own_from
        self.identity = identity
        self._keys: list[bytes] = []

    def key(self, page: int) -> bytes:
        while len(self._keys) <= page:
            at = len(self._keys)
            self._keys.append(self.key_after(self._keys[-1] if at else self.identity, at, own=at >= self.own_from))
        return self._keys[page]

    def key_after(self, before: bytes, page: int, *, own: bool) -> bytes:
        return _key(before, self.tokens[page * PAGE_TOKENS : (page + 1) * PAGE_TOKENS], own=own)

    def begin_own(self, page: int) -> None:
        """Pages from here on are the sequence's own, because what precedes them is."""
        if page < self.own_from:
            self.own_from = page
            del self._keys[page:]


class _End(NamedTuple):
    """A sequence ends with ``rest`` after this page; whoever wants to use its own pages must have these tokens too, and no more if ``same``."""

    rest: tuple[int, ...]
    same: bool


@dataclass
class _Entry:
    slot: int
    note: Any
    ends: frozenset[_End] = frozenset()


class Match(NamedTuple):
    """Pages of a prefix: their slots, and what was noted with each. ``exact``: how many of them are exact, and come first."""

    slots: list[int]
    notes: list[Any]
    exact: int


class PrefixIndex:
    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()  # least recently used first

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def slots(self) -> list[int]:
        return [entry.slot for entry in self._entries.values()]

    def find(self, chain: Chain, most_pages: int, *, grid_pages: int = 1) -> Match:
        """The longest known prefix of at most ``most_pages``. Its pages are the index's: share them before anything is evicted.

        grid_pages: where a page's content depends on the chunk that it was computed in, the pages of a chunk; then only whole chunks of exact
        pages are found."""
        keys = [chain.key(page) for page in range(self.count_exact(chain, most_pages))]
        if grid_pages > 1:
            most_pages = len(keys) // grid_pages * grid_pages
            del keys[most_pages:]
        exact = len(keys)
        ended, before = exact, keys[-1] if keys else chain.identity
        while len(keys) < most_pages:
            before = chain.key_after(before, len(keys), own=True)
            entry = self._entries.get(before)
            if entry is None:
                break
            keys.append(before)
            if any(_continues(chain.tokens, len(keys) * PAGE_TOKENS, end) for end in entry.ends):
                ended = len(keys)
        del keys[ended:]
        if ended > exact:
            chain.begin_own(exact)
        self._touch(keys)
        entries = [self._entries[key] for key in keys]
        return Match([entry.slot for entry in entries], [entry.note for entry in entries], exact)

    def count_exact(self, chain: Chain, most_pages: int) -> int:
        """How many exact pages of the prefix are known, as ``find`` would give them."""
        count = 0
        while count < min(most_pages, chain.own_from) and chain.key(count) in self._entries:
            count += 1
        return count

    def add(self, chain: Chain, slots: Sequence[int], notes: Sequence[Any], *, first_page: int) -> None:
        """Pages ``first_page`` and on, full and written in every layer. Those that are known already are left as they are."""
        for offset, (slot, note) in enumerate(zip(slots, notes, strict=True)):
            key = chain.key(first_page + offset)
            if key not in self._entries:
                self._pool.share([slot])
                self._entries[key] = _Entry(slot, note)

    def end(self, chain: Chain, num_pages: int, *, same: bool = False) -> None:
        """A sequence ends, of which all full pages, so many, were added: its conversation may be continued from here, or with ``same`` the same
        prompt be asked again."""
        self.touch(chain, num_pages)
        entry = self._entries.get(chain.key(num_pages - 1)) if num_pages > chain.own_from else None
        if entry is not None:
            entry.ends |= {_End(tuple(chain.tokens[num_pages * PAGE_TOKENS :]), same)}

    def touch(self, chain: Chain, num_pages: int) -> None:
        """The first pages of a sequence were used, as far as they are known."""
        self._touch([key for page in range(num_pages) if (key := chain.key(page)) in self._entries])

    def evict(self, count: int) -> int:
        """Free at least ``count`` slots if so many are held by nobody else; gives how many were freed."""
        chosen: list[bytes] = []
        for key, entry in self._entries.items():
            if len(chosen) >= count:
                break
            if self._pool.references(entry.slot) == 1:
                chosen.append(key)
        for key in chosen:
            self._pool.free([self._entries.pop(key).slot])
        return len(chosen)

    def clear(self) -> None:
        self._pool.free(self.slots)
        self._entries.clear()

    def _touch(self, keys: Sequence[bytes]) -> None:
        for key in reversed(keys):
            self._entries.move_to_end(key)


def _continues(tokens: Sequence[int], at: int, end: _End) -> bool:
    rest = tuple(tokens[at : at + len(end.rest)])
    return rest == end.rest and not (end.same and len(tokens) > at + len(rest))
