"""The native library: found, loaded, its structs, and the instruction set that it runs with.

It has a C ABI (``csrc/kernels.h``), so it is loaded with ctypes, which releases the GIL during a call. Torch is imported first so that both share one
OpenMP runtime and its threads.

ISA: chosen by CPUID when the library loads, best first (amx, avx512_bf16, avx512, avx2, scalar); the environment variable ``ZEN_TURBO_ISA``
forces one and fails if the CPU lacks it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.metadata
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch  # noqa: F401

from zen_turbo.errors import KernelError

ISAS = ("amx", "avx512_bf16", "avx512", "avx2", "scalar")
ISA_ENVIRONMENT = "ZEN_TURBO_ISA"
_ABI_VERSION = 11
NUM_VARIANTS = 3  # of a query: same span, previous span, older (Dual Chunk Attention)

_pointer = ctypes.c_void_p
_int64 = ctypes.c_int64
_int32 = ctypes.c_int32
_float = ctypes.c_float
Args = ctypes.Structure  # of any function
_Args = TypeVar("_Args", bound=Args)


class PageViewArgs(ctypes.Structure):
    _fields_ = (
        ("pages", _pointer),
        ("slot_stride", _int64),
        ("head_stride", _int64),
        ("page_table", _pointer),
        ("num_pages", _int64),
        ("open", _pointer),
        ("open_head_stride", _int64),
        ("open_page", _int64),
        ("dtype", _int32),
    )


class AttendArgs(ctypes.Structure):
    _fields_ = (
        ("q", _pointer * NUM_VARIANTS),
        ("q_row_stride", _int64),
        ("q_head_stride", _int64),
        ("out", _pointer),
        ("out_row_stride", _int64),
        ("out_head_stride", _int64),
        ("lse", _pointer),
        ("logit_factor", _pointer),
        ("kv", PageViewArgs),
        ("list_offsets", _pointer),
        ("list_entries", _pointer),
        ("heads_per_list", _int64),
        ("num_rows", _int64),
        ("first_position", _int64),
        ("window", _int64),
        ("q_heads", _int32),
        ("kv_heads", _int32),
        ("head_dim", _int32),
        ("dtype", _int32),
        ("scale", _float),
        ("num_threads", _int32),
    )


class StoreArgs(ctypes.Structure):
    _fields_ = (
        ("qkv", _pointer),
        ("qkv_row_stride", _int64),
        ("q_out", _pointer * NUM_VARIANTS),
        ("q_row_stride", _int64),
        ("q_head_stride", _int64),
        ("cos", _pointer * NUM_VARIANTS),
        ("sin", _pointer * NUM_VARIANTS),
        ("angle_row_stride", _int64 * NUM_VARIANTS),
        ("q_norm", _pointer),
        ("k_norm", _pointer),
        ("norm_eps", _float),
        ("kv", PageViewArgs),
        ("summaries", _pointer),
        ("summary_slot_stride", _int64),
        ("num_rows", _int64),
        ("first_position", _int64),
        ("q_heads", _int32),
        ("kv_heads", _int32),
        ("head_dim", _int32),
        ("dtype", _int32),
        ("num_threads", _int32),
    )


class SelectArgs(ctypes.Structure):
    _fields_ = (
        ("q", _pointer * NUM_VARIANTS),
        ("q_row_stride", _int64),
        ("q_head_stride", _int64),
        ("logit_factor", _pointer),
        ("summaries", _pointer),
        ("summary_slot_stride", _int64),
        ("page_table", _pointer),
        ("mass", _pointer),
        ("bits", _pointer),
        ("counts", _pointer),
        ("energies", _pointer),
        ("num_rows", _int64),
        ("first_position", _int64),
        ("span_pages", _int64),
        ("sink_pages", _int64),
        ("local_pages", _int64),
        ("most_pages", _int64),
        ("bound_pages", _int64),
        ("sample_rows", _int64),
        ("packed", _pointer * 2),
        ("packed_tiles", _int64 * 2),
        ("valid_pages", _pointer),
        ("q_heads", _int32),
        ("kv_heads", _int32),
        ("head_dim", _int32),
        ("dtype", _int32),
        ("scale", _float),
        ("per_kv_head", _int32),
        ("codes", _int32),
        ("num_threads", _int32),
    )


class LinearArgs(ctypes.Structure):
    _fields_ = (
        ("x", _pointer),
        ("weights", _pointer),
        ("weight_scales", _pointer),
        ("bias", _pointer),
        ("out", _pointer),
        ("rows", _int64),
        ("inputs", _int64),
        ("outputs", _int64),
        ("groups", _int64),
        ("dtype", _int32),
        ("out_dtype", _int32),
        ("fine", _int32),
        ("rotate", _int32),
        ("num_threads", _int32),
    )


class ListArgs(ctypes.Structure):
    _fields_ = (
        ("bits", _pointer),
        ("offsets", _pointer),
        ("entries", _pointer),
        ("num_lists", _int64),
        ("num_blocks", _int64),
        ("first_block", _int64),
        ("words", _int64),
        ("span_pages", _int64),
    )


class NormArgs(ctypes.Structure):
    _fields_ = (
        ("residual", _pointer),
        ("delta", _pointer),
        ("weight", _pointer),
        ("out", _pointer),
        ("rows", _int64),
        ("width", _int64),
        ("eps", _float),
        ("dtype", _int32),
        ("num_threads", _int32),
    )


class SiluArgs(ctypes.Structure):
    _fields_ = (
        ("gate_up", _pointer),
        ("out", _pointer),
        ("rows", _int64),
        ("width", _int64),
        ("dtype", _int32),
        ("num_threads", _int32),
    )


class TokenLayerArgs(ctypes.Structure):
    _fields_ = (
        ("store", StoreArgs),
        ("select", SelectArgs),
        ("attend", AttendArgs),
        ("rotate", _int32),
        ("offsets", _pointer),
        ("entries", _pointer),
        ("most_entries", _int64),
        ("chosen_page", _int64),
    )


class TokenRowArgs(ctypes.Structure):
    _fields_ = (
        ("layers", _pointer),
        ("position", _int64),
        ("cos", _pointer * NUM_VARIANTS),
        ("sin", _pointer * NUM_VARIANTS),
        ("logit_factor", _pointer),
        ("dense_offsets", _pointer),
        ("dense_entries", _pointer),
        ("select_every", _int64),
        ("sampled_layer", _int64),
        ("lse_kept", _pointer),
        ("lse_full", _pointer),
        ("full_out", _pointer),
    )


class LayerArgs(ctypes.Structure):
    _fields_ = (
        ("input_norm", NormArgs),
        ("qkv", LinearArgs),
        ("out", LinearArgs),
        ("post_norm", NormArgs),
        ("gate_up", LinearArgs),
        ("silu", SiluArgs),
        ("down", LinearArgs),
    )


class TokensArgs(ctypes.Structure):
    _fields_ = (
        ("layers", _pointer),
        ("first_layer", _int64),
        ("num_layers", _int64),
        ("rows", _pointer),
        ("num_rows", _int64),
        ("qkv", _pointer),
        ("attended", _pointer),
        ("qkv_row_bytes", _int64),
        ("attended_row_bytes", _int64),
    )


def _library_path() -> Path:
    name = "zen_turbo/_native/libzen_turbo_kernels.so"
    candidates = []
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        candidates.append(Path(str(importlib.metadata.distribution("zen-turbo").locate_file(name))))
    candidates.append(Path(__file__).resolve().parent.parent / name)
    for path in candidates:
        if path.exists():
            return path
    raise KernelError("The native kernels are not built; run ./scripts/setup. Looked for: " + ", ".join(map(str, candidates)) + ".")


@functools.cache
def _library() -> ctypes.CDLL:
    path = _library_path()
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelError(f"The native library {path} cannot be loaded: {error}.") from error
    found = library.zt_abi_version()
    if found != _ABI_VERSION:
        raise KernelError(f"The native library has ABI version {found}, this code needs {_ABI_VERSION}; run ./scripts/setup.")
    library.zt_select.argtypes = library.zt_supports.argtypes = [ctypes.c_char_p]
    library.zt_selected.restype = library.zt_feature_name.restype = ctypes.c_char_p
    library.zt_cpu_features.restype = ctypes.c_uint64
    for name in ("zt_attend", "zt_decode", "zt_store", "zt_norm", "zt_silu", "zt_select_pages", "zt_list_pages", "zt_linear", "zt_tokens"):
        getattr(library, name).argtypes = [ctypes.c_void_p]
    forced = os.environ.get(ISA_ENVIRONMENT)
    if forced:
        _select(library, forced, f"{ISA_ENVIRONMENT}={forced}")
    return library


def _select(library: ctypes.CDLL, name: str, asked: str) -> None:
    status = library.zt_select(name.encode())
    if status == -1:
        raise KernelError(f"{asked}: no such instruction set. Known: {', '.join(ISAS)}.")
    if status == -2:
        raise KernelError(f"{asked}: this CPU or operating system does not support it. Available: {', '.join(available_isas(library))}.")


def available_isas(library: ctypes.CDLL | None = None) -> list[str]:
    """The instruction sets this CPU can run, best first."""
    library = library or _library()
    return [name for name in ISAS if library.zt_supports(name.encode()) == 1]


def selected_isa() -> str:
    return _library().zt_selected().decode()


@contextlib.contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Run the body with the kernels of one instruction set; for tests. Raises KernelError if it cannot. Not thread-safe."""
    before = selected_isa()
    _select(_library(), name, f"use_isa({name!r})")
    try:
        yield
    finally:
        _select(_library(), before, f"use_isa({before!r})")


