"""Stop strings in streamed text: emit nothing that may still turn out to be the beginning of one."""

from __future__ import annotations


class StopMatcher:
    """Feeds on text in any portions and gives back what is safe to show. The earliest stop string wins; it is shown only with ``include``."""

    def __init__(self, stops: tuple[str, ...], *, include: bool = False) -> None:
        self._stops = stops
        self._include = include
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Add text -> (text to show now, whether a stop string was found). After a stop nothing may be pushed."""
        self._held += text
        found = [(at, at + len(stop)) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            start, end = min(found)
            shown, self._held = self._held[: end if self._include else start], ""
            return shown, True
        keep = self._may_begin_stop()
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown, False

    def flush(self) -> str:
        """The text still held back; call it when generation ended without a stop string."""
        shown, self._held = self._held, ""
        return shown

    def _may_begin_stop(self) -> int:
        """Length of the longest suffix of the held text that is a proper beginning of a stop string."""
        longest = max((len(stop) for stop in self._stops), default=0) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            suffix = self._held[-length:]
            if any(len(stop) > length and stop.startswith(suffix) for stop in self._stops):
                return length
        return 0
