"""What goes into the engine and what comes out: sampling parameters, the events of a request, and its final output."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from zen_turbo.errors import InvalidRequestError, UnsupportedParameterError

MAX_LOGPROBS = 20
# Each token's text is compared with every beginning of every stop string, and each token with every stop token.
MAX_STOPS, MAX_STOP_CHARACTERS, MAX_STOP_TOKENS = 64, 256, 1024
# (prompt tokens) x (1 + alternatives): half a million positions with one alternative each, some 16 MB here and 60 MB as JSON.
MAX_PROMPT_LOGPROBS = 1 << 20


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen; vLLM's names. ``temperature`` 0 is greedy. ``top_k`` 0 means no limit. ``max_tokens`` None means as many as fit
    into max_model_len; 0 reads the prompt and answers nothing. Raises InvalidRequestError (with ``param``) for a value out of range.

    ``presence_penalty`` and ``frequency_penalty`` are subtracted for tokens of the answer, ``repetition_penalty`` divides for those of prompt
    and answer. ``logit_bias``: token id -> what is added to its logit. Until ``min_tokens`` are there no end token is drawn and no stop string
    is looked for. ``logprobs``: so many likeliest alternatives with each token of the answer, of the model's own distribution (before
    temperature, penalties, bias and grammar); ``prompt_logprobs`` the same for the prompt, which is then computed from its beginning.
    ``grammar``: what the answer must follow, see ``engine.guidance``.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 256
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    grammar: str | None = None

    def __post_init__(self) -> None:
        _check(math.isfinite(self.temperature) and 0 <= self.temperature <= 10, "temperature", "between 0 and 10", self.temperature)
        _check(0 < self.top_p <= 1, "top_p", "in (0, 1]", self.top_p)
        _check(self.top_k >= 0, "top_k", "0 (no limit) or positive", self.top_k)
        _check(0 <= self.min_p <= 1, "min_p", "between 0 and 1", self.min_p)
        _check(self.max_tokens is None or self.max_tokens >= 0, "max_tokens", "0 (only read the prompt) or positive", self.max_tokens)
        _check(len(self.stop) <= MAX_STOPS, "stop", f"at most {MAX_STOPS} strings", len(self.stop))
        for stop in self.stop:
            _check(0 < len(stop) <= MAX_STOP_CHARACTERS, "stop", f"strings of 1 to {MAX_STOP_CHARACTERS} characters", len(stop))
        _check(len(self.stop_token_ids) <= MAX_STOP_TOKENS, "stop_token_ids", f"at most {MAX_STOP_TOKENS} tokens", len(self.stop_token_ids))
        _check(self.seed is None or -(2**63) <= self.seed < 2**63, "seed", "a 64-bit integer", self.seed)
        for name in ("presence_penalty", "frequency_penalty"):
            _check(-2 <= getattr(self, name) <= 2, name, "between -2 and 2", getattr(self, name))
        # Logits are divided by it: a smaller one makes them infinite sooner or later.
        _check(0.01 <= self.repetition_penalty <= 10, "repetition_penalty", "between 0.01 and 10", self.repetition_penalty)
        for token, bias in self.logit_bias.items():
            _check(token >= 0 and -100 <= bias <= 100, "logit_bias", "token ids with values between -100 and 100", {token: bias})
        longest = math.inf if self.max_tokens is None else self.max_tokens
        _check(0 <= self.min_tokens <= longest, "min_tokens", f"between 0 and max_tokens ({self.max_tokens})", self.min_tokens)
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            _check(value is None or 0 <= value <= MAX_LOGPROBS, name, f"between 0 and {MAX_LOGPROBS}", value)
        if self.grammar is not None and self.min_tokens:
            raise UnsupportedParameterError("min_tokens does not go with structured output, which decides itself where it ends.", param="min_tokens")


def _check(ok: bool, param: str, wanted: str, value: object) -> None:
    if not ok:
        raise InvalidRequestError(f"{param} must be {wanted}, not {value!r}.", param=param)


class PrefillProgress(NamedTuple):
    """Sent after each prefill chunk, and once with processed = cached before the first. Counts are prompt tokens."""

    total_tokens: int
    cached_tokens: int
    processed_tokens: int
    elapsed_s: float


class TokenLogprobs(NamedTuple):
    """One position: the token that stands there, the natural logarithm of its probability, and the likeliest tokens with theirs, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class TokenDelta(NamedTuple):
    """New answer text. ``text`` may be empty while a character or a possible stop string is incomplete; token_ids are the tokens sampled, and
    logprobs belong to them (empty if not asked for)."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()


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
    """The finished answer. ``finish_reason`` is "stop", "length" or "abort". ``prompt_logprobs``: of every prompt token but the first, which
    nothing precedes."""

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    cached_tokens: int
    finish_reason: str
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    metrics: RequestMetrics = field(default_factory=RequestMetrics)


class Finished(NamedTuple):
    output: RequestOutput


class Failed(NamedTuple):
    error: Exception


Event = PrefillProgress | TokenDelta | Finished | Failed
