"""Rows of a long evaluation, one JSON line each, written as they finish: a run that was interrupted goes on where it was.

The first line is the key: everything that could change an answer (model fingerprint, resolved engine settings, generator version). A
journal with another key is an error that names the differences, never a silent mix. What identifies a row (length, depth, seed) is not in
the key, so a grid may grow. One process at a time owns a journal. A last line that was cut off by a crash is dropped.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from zen_turbo.errors import ConfigurationError, CorruptFileError

Row = dict[str, Any]


class Journal:
    """``path`` None keeps rows in memory only. ``fields`` are the columns that identify a row.

    Raises ConfigurationError for another key, another owner or a file that cannot be written; CorruptFileError for lines that are not ours.
    """

    def __init__(self, path: Path | None, key: Mapping[str, Any], fields: Sequence[str], *, commit: str | None = None) -> None:
        self._fields = tuple(fields)
        self._commit = commit
        self._rows: dict[tuple[Any, ...], Row] = {}
        self.commits: set[str | None] = set()  # of the rows that were found
        self._file = None
        if path is None:
            return
        try:
            self._file = path.open("a+b")
        except OSError as error:
            raise ConfigurationError(f"The journal {path} cannot be written: {error.strerror}.", param="resume") from error
        try:
            self._open(path, json.loads(json.dumps(key)))
        except BaseException:
            self._file.close()
            raise

    @property
    def num_rows(self) -> int:
        return len(self._rows)

    def get(self, identity: tuple[Any, ...]) -> Row | None:
        return self._rows.get(identity)

    def add(self, row: Row) -> None:
        """Store a finished row; it is on disk when this returns."""
        self._rows[self._identity(row)] = row
        self._write({"row": row, "commit": self._commit})

    def adopt(self, rows: Iterable[Row], commit: str | None) -> None:
        """Take over rows that were finished elsewhere, at ``commit``, but for those that are here already."""
        for row in rows:
            if self._identity(row) not in self._rows:
                self._rows[self._identity(row)] = row
                self._write({"row": row, "commit": commit})
                self.commits.add(commit)

    def _open(self, path: Path, key: dict[str, Any]) -> None:
        assert self._file is not None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigurationError(f"Another process is using the journal {path}.", param="resume") from error
        self._file.seek(0)
        data = self._file.read()
        complete = data[: data.rfind(b"\n") + 1]
        if len(complete) < len(data):
            self._file.truncate(len(complete))
        try:
            entries = [json.loads(line) for line in complete.splitlines()]
            found = entries[0]["key"] if entries else None
            for entry in entries[1:]:
                self._rows[self._identity(entry["row"])] = entry["row"]
                self.commits.add(entry["commit"])
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptFileError(f"{path} is not a journal of this evaluation.") from error
        if found is None:
            self._write({"key": key})
        elif found != key:
            names = sorted(name for name in {*found, *key} if found.get(name) != key.get(name))
            differences = "; ".join(f"{name}: {found.get(name)!r} there, {key.get(name)!r} now" for name in names)
            raise ConfigurationError(f"The journal {path} belongs to other settings ({differences}).", param="resume")

    def _identity(self, row: Row) -> tuple[Any, ...]:
        return tuple(row[name] for name in self._fields)

    def _write(self, entry: Mapping[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
