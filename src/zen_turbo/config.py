"""Every knob of the engine, declared once.

``EngineConfig`` is frozen: its fields carry default, help text and validation, and the command line, the docs table and the JSON of every
benchmark are generated from them. An unknown key is an error. Nothing here depends on a model; ``resolve`` in ``engine`` combines it with one.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from zen_turbo.errors import ConfigurationError

ATTENTION_POLICIES = ("dense", "adaptive", "minference", "flexprefill", "xattention", "tri_shape")
DECODE_POLICIES = ("auto", "dense", "sparse", "snapkv")
KV_DTYPES = ("auto", "int8")
LINEAR_DTYPES = ("auto", "full", "int8", "int8-far")
PRESETS = ("turbo", "balanced", "faithful")
DTYPES = ("bfloat16", "float32")
CONTEXT_EXTENSIONS = ("dca", "none")
_POSITIVE = tuple("decode_pages store_bytes max_model_len kv_cache_bytes max_num_seqs num_threads dca_chunk_size dca_local_size".split())
PAGE_TOKENS = 64
# From here on a page has its full price (attention/policies/adaptive.py) and linear layers may be 8-bit (models/linear.py); a window of selection
# begins here.
FAR_TOKENS = 32768


def _knob(default: Any, help: str, *, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": help, "choices": choices})


def flag_of(name: str) -> str:
    """A knob on the command line."""
    return "--" + name.replace("_", "-")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Settings of one engine. Sizes ending in ``_bytes`` are bytes, ``_tokens`` are tokens; None means "decided from model and machine"."""

    attention: str = _knob(
        "adaptive",
        "Attention policy of the prefill: adaptive (sparse beyond dense_tokens, as much as the preset asks for); dense; or a published sparse "
        "method, for comparison: selection of these is in torch and slow.",
        choices=ATTENTION_POLICIES,
    )
    preset: str = _knob("balanced", "What adaptive attention aims at: speed, fidelity, or both.", choices=PRESETS)
    fidelity: float | None = _knob(
        None, "Share of estimated attention mass that adaptive attention keeps in every head, between 0 and 1. Default: steered by the preset."
    )
    dense_tokens: int = _knob(4096, "So many tokens at the beginning of a prompt are read densely by every policy.")
    decode_attention: str = _knob(
        "auto",
        "What each token of an answer reads: all pages (dense), the pages that matter to it (sparse), the pages that mattered to the prompt's end "
        "(snapkv), or auto: sparse after a sparse prefill.",
        choices=DECODE_POLICIES,
    )
    decode_pages: int = _knob(
        512,
        "Most pages, per layer and KV head, that a token of an answer reads with sparse decode, beside the recent ones; four times as many in "
        "heads that an adaptive prefill saw to need them.",
    )
    decode_dense_tokens: int = _knob(32768, "Contexts up to so many tokens are read whole by every token of an answer.")
    context_extension: str = _knob(
        "dca",
        "How positions beyond the trained window are reached: dca (Dual Chunk Attention, exact inside the window) or none.",
        choices=CONTEXT_EXTENSIONS,
    )
    max_model_len: int | None = _knob(
        None, "Longest prompt plus answer in tokens. Default: 1048576 with dca, else the trained window."
    )
    prefill_chunk_tokens: int = _knob(2048, "Prefill scheduling unit in tokens, on a fixed grid of absolute positions; a multiple of 64.")
    dtype: str = _knob("bfloat16", "Type of weights, activations and KV pages.", choices=DTYPES)
    kv_dtype: str = _knob("auto", "Type of the KV pages: auto (as dtype) or int8, half the memory of bfloat16.", choices=KV_DTYPES)
    linear_dtype: str = _knob(
        "auto",
        "Arithmetic of the layers' linear layers: full (as dtype), int8 (weights and activations; faster with AVX2 or AVX-512, slow without), "
        "int8-far (int8 for a prompt's tokens from 32,768 on, full for all others; half as much memory again for weights), or auto: where integers "
        "are faster, int8 for the preset turbo and int8-far for balanced; else full.",
        choices=LINEAR_DTYPES,
    )
    kv_cache_bytes: int | None = _knob(None, "Most memory the KV pages may take, in bytes. Default: 85 % of the memory free after loading.")
    store: str | None = _knob(
        None,
        "Folder in which computed pages are kept beyond the process, for any number of them; a request may then exceed memory. Default: none.",
    )
    store_bytes: int = _knob(32 << 30, "Most bytes that the store may take; what was used least recently is deleted first.")
    max_num_seqs: int = _knob(64, "Most requests that are read or answered at a time; others wait.")
    num_threads: int | None = _knob(None, "Compute threads. Default: the CPUs this process may use.")
    dca_chunk_size: int | None = _knob(None, "DCA chunk_size in tokens. Default: the checkpoint's own, else the trained window.")
    dca_local_size: int | None = _knob(None, "DCA local_size in tokens. Default: the checkpoint's own, else a quarter of chunk_size.")
    attention_temperature: bool = _knob(
        True, "Scale queries beyond the trained window by (0.1 ln s + 1)^2, a function of the query's own position (YaRN temperature)."
    )

    def __post_init__(self) -> None:
        for knob in dataclasses.fields(self):
            choices = knob.metadata["choices"]
            value = getattr(self, knob.name)
            if choices and value not in choices:
                raise ConfigurationError(f"{knob.name} must be one of {', '.join(choices)}, not {value!r}.", param=knob.name)
        if self.prefill_chunk_tokens <= 0 or self.prefill_chunk_tokens % PAGE_TOKENS:
            raise ConfigurationError(
                f"prefill_chunk_tokens must be a positive multiple of {PAGE_TOKENS}, not {self.prefill_chunk_tokens}.",
                param="prefill_chunk_tokens",
            )
        if self.fidelity is not None and not 0 < self.fidelity < 1:
            raise ConfigurationError(f"fidelity must lie between 0 and 1, not {self.fidelity}.", param="fidelity")
        if self.dense_tokens < 0:
            raise ConfigurationError(f"dense_tokens must not be negative, not {self.dense_tokens}.", param="dense_tokens")
        if self.decode_dense_tokens < 0:
            raise ConfigurationError(f"decode_dense_tokens must not be negative, not {self.decode_dense_tokens}.", param="decode_dense_tokens")
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigurationError(f"{name} must be positive, not {value}.", param=name)

    @property
    def decode_policy(self) -> str:
        """``decode_attention`` with auto resolved."""
        if self.decode_attention != "auto":
            return self.decode_attention
        return "dense" if self.attention == "dense" else "sparse"

    @property
    def needs_summaries(self) -> bool:
        """Whether a mean key and mean value is kept with every page."""
        return self.attention != "dense" or self.decode_policy != "dense"

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> EngineConfig:
        """Build from plain values; raises ConfigurationError naming any unknown key."""
        known = {knob.name for knob in dataclasses.fields(cls)}
        for name in values:
            if name not in known:
                raise ConfigurationError(f"Unknown setting {name!r}. Known: {', '.join(sorted(known))}.", param=name)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
