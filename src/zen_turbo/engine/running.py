"""A request inside the engine, from its arrival to its one last event."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from zen_turbo.attention.answer import Answer
from zen_turbo.attention.decode import SparseDecode
from zen_turbo.attention.fidelity import Fidelity
from zen_turbo.engine.logprobs import PromptLogprobs
from zen_turbo.engine.request import Event, SamplingParams
from zen_turbo.engine.sampler import Sampler
from zen_turbo.engine.stop import StopMatcher
from zen_turbo.kv.prefix import Chain
from zen_turbo.kv.sequence import SequenceCache
from zen_turbo.models.decoder import ChunkRun, Timers
from zen_turbo.text.tokenizer import IncrementalDecoder


@dataclass(eq=False, kw_only=True)
class Running:
    """``tokens`` is the prompt, then the answer; the cache holds all of them but the last sampled one. ``run`` is the prefill chunk that is being
    computed, and ``num_tokens`` of the cache where it begins. Times are of ``time.perf_counter``."""

    request_id: str
    tokens: list[int]
    num_prompt_tokens: int
    max_tokens: int
    sampling: SamplingParams
    on_event: Callable[[Event], None]
    sampler: Sampler
    stops: StopMatcher
    detokenizer: IncrementalDecoder
    prompt_logprobs: PromptLogprobs | None
    chain: Chain
    submitted: float
    aborted: threading.Event = field(default_factory=threading.Event)
    cache: SequenceCache | None = None
    run: ChunkRun | None = None
    cached_tokens: int = 0
    indexed_tokens: int = 0
    asked_store: bool = False
    text: str = ""
    admitted: float = 0.0
    first_token: float = 0.0
    timers: Timers = field(default_factory=Timers)
    fidelity: Fidelity | None = None
    decode: SparseDecode | None = None
    answer: Answer | None = None

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def unread_tokens(self) -> int:
        """Prompt tokens whose chunk is not done."""
        return max(0, self.num_prompt_tokens - (self.cache.num_tokens if self.cache else 0))
