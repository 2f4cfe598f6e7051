"""API keys: where they come from, and whose a request is. A key is kept as its SHA-256 and shown as a short label, nowhere else and no other way."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Mapping
from pathlib import Path

from zen_turbo.errors import ConfigurationError

KEY_ENVIRONMENT = "ZEN_TURBO_API_KEY"
_MOST_KEY_FILE_BYTES = 1 << 20


class KeyRing:
    """Immutable. Empty means that no key is asked for."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        """Raises ConfigurationError for a key that cannot stand in a header; the message does not show it."""
        known: dict[bytes, str] = {}
        for key in keys:
            if not key or not all("!" <= character <= "~" for character in key):
                raise ConfigurationError("An API key must be printable ASCII without spaces, and not empty.", param="api_key")
            content = key.encode()
            known[hashlib.sha256(content).digest()] = hashlib.sha256(b"zen-turbo key label " + content).hexdigest()[:8]
        self._known = tuple(known.items())

    def __len__(self) -> int:
        return len(self._known)

    def __repr__(self) -> str:
        return f"KeyRing({', '.join(self.labels)})"

    @property
    def labels(self) -> tuple[str, ...]:
        """What logs call the keys, in order."""
        return tuple(label for _, label in self._known)

    def label_of(self, presented: bytes) -> str | None:
        """The label of the key, or None. Takes as long for any key, right or wrong: digests are compared in constant time, and all of them."""
        digest = hashlib.sha256(presented).digest()
        found = None
        for known, label in self._known:
            if hmac.compare_digest(digest, known):
                found = label
        return found


def collect_keys(given: Iterable[str], file: Path | None, environment: Mapping[str, str]) -> KeyRing:
    """Keys of the command line, of a file (one per line; empty lines and lines that begin with # do not count) and of ZEN_TURBO_API_KEY, together.
    Raises ConfigurationError."""
    keys = list(given)
    if file is not None:
        try:
            with file.open("rb") as stream:
                content = stream.read(_MOST_KEY_FILE_BYTES + 1)
        except OSError as error:
            raise ConfigurationError(f"The key file {file} cannot be read: {error.strerror}.", param="api_key_file") from error
        if len(content) > _MOST_KEY_FILE_BYTES:
            raise ConfigurationError(f"The key file {file} has more than {_MOST_KEY_FILE_BYTES} bytes.", param="api_key_file")
        lines = [line.strip() for line in content.decode("utf-8", "replace").splitlines()]
        found = [line for line in lines if line and not line.startswith("#")]
        if not found:  # an empty file must not open the door
            raise ConfigurationError(f"The key file {file} holds no key.", param="api_key_file")
        keys += found
    if KEY_ENVIRONMENT in environment:
        keys.append(environment[KEY_ENVIRONMENT])
    return KeyRing(keys)
