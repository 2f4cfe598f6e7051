"""Reading GGUF: a strict, bounded parser of the header, and lazy dequantisation.

The file is not trusted: counts and lengths are checked against what the file could hold before anything is allocated, and every fault is a
CorruptFileError that says where. Only the tables of quantised types and their dequantisation come from the ``gguf`` package.

Format (GGUF 2 and 3, little-endian): magic, version, number of tensors, number of metadata values; the values; the tensor table (name, shape
with the fastest dimension first, type, offset); padding; tensor data.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch

from zen_turbo.errors import CorruptFileError, UnsupportedModelError

_MAGIC = b"GGUF"
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4
_MAX_TENSORS = 1 << 20
_ALIGNMENT = 32
_SLICE_BYTES = 1 << 24  # of fp32 produced at a time, so that dequantising never doubles the peak


class GgufTensor(NamedTuple):
    """shape in torch order; data at [offset, offset + num_bytes) of the file."""

    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    offset: int
    num_bytes: int


class GgufFile:
    """metadata: plain Python values by key; tensors: GgufTensor by GGUF name. The file stays mapped until ``close``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            try:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except ValueError as error:
                raise CorruptFileError(f"{path}: the file is empty.") from error
        try:
            self.metadata, self.tensors, self.header_bytes = _Parser(self._map, path).parse()
        except BaseException:
            self._map.close()
            raise

    def close(self) -> None:
        self._map.close()

    def tensor(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Dequantise one tensor into a new contiguous tensor of ``dtype``, a slice of rows at a time."""
        info = self.tensors[name]
        out = torch.empty(info.shape, dtype=dtype)
        rows = out.view(-1, info.shape[-1]) if len(info.shape) > 1 else out.view(1, -1)
        block, block_bytes = gguf.GGML_QUANT_SIZES[info.kind]
        row_bytes = rows.shape[1] // block * block_bytes
        step = max(1, _SLICE_BYTES // (4 * rows.shape[1]))
        for start in range(0, rows.shape[0], step):
            end = min(start + step, rows.shape[0])
            raw = np.frombuffer(self._map, np.uint8, (end - start) * row_bytes, info.offset + start * row_bytes)
            try:
                values = gguf.dequantize(raw.reshape(end - start, row_bytes), info.kind)
            except NotImplementedError as error:
                raise UnsupportedModelError(f"{self.path}: tensor {name} has type {info.kind.name}, which cannot be dequantised.") from error
            rows[start:end] = torch.from_numpy(np.array(values, dtype=np.float32).reshape(end - start, -1))
        return out

    def sample(self) -> Iterator[bytes]:
        """The header, then the first and last 4 KiB of every tensor's data: what a fingerprint is made of."""
        yield self._map[: self.header_bytes]
        for name in sorted(self.tensors):
            info = self.tensors[name]
            piece = min(4096, info.num_bytes)
            yield self._map[info.offset : info.offset + piece]
            yield self._map[info.offset + info.num_bytes - piece : info.offset + info.num_bytes]


class _Parser:
    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.size, self.at = data, path, len(data), 0

    def fail(self, what: str) -> CorruptFileError:
        return CorruptFileError(f"{self.path}: {what} (at byte {self.at} of {self.size}).")

    def parse(self) -> tuple[dict[str, Any], dict[str, GgufTensor], int]:
        if self.size < 24 or self.data[:4] != _MAGIC:
            raise self.fail("not a GGUF file: wrong magic or too short")
        self.at = 4
        version = self.scalar("<I")
        if version not in (2, 3):
            raise self.fail(f"GGUF version {version} is not supported (2 and 3 are)")
        num_tensors, num_values = self.scalar("<Q"), self.scalar("<Q")
        # The least a tensor entry can take is 24 bytes, a metadata value 13.
        if num_tensors > min(_MAX_TENSORS, self.size // 24) or num_values > self.size // 13:
            raise self.fail(f"the header claims {num_tensors} tensors and {num_values} metadata values, more than the file can hold")
        metadata: dict[str, Any] = {}
        for _ in range(num_values):
            key = self.string()
            if key in metadata:
                raise self.fail(f"metadata key {key!r} occurs twice")
            metadata[key] = self.value(self.scalar("<I"))
        tensors = self.table(num_tensors)
        header_bytes = self.at
        alignment = metadata.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1) or alignment > 1 << 20:
            raise self.fail(f"general.alignment {alignment!r} is not a small power of two")
        start = -(-self.at // alignment) * alignment
        placed = {}
        for name, info in tensors.items():
            offset = start + info.offset
            if info.offset % alignment or offset + info.num_bytes > self.size:
                raise CorruptFileError(
                    f"{self.path}: tensor {name} lies at bytes {offset} to {offset + info.num_bytes}, the file has {self.size}: "
                    "truncated or damaged."
                )
            placed[name] = info._replace(offset=offset)
        return metadata, placed, header_bytes

    def table(self, num_tensors: int) -> dict[str, GgufTensor]:
        tensors: dict[str, GgufTensor] = {}
        for _ in range(num_tensors):
            name = self.string()
            if name in tensors:
                raise self.fail(f"tensor {name!r} occurs twice")
            num_dimensions = self.scalar("<I")
            if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
                raise self.fail(f"tensor {name!r} has {num_dimensions} dimensions")
            shape = tuple(reversed([self.scalar("<Q") for _ in range(num_dimensions)]))
            code = self.scalar("<I")
            offset = self.scalar("<Q")
            try:
                kind = gguf.GGMLQuantizationType(code)
                block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
            except (ValueError, KeyError) as error:
                raise self.fail(f"tensor {name!r} has unknown type {code}") from error
            count = math.prod(shape)
            if not 0 < count <= self.size * 256 or shape[-1] % block:
                raise self.fail(f"tensor {name!r} has impossible shape {shape} for type {kind.name}")
            tensors[name] = GgufTensor(shape, kind, offset, count // block * block_bytes)
        return tensors

    def scalar(self, form: str) -> Any:
        size = struct.calcsize(form)
        if self.at + size > self.size:
            raise self.fail("the header is truncated")
        (value,) = struct.unpack_from(form, self.data, self.at)
        self.at += size
        return value

    def string(self) -> str:
        length = self.scalar("<Q")
        if length > self.size - self.at:
            raise self.fail(f"a string of {length} bytes does not fit")
        raw = self.data[self.at : self.at + length]
        self.at += length
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail("a string is not UTF-8") from error

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY or depth > 2:
            raise self.fail(f"unknown metadata type {kind}")
        inner, count = self.scalar("<I"), self.scalar("<Q")
        least = struct.calcsize(_SCALARS[inner]) if inner in _SCALARS else 8
        if count > (self.size - self.at) // least:
            raise self.fail(f"an array of {count} values does not fit")
        if inner in _SCALARS:
            form = f"<{count}{_SCALARS[inner][1]}"
            values = list(struct.unpack_from(form, self.data, self.at))
            self.at += struct.calcsize(form)
            return values
        return [self.value(inner, depth + 1) for _ in range(count)]
