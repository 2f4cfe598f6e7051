"""A file's pages laid over memory that is mapped already, so that they are read when they are needed and are memory of the page cache alone.

Python's mmap chooses its own address, hence libc's.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import sys
from collections.abc import Callable

_MAP_FIXED = 0x10  # Linux; Python does not name it


@functools.cache
def _libc_mmap() -> Callable[..., int | None]:
    function = ctypes.CDLL(None, use_errno=True).mmap
    function.restype = ctypes.c_void_p
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64)
    return function


def can_map(address: int, offset: int) -> bool:
    """Whether this place of a file can lie at this address."""
    return sys.platform == "linux" and address % mmap.PAGESIZE == 0 and offset % mmap.PAGESIZE == 0


def map_over(address: int, size: int, descriptor: int, offset: int) -> None:
    """Replace [address, address + size), which must be part of one mapping, by that many bytes of a file. What is written there later is this
    process's own and does not reach the file. Raises OSError, and leaves the memory as it was."""
    assert can_map(address, offset) and size % mmap.PAGESIZE == 0
    found = _libc_mmap()(address, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | _MAP_FIXED, descriptor, offset)
    if found != address:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