def describe() -> dict[str, Any]:
    """What was found and chosen, for ``doctor`` and benchmark records: isa, available, features, reason, library."""
    library = _library()
    bits = library.zt_cpu_features()
    features = []
    position = 0
    while name := library.zt_feature_name(position):
        if bits >> position & 1:
            features.append(name.decode())
        position += 1
    available, isa = available_isas(), selected_isa()
    if os.environ.get(ISA_ENVIRONMENT):
        reason = f"forced by {ISA_ENVIRONMENT}"
    elif isa == available[0]:
        reason = "the best that this CPU and operating system support"
    else:
        reason = f"faster than {available[0]} on this vendor's CPUs"
    return {"isa": isa, "available": available, "features": features, "reason": reason, "library": str(_library_path())}


@functools.cache
def usable_cpus() -> int:
    """CPUs this process may run on, from its affinity mask."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pointers(values: Iterable[int | None], count: int = NUM_VARIANTS) -> ctypes.Array[ctypes.c_void_p]:
    """An array of so many addresses, as a struct holds it; null where there are fewer values."""
    return (_pointer * count)(*values)


def int64s(values: Iterable[int], count: int = NUM_VARIANTS) -> ctypes.Array[ctypes.c_int64]:
    """The same of numbers, 0 where there are fewer."""
    return (_int64 * count)(*values)


def array_of(kind: type[_Args], count: int) -> ctypes.Array[_Args]:
    """So many structs in a row, zeros."""
    return (kind * count)()


def address(of: Args | ctypes.Array[Any]) -> int:
    """Where it lies; whoever keeps the number keeps the object too."""
    return ctypes.addressof(of)


def call(name: str, args: Args) -> None:
    """Call a function of the library. Raises ValueError for what it refuses, MemoryError."""
    status = getattr(_library(), name)(ctypes.addressof(args))
    if status == 2:
        raise MemoryError(f"{name}: no memory for its scratch space.")
    if status:
        raise ValueError(f"{name}: argument out of range (status {status}).")
