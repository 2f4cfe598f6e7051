"""Token ids of long texts that were encoded before, piece by piece: the next question about a document encodes the question, not the document."""

from __future__ import annotations

import threading
from array import array
from collections import OrderedDict

MOST_CHARACTERS = 16 << 20  # four texts of a million tokens; with their ids at most about 100 MiB


class KeptSegments:
    """Text -> token ids, the least recently used forgotten first when all texts together have more than ``most_characters``. For any thread."""

    def __init__(self, most_characters: int = MOST_CHARACTERS) -> None:
        self._most_characters = most_characters
        self._characters = 0
        self._ids: OrderedDict[str, array[int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, text: str) -> array[int] | None:
        with self._lock:
            ids = self._ids.get(text)
            if ids is not None:
                self._ids.move_to_end(text)
            return ids

    def put(self, text: str, ids: array[int]) -> None:
        with self._lock:
            if text not in self._ids:
                self._characters += len(text)
            self._ids[text] = ids
            self._ids.move_to_end(text)
            while self._characters > self._most_characters:
                self._characters -= len(self._ids.popitem(last=False)[0])

    @property
    def characters(self) -> int:
        """Of all texts that are kept."""
        return self._characters
