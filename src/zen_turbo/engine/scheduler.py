"""Who works next. No tensors and no clock: requests in, plans out.

Waiting requests are admitted in order of arrival, as soon as their pages can be reserved. One that finds no memory lets later ones pass, but only
so many times; one that is better off waiting (its prefix is being computed by another) lets all pass.

Answers come first: every plan has one token for each of them. Beside them one prompt is read for a while: the one with least left to read, so that
a short question is not behind a long book, and every ``OLDEST_EVERY``-th time the one that was admitted first, so that no book waits for ever.
Whatever else arrives, the oldest prompt gets at least that share of the reading.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from typing import Generic, NamedTuple, Protocol, TypeVar

OLDEST_EVERY = 4
MOST_PASSED = 16  # how often later requests may go before one that waits for memory


class Schedulable(Protocol):
    @property
    def unread_tokens(self) -> int: ...


_R = TypeVar("_R", bound=Schedulable)


class Admission(enum.Enum):
    ADMITTED = enum.auto()
    NO_MEMORY = enum.auto()
    LATER = enum.auto()


class Plan(NamedTuple, Generic[_R]):
    """One unit of work: a token for each of ``decodes``, then ``prefill`` for a while."""

    decodes: tuple[_R, ...]
    prefill: _R | None


class Scheduler(Generic[_R]):
    """max_running: most requests that are read or answered at a time."""

    def __init__(self, *, max_running: int) -> None:
        self._max_running = max_running
        self._waiting: list[_R] = []
        self._prefilling: list[_R] = []  # in order of admission
        self._decoding: list[_R] = []
        self._blocked: _R | None = None  # the first that waits for memory
        self._passed = 0  # how many went before it
        self._turn = 0

    def __iter__(self) -> Iterator[_R]:
        """Every request, waiting ones first."""
        yield from [*self._waiting, *self._prefilling, *self._decoding]

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._prefilling) + len(self._decoding)

    @property
    def prefilling(self) -> tuple[_R, ...]:
        return tuple(self._prefilling)

    def add(self, request: _R) -> None:
        self._waiting.append(request)

    def remove(self, request: _R) -> None:
        """It ended, wherever it was."""
        for queue in (self._waiting, self._prefilling, self._decoding):
            if request in queue:
                queue.remove(request)

    def answer(self, request: _R) -> None:
        """Its prompt is read."""
        self._prefilling.remove(request)
        self._decoding.append(request)

    def plan(self, admit: Callable[[_R], Admission]) -> Plan[_R] | None:
        """The next unit of work; None where there is nothing to do. ``admit`` reserves what a waiting request needs, or says why not."""
        self._admit(admit)
        if not self.num_running:
            return None
        prefill = None
        if self._prefilling:
            self._turn = (self._turn + 1) % OLDEST_EVERY
            prefill = self._prefilling[0] if self._turn == 0 else min(self._prefilling, key=lambda request: request.unread_tokens)
        return Plan(tuple(self._decoding), prefill)

    def _admit(self, admit: Callable[[_R], Admission]) -> None:
        blocked: _R | None = None
        for request in list(self._waiting):
            if self.num_running >= self._max_running or (blocked is not None and self._passed >= MOST_PASSED):
                break
            outcome = admit(request)
            if outcome is Admission.ADMITTED:
                self._waiting.remove(request)
                self._prefilling.append(request)
                self._passed += blocked is not None
            elif outcome is Admission.NO_MEMORY and blocked is None:
                blocked = request
                if request is not self._blocked:
                    self._blocked, self._passed = request, 0
