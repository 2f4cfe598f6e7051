"""What goes into the engine and what comes out: sampling parameters, the events of a request, and its final output."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

from zen_turbo.errors import InvalidRequestError


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen; vLLM's names. ``temperature`` 0 is greedy. ``top_k`` 0 means no limit. ``max_tokens`` None means as many as fit
    into max_model_len. Raises InvalidRequestError (with ``param``) for a value out of range."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 256
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _check(math.isfinite(self.temperature) and 0 <= self.temperature <= 10, "temperature", "between 0 and 10", self.temperature)
        _check(0 < self.top_p <= 1, "top_p", "in (0, 1]", self.top_p)
        _check(self.top_k >= 0, "top_k", "0 (no limit) or positive", self.top_k)
        _check(0 <= self.min_p <= 1, "min_p", "between 0 and 1", self.min_p)
        _check(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", "at least 1", self.max_tokens)
        _check(all(self.stop), "stop", "non-empty strings", self.stop)
        _check(self.seed is None or -(2**63) <= self.seed < 2**63, "seed", "a 64-bit integer", self.seed)


def _check(ok: bool, param: str, wanted: str, value: object) -> None:
    if not ok:
        raise InvalidRequestError(f"{param} must be {wanted}, not {value!r}.", param=param)


class PrefillProgress(NamedTuple):
    """Sent after each prefill chunk, and once with processed = cached before the first. Counts are prompt tokens."""

    total_tokens: int
    cached_tokens: int
    processed_tokens: int
    elapsed_s: float


class TokenDelta(NamedTuple):
    """New answer text. ``text`` may be empty while a character or a possible stop string is incomplete; token_ids are the tokens sampled."""

    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class RequestMetrics:
    """Seconds of one request. attend_s and linear_s are the prefill's share of wall time in the attention kernel and the linear layers; density
    and recall are the prefill's, decode_recall is what the answer's tokens kept where it was sampled."""

    queue_s: float = 0.0
    ttft_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    attend_s: float = 0.0
    linear_s: float = 0.0
    select_s: float = 0.0
    density: float = 1.0
    recall: float | None = None
    recall_p5: float | None = None
    decode_recall: float | None = None


@dataclass(frozen=True, kw_only=True)
class RequestOutput:
    """The finished answer. ``finish_reason`` is "stop", "length" or "abort"."""

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    cached_tokens: int
    finish_reason: str
    metrics: RequestMetrics = field(default_factory=RequestMetrics)


class Finished(NamedTuple):
    output: RequestOutput


class Failed(NamedTuple):
    error: Exception


Event = PrefillProgress | TokenDelta | Finished | Failed
