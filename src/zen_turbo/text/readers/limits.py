"""How much one file may cost to read: the limits, and the account that readers keep of them."""

from __future__ import annotations

from dataclasses import dataclass

from zen_turbo.errors import DocumentTooLargeError


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Of one file, whatever it contains.

    text_characters    a million tokens are 4 to 6 million characters of prose, and 20 million of the most repetitive tables
    unpacked_bytes     what the members of an archive may be once unpacked; the largest books with pictures stay below
    ratio              unpacked over packed size of one member of a mebibyte or more; text reaches 20, office XML 100, a bomb 1,000
    members            entries of an archive: more than most source trees have
    memory_bytes       address space of the process that reads
    cpu_s, wall_s      a PDF takes some 50 ms a page, and the longest that fit into a context have 2,500 pages; the wall clock allows for a
                       machine that is busy with a prompt, and ends before clients do (600 s)
    """

    text_characters: int = 32 << 20
    unpacked_bytes: int = 512 << 20
    ratio: int = 200
    members: int = 50_000
    memory_bytes: int = 2 << 30
    cpu_s: int = 240
    wall_s: float = 300.0


# Below this size a member may have any ratio: a short run of spaces is no bomb.
_RATIO_FROM_BYTES = 1 << 20


class Budget:
    """What the reading of one file has used of its limits. ``label`` names the file in errors."""

    def __init__(self, limits: Limits, label: str) -> None:
        self.limits = limits
        self.label = label
        self._characters = 0
        self._unpacked = 0

    def take_text(self, num_characters: int) -> None:
        """Account for text that was read. Raises DocumentTooLargeError."""
        self._characters += num_characters
        check_characters(self._characters, self.limits.text_characters, self.label)

    def take_member(self, name: str, packed_bytes: int, unpacked_bytes: int) -> None:
        """Account for a member of an archive, from what its header claims and before it is unpacked. Raises DocumentTooLargeError."""
        limit = self.limits.ratio
        ratio = unpacked_bytes // max(packed_bytes, 1)
        if unpacked_bytes >= _RATIO_FROM_BYTES and ratio > limit:
            raise DocumentTooLargeError(
                f"{self.label}: {name} unpacks to {ratio} times its size; at most {limit} times is read.", ratio=ratio, max_ratio=limit
            )
        self._unpacked += unpacked_bytes
        if self._unpacked > self.limits.unpacked_bytes:
            raise DocumentTooLargeError(
                f"{self.label} unpacks to {self._unpacked} bytes or more; at most {self.limits.unpacked_bytes} are read.",
                unpacked_bytes=self._unpacked,
                max_unpacked_bytes=self.limits.unpacked_bytes,
            )

    def take_members(self, count: int) -> None:
        """Raises DocumentTooLargeError if an archive has more entries than are looked at."""
        if count > self.limits.members:
            raise DocumentTooLargeError(
                f"{self.label} has {count} entries; at most {self.limits.members} are read.", members=count, max_members=self.limits.members
            )


def check_characters(count: int, limit: int, label: str) -> None:
    """Raises DocumentTooLargeError if a text is longer than any context could use."""
    if count > limit:
        raise DocumentTooLargeError(
            f"{label} has {count} characters of text or more; at most {limit} are read.", characters=count, max_characters=limit
        )
