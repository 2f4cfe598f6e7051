"""The engine: ``step()`` is plan -> forward -> sample -> commit, one unit of work at a time.

A unit is one prefill chunk of one request, or one token of every request that is answering; the two alternate, so an answer keeps flowing
while a long prompt is read. Prompts are read in order of arrival. Chunks lie on a fixed grid of absolute positions, so what a chunk computes
depends on its tokens and on what precedes them, never on how the work was cut or on how long the request turns out to be.

Full pages are indexed as they are written (``kv.prefix``) and kept until memory is wanted: a request starts after the longest prefix that is
known, and one that continues a conversation after its last answer.

``submit`` and ``abort`` may be called from any thread; ``step`` from one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from zen_turbo.attention.decode import DECODERS, DecodeSettings, SparseDecode
from zen_turbo.attention.fidelity import WINDOW_TOKENS, Fidelity, Note
from zen_turbo.attention.policies.adaptive import settings_of
from zen_turbo.attention.selection import policy_of
from zen_turbo.config import PAGE_TOKENS, EngineConfig
from zen_turbo.engine import memory
from zen_turbo.engine.guidance import Guidance
from zen_turbo.engine.logprobs import PromptLogprobs, token_logprobs
from zen_turbo.engine.request import (
    MAX_PROMPT_LOGPROBS,
    Event,
    Failed,
    Finished,
    PrefillProgress,
    RequestMetrics,
    RequestOutput,
    SamplingParams,
    TokenDelta,
)
from zen_turbo.engine.sampler import Sampler
from zen_turbo.engine.stop import StopMatcher
from zen_turbo.errors import (
    ConfigurationError,
    ContextLengthExceededError,
    EmptyPromptError,
    InsufficientMemoryError,
    InvalidRequestError,
    RequestCancelledError,
)
from zen_turbo.kernels import selected_isa, usable_cpus
from zen_turbo.kv.geometry import PageGeometry, pages_for
from zen_turbo.kv.pool import PagePool
from zen_turbo.kv.prefix import Chain, PrefixIndex
from zen_turbo.kv.sequence import SequenceCache
from zen_turbo.kv.store import PageStore, StoredPage
from zen_turbo.models.catalogue import resolve_model
from zen_turbo.models.decoder import Decoder, Timers, trained_window
from zen_turbo.models.loader import load_checkpoint
from zen_turbo.text.chat_template import ChatTemplate, load_chat_template
from zen_turbo.text.tokenizer import Tokenizer, load_tokenizer

_LOG = logging.getLogger(__name__)
DCA_MAX_MODEL_LEN = 1_048_576
DENSE_TAIL_TOKENS = 128  # the prompt's end, where the question is, reads everything
KV_SHARE_OF_FREE_MEMORY = 0.85
PAGE_FORMAT = 1  # of what a page holds; to be raised when kernels or policies write other numbers than before
# decode_* are among them because an answer's pages are its conversation's own.
_KNOBS_WITHOUT_EFFECT_ON_PAGES = frozenset(
    "max_model_len prefill_chunk_tokens kv_cache_bytes num_threads store store_bytes decode_attention decode_pages decode_dense_tokens".split()
)
_ROW_BY_ROW = ("dense", "adaptive")  # policies whose pages do not depend on the chunk that they were computed in


@dataclass
class _Request:
    """A request inside the engine. ``tokens`` is the prompt, then the answer; the cache holds all of them but the last sampled one."""

    request_id: str
    tokens: list[int]
    num_prompt_tokens: int
    max_tokens: int
    sampling: SamplingParams
    on_event: Callable[[Event], None]
    sampler: Sampler
    stops: StopMatcher
    prompt_logprobs: PromptLogprobs | None
    chain: Chain
    submitted: float
    aborted: threading.Event = field(default_factory=threading.Event)
    cache: SequenceCache | None = None
    cached_tokens: int = 0
    indexed_tokens: int = 0
    asked_store: bool = False
    text: str = ""
    detokenizer: object | None = None
    admitted: float = 0.0
    first_token: float = 0.0
    timers: Timers = field(default_factory=Timers)
    fidelity: Fidelity | None = None
    decode: SparseDecode | None = None

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.num_prompt_tokens


class Plan(NamedTuple):
    """One unit of work: either the next chunk of ``prefill``, or one token for each of ``decodes``."""

    prefill: _Request | None
    decodes: tuple[_Request, ...]


class Engine:
    """Loads a model and answers requests.

    model: catalogue name, local path or hub name. Raises the errors of model resolution and loading, and ConfigurationError where settings
    and model do not fit together.
    """

    def __init__(
        self, model: str | Path, config: EngineConfig | None = None, *, on_layer: Callable[[int, int], None] | None = None
    ) -> None:
        self.config = config or EngineConfig()
        torch.set_num_threads(self.config.num_threads or usable_cpus())
        path = resolve_model(str(model))
        checkpoint = load_checkpoint(path)
        try:
            self.model_name = str(model) if not Path(str(model)).exists() else path.stem
            self.model_path = path
            self.model_config = checkpoint.config
            self.model_fingerprint = checkpoint.fingerprint
            self.tokenizer: Tokenizer = load_tokenizer(checkpoint.tokenizer_source)
            self.chat_template: ChatTemplate = load_chat_template(checkpoint.tokenizer_source, self.tokenizer)
            self.decoder = Decoder(checkpoint, self.config, on_layer=on_layer)
        finally:
            checkpoint.close()
        self.max_model_len = self._resolve_max_model_len()
        self.eos_token_ids = frozenset(self.model_config.eos_token_ids) | frozenset(self.tokenizer.eos_token_ids)
        self.guidance = Guidance(self.tokenizer, vocab_size=self.model_config.vocab_size, eos_token_ids=self.eos_token_ids)
        if self.config.attention != "dense" and WINDOW_TOKENS % self.config.prefill_chunk_tokens:
            raise ConfigurationError(
                f"prefill_chunk_tokens {self.config.prefill_chunk_tokens} must divide {WINDOW_TOKENS} with sparse attention, "
                "which learns in windows of that size.",
                param="prefill_chunk_tokens",
            )
        self.geometry = PageGeometry(
            num_layers=self.model_config.num_hidden_layers,
            num_key_value_heads=self.model_config.num_key_value_heads,
            head_dim=self.model_config.head_dim,
            dtype=self.decoder.dtype,
            summaries=self.config.needs_summaries,
            int8=self.config.kv_dtype == "int8",
        )
        kv_bytes = self.config.kv_cache_bytes or int(memory.available_bytes() * KV_SHARE_OF_FREE_MEMORY)
        if kv_bytes < self.geometry.slot_bytes:
            raise InsufficientMemoryError("One KV page", need_bytes=self.geometry.slot_bytes, have_bytes=kv_bytes)
        self.pool = self._new_pool(kv_bytes // self.geometry.slot_bytes)
        self._lock = threading.Lock()
        self._waiting: deque[_Request] = deque()
        self._prefilling: _Request | None = None
        self._decoding: list[_Request] = []
        self.prefixes = PrefixIndex(self.pool)
        self._identity = self._cache_identity()
        self.store: PageStore | None = None
        if self.config.store is not None:
            facts = {"model": self.model_name, "model_fingerprint": self.model_fingerprint, "engine": self.config.to_dict()}
            folder, quota = Path(self.config.store).expanduser(), self.config.store_bytes
            self.store = PageStore(folder, self.pool, identity=self._identity, facts=facts, quota_bytes=quota)
        self._decode_next = False

    def _new_pool(self, slots_in_memory: int) -> PagePool:
        """As many pages as memory holds; with a store as many as the longest request needs, in a file beside it if memory holds fewer."""
        wanted = pages_for(self.max_model_len)
        if self.config.store is not None and wanted > slots_in_memory:
            folder = Path(self.config.store).expanduser()
            try:
                folder.mkdir(parents=True, exist_ok=True)
                return PagePool(self.geometry, wanted, folder=folder)
            except OSError as error:
                _LOG.warning("KV pages stay in memory, which holds %d of %d tokens: %s", slots_in_memory * PAGE_TOKENS, self.max_model_len, error)
        return PagePool(self.geometry, slots_in_memory)

    def _resolve_max_model_len(self) -> int:
        window = trained_window(self.model_config)
        if self.config.max_model_len is not None:
            if self.decoder.dual_chunk is None and self.config.max_model_len > window:
                raise ContextLengthExceededError(
                    num_prompt_tokens=self.config.max_model_len, max_tokens=0, max_model_len=window, param="max_model_len"
                )
            return self.config.max_model_len
        return max(DCA_MAX_MODEL_LEN, window) if self.decoder.dual_chunk else window

    # Requests: from any thread.

    def submit(
        self,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        on_event: Callable[[Event], None],
    ) -> str:
        """Queue a request; events arrive on the thread that calls ``step``.

        Raises EmptyPromptError, InvalidRequestError (a token id outside the vocabulary, a grammar that cannot be followed, more prompt logprobs
        than may be kept), ContextLengthExceededError and InsufficientMemoryError (the request could never fit), each before anything is
        computed.
        """
        sampling = sampling or SamplingParams()
        tokens = list(prompt_token_ids)
        if not tokens:
            raise EmptyPromptError("The prompt has no tokens.", param="messages")
        vocab_size = self.model_config.vocab_size
        for ids, param in ((tokens, "prompt"), (sampling.logit_bias, "logit_bias")):
            if ids and (min(ids) < 0 or max(ids) >= vocab_size):
                raise InvalidRequestError(f"Token ids must lie in [0, {vocab_size}).", param=param)
        room = self.max_model_len - len(tokens)
        wanted = sampling.max_tokens
        least = 1 if wanted is None else wanted
        if room < least:
            raise ContextLengthExceededError(num_prompt_tokens=len(tokens), max_tokens=least, max_model_len=self.max_model_len)
        kept = 0 if sampling.prompt_logprobs is None else len(tokens) * (1 + sampling.prompt_logprobs)
        if kept > MAX_PROMPT_LOGPROBS:
            raise InvalidRequestError(
                f"Log probabilities of {len(tokens)} prompt tokens with {sampling.prompt_logprobs} alternatives each are {kept} numbers; "
                f"at most {MAX_PROMPT_LOGPROBS} are kept.",
                param="logprobs",
            )
        have = self.pool.num_slots * self.geometry.slot_bytes
        if wanted is None:
            # As many as fit: the model's limit or the pool's, whichever comes first; finish_reason says "length".
            wanted = min(room, max(1, self.pool.num_slots * 64 - len(tokens)))
        need = self.geometry.bytes_for(len(tokens) + wanted)
        if need > have:
            raise InsufficientMemoryError(f"A request of {len(tokens)} + {wanted} tokens", need_bytes=need, have_bytes=have)
        ends = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else self.eos_token_ids)}
        request = _Request(
            request_id=request_id or f"req-{uuid.uuid4().hex}",
            tokens=tokens,
            num_prompt_tokens=len(tokens),
            max_tokens=wanted,
            sampling=sampling,
            on_event=on_event,
            sampler=Sampler(
                sampling,
                prompt_token_ids=tokens,
                end_token_ids=[token for token in ends if 0 <= token < vocab_size],
                matcher=self.guidance.matcher(sampling.grammar) if sampling.grammar is not None else None,
            ),
            stops=StopMatcher(sampling.stop, include=sampling.include_stop_str_in_output),
            prompt_logprobs=PromptLogprobs(tokens, sampling.prompt_logprobs) if sampling.prompt_logprobs is not None else None,
            chain=self._chain(tokens),
            submitted=time.perf_counter(),
        )
        request.detokenizer = self.tokenizer.incremental(skip_special_tokens=sampling.skip_special_tokens)
        with self._lock:
            self._waiting.append(request)
        return request.request_id

    def abort(self, request_id: str) -> bool:
        """Ask a request to end; it does so before the next layer and sends Finished with reason "abort". False if it is not known."""
        with self._lock:
            for request in self._all():
                if request.request_id == request_id:
                    request.aborted.set()
                    return True
        return False

    def has_work(self) -> bool:
        with self._lock:
            return any(True for _ in self._all())

    def estimate(self, total_tokens: int) -> memory.MemoryEstimate:
        """Memory that a request of so many tokens takes, in bytes."""
        return memory.estimate(
            self.model_config, self.geometry, total_tokens=total_tokens, chunk_tokens=self.config.prefill_chunk_tokens
        )

    def _all(self) -> list[_Request]:
        return [*self._waiting, *([self._prefilling] if self._prefilling else []), *self._decoding]

    # One unit of work.

    def step(self) -> bool:
        """Do one unit of work; False when there is none."""
        plan = self._plan()
        if plan is None:
            return False
        for request in plan.decodes:
            self._guard(request, self._decode)
        if plan.prefill is not None:
            self._guard(plan.prefill, self._prefill_chunk)
        return True

    def fail_all(self, error: Exception) -> None:
        """End every request with ``error``; for a fault of the engine itself."""
        with self._lock:
            requests = self._all()
            self._waiting.clear()
        for request in requests:
            self._drop(request)
            request.on_event(Failed(error))

    def reset_prefix_cache(self) -> None:
        """Forget every page that no request holds: the next prompt is read from its beginning. Call it from the thread of ``step``."""
        self.prefixes.clear()

    def close(self) -> None:
        self.fail_all(RequestCancelledError("The engine was closed."))
        self.prefixes.clear()
        if self.store is not None:
            self.store.close()
        self.pool.close()

    def _plan(self) -> Plan | None:
        """Decodes and prefill chunks alternate. Admits the oldest waiting request when no prompt is being read and memory suffices."""
        with self._lock:
            if self._prefilling is None and self._waiting and self._admit(self._waiting[0]):
                self._prefilling = self._waiting.popleft()
            decodes = tuple(self._decoding)
            if decodes and (self._decode_next or self._prefilling is None):
                self._decode_next = False
                return Plan(None, decodes)
            self._decode_next = True
            if self._prefilling is not None:
                return Plan(self._prefilling, ())
            return Plan(None, decodes) if decodes else None

    def _admit(self, request: _Request) -> bool:
        """Reserve every page the request may need, reusing the longest known prefix. False: not yet, others hold the memory."""
        if request.aborted.is_set():
            request.admitted = time.perf_counter()
            request.cache = SequenceCache(self.pool)
            return True
        grid = 1 if self.config.attention in _ROW_BY_ROW else self.config.prefill_chunk_tokens // PAGE_TOKENS
        reusable = (request.num_prompt_tokens - 1) // PAGE_TOKENS if request.prompt_logprobs is None else 0  # pages hold no logits
        if reusable:
            self._load_stored(request)
        known = self.prefixes.find(request.chain, reusable, grid_pages=grid)
        cache = SequenceCache(self.pool)
        cache.adopt(known.slots)
        total = request.num_prompt_tokens + request.max_tokens
        missing = pages_for(total) - len(cache.slots) - self.pool.num_free
        if missing > 0:
            self.prefixes.evict(missing)
        try:
            cache.reserve(total)
        except InsufficientMemoryError:
            cache.release()
            return False
        request.cache = cache
        request.cached_tokens = request.indexed_tokens = cache.num_tokens
        if self.config.attention != "dense":
            request.fidelity = self.new_fidelity(dense_from=request.num_prompt_tokens - DENSE_TAIL_TOKENS)
            request.fidelity.resume(known.notes)
        request.decode = self.new_decode(prompt_tokens=request.num_prompt_tokens)
        request.admitted = time.perf_counter()
        return True

    def new_decode(self, *, prompt_tokens: int, policy: str | None = None) -> SparseDecode | None:
        """What selects and measures for one answer, with the engine's policy or another; None where every token reads everything."""
        kind = DECODERS.get(policy or self.config.decode_policy)
        if kind is None:
            return None
        settings = DecodeSettings(most_pages=self.config.decode_pages, dense_pages=self.config.decode_dense_tokens // PAGE_TOKENS)
        return kind(settings, num_layers=self.model_config.num_hidden_layers, prompt_tokens=prompt_tokens)

    def new_fidelity(self, *, dense_from: int) -> Fidelity:
        """What steers and measures one sparse prefill with the engine's settings; rows from ``dense_from`` on read everything."""
        policy = policy_of(
            self.config.attention,
            preset=self.config.preset,
            mass=self.config.fidelity,
            sparse_attention=self.model_config.sparse_attention,
        )
        return Fidelity(
            policy,
            num_layers=self.model_config.num_hidden_layers,
            num_heads=self.model_config.num_attention_heads,
            dense_below=self.config.dense_tokens,
            dense_from=dense_from,
        )

    def _cache_identity(self) -> bytes:
        """A hash of everything but tokens that keys and values depend on."""
        knobs = {name: value for name, value in self.config.to_dict().items() if name not in _KNOBS_WITHOUT_EFFECT_ON_PAGES}
        if self.config.attention not in _ROW_BY_ROW:
            knobs["prefill_chunk_tokens"] = self.config.prefill_chunk_tokens
        facts = [PAGE_FORMAT, self.model_fingerprint, knobs, repr(self.decoder.dual_chunk), self.config.needs_summaries, selected_isa()]
        if self.config.attention == "adaptive":
            facts.append(repr(settings_of(self.config.preset, self.config.fidelity)))
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).digest()

    def _chain(self, tokens: list[int]) -> Chain:
        """The pages of a prompt by content. Its own begin where its end makes a difference: with a sparse policy at the rows that read
        everything because they are the last, else at the first token that is not the prompt's."""
        tail = DENSE_TAIL_TOKENS if self.config.attention != "dense" else 0
        identity = self._identity
        if self.model_config.rope.kind == "dynamic":  # the base depends on how long the prompt is
            identity = hashlib.sha256(identity + len(tokens).to_bytes(8)).digest()
        return Chain(tokens, identity, own_from=max(0, len(tokens) - tail) // PAGE_TOKENS)

    def _load_stored(self, request: _Request) -> None:
        """Bring exact pages that go on where the index ends from the store into the index."""
        store, chain = self.store, request.chain
        if store is None or request.asked_store:
            return
        request.asked_store = True
        store.collect()
        most = min((request.num_prompt_tokens - 1) // PAGE_TOKENS, chain.own_from)
        first = self.prefixes.count_exact(chain, most)
        count = store.find([chain.key(page) for page in range(first, most)])
        self.prefixes.evict(count - self.pool.num_free)
        count = min(count, self.pool.num_free)
        if count <= 0:
            return
        slots = self.pool.allocate(count)
        keys = [chain.key(page) for page in range(first, first + count)]
        loaded = store.load(keys, request.tokens[first * PAGE_TOKENS : (first + count) * PAGE_TOKENS], slots)
        notes = [Note.from_bytes(note) if note else None for note in loaded.notes]
        self.prefixes.add(chain, slots[: loaded.num_pages], notes, first_page=first)
        if loaded.num_pages < count:  # a damaged segment is gone, with the sound pages that stood before the damage
            store.put([self._stored_page(request, first + at, slot, note) for at, (slot, note) in enumerate(zip(slots, notes, strict=False))])
        self.pool.free(slots)

    def _index(self, request: _Request) -> None:
        """Offer the pages that are full by now to others, and what any prompt could use to the store."""
        cache = request.cache
        assert cache is not None
        first, last = request.indexed_tokens // PAGE_TOKENS, cache.num_tokens // PAGE_TOKENS
        notes = [request.fidelity.note(page) if request.fidelity else None for page in range(first, last)]
        self.prefixes.add(request.chain, cache.slots[first:last], notes, first_page=first)
        request.indexed_tokens = last * PAGE_TOKENS
        if self.store is not None:
            exact = range(first, min(last, request.chain.own_from))
            self.store.put([self._stored_page(request, page, cache.slots[page], note) for page, note in zip(exact, notes, strict=False)])
            self.store.collect()

    @staticmethod
    def _stored_page(request: _Request, page: int, slot: int, note: Note | None) -> StoredPage:
        tokens = request.tokens[page * PAGE_TOKENS : (page + 1) * PAGE_TOKENS]
        return StoredPage(request.chain.key(page), tokens, slot, note.to_bytes() if note else b"")

    def _guard(self, request: _Request, work: Callable[[_Request], None]) -> None:
        """Run one request's unit; an abort or an error ends that request and no other."""
        try:
            if request.aborted.is_set():
                raise RequestCancelledError("The request was cancelled.")
            work(request)
        except RequestCancelledError:
            self._finish(request, "abort")
        except Exception as error:
            self._drop(request)
            request.on_event(Failed(error))

    def _forward(self, request: _Request, start: int, end: int, *, logits: bool) -> torch.Tensor | None:
        """Compute tokens [start, end) and commit them. Returns the last row's logits, f32 [vocab_size], if wanted."""
        cache = request.cache
        assert cache is not None and cache.num_tokens == start
        self.decoder.timers = request.timers if end <= request.num_prompt_tokens else Timers()
        result, _ = self.decoder.forward(
            torch.tensor(request.tokens[start:end], dtype=torch.int64),
            cache.pages,
            first_position=start,
            logits_rows=slice(end - start - 1, end - start) if logits else None,
            rope_seq_len=request.num_prompt_tokens,
            cancelled=request.aborted.is_set,
            fidelity=request.fidelity if end <= request.num_prompt_tokens else None,
            decode=request.decode if end >= request.num_prompt_tokens else None,
            each_logits=request.prompt_logprobs.add if request.prompt_logprobs is not None and end <= request.num_prompt_tokens else None,
        )
        cache.commit(end)
        return result[0] if result is not None else None

    def _prefill_chunk(self, request: _Request) -> None:
        assert request.cache is not None
        start = request.cache.num_tokens
        if start == request.cached_tokens:
            self._progress(request)
        grid = self.config.prefill_chunk_tokens
        end = min((start // grid + 1) * grid, request.num_prompt_tokens)
        logits = self._forward(request, start, end, logits=end == request.num_prompt_tokens)
        self._index(request)
        self._progress(request)
        if logits is not None:
            self.prefixes.end(request.chain, (end - 1) // PAGE_TOKENS, same=True)
            with self._lock:
                self._prefilling = None
                self._decoding.append(request)
            if request.max_tokens:
                self._sample(request, logits)
            else:
                self._finish(request, "length")

    def _progress(self, request: _Request) -> None:
        assert request.cache is not None
        elapsed = time.perf_counter() - request.admitted
        request.on_event(PrefillProgress(request.num_prompt_tokens, request.cached_tokens, request.cache.num_tokens, elapsed))

    def _decode(self, request: _Request) -> None:
        end = len(request.tokens)
        logits = self._forward(request, end - 1, end, logits=True)
        assert logits is not None
        self._sample(request, logits)

    def _sample(self, request: _Request, logits: torch.Tensor) -> None:
        """Choose a token, stream what is safe to show, and finish the request if it is done."""
        sampling = request.sampling
        token = request.sampler.sample(logits)
        logprobs = () if sampling.logprobs is None else (token_logprobs(logits, token, sampling.logprobs),)
        if not request.first_token:
            request.first_token = time.perf_counter()
        request.tokens.append(token)
        ended = token in sampling.stop_token_ids or (token in self.eos_token_ids and not sampling.ignore_eos)
        complete = ended or request.sampler.finished
        last = complete or request.num_generated >= request.max_tokens
        shown = not ended or sampling.include_stop_str_in_output
        text = request.detokenizer.push(token) if shown else ""  # type: ignore[attr-defined]
        stopped = self._emit(request, TokenDelta(text, (token,), logprobs), flush=last)
        if last or stopped:
            self._finish(request, "stop" if complete or stopped else "length")

    def _emit(self, request: _Request, delta: TokenDelta, *, flush: bool) -> bool:
        """Send new text through the stop strings; ``flush`` also sends what was held back. True if a stop string was found."""
        text = delta.text + (request.detokenizer.flush() if flush else "")  # type: ignore[attr-defined]
        if request.num_generated < request.sampling.min_tokens:
            shown, stopped = text, False
        else:
            shown, stopped = request.stops.push(text)
        if flush and not stopped:
            shown += request.stops.flush()
        request.text += shown
        request.on_event(delta._replace(text=shown))
        return stopped

    def _finish(self, request: _Request, reason: str) -> None:
        now = time.perf_counter()
        first = request.first_token or now
        started = request.admitted or now
        output = RequestOutput(
            request_id=request.request_id,
            text=request.text,
            token_ids=tuple(request.tokens[request.num_prompt_tokens :]),
            prompt_tokens=request.num_prompt_tokens,
            cached_tokens=request.cached_tokens,
            finish_reason=reason,
            prompt_logprobs=request.prompt_logprobs.result() if request.prompt_logprobs and reason != "abort" else None,
            metrics=RequestMetrics(
                queue_s=started - request.submitted,
                ttft_s=first - request.submitted,
                prefill_s=first - started,
                decode_s=now - first,
                attend_s=request.timers.attend_s,
                linear_s=request.timers.linear_s,
                select_s=request.timers.select_s,
                density=request.fidelity.density if request.fidelity else 1.0,
                recall=request.fidelity.recall if request.fidelity else None,
                recall_p5=request.fidelity.recall_p5 if request.fidelity else None,
                decode_recall=request.decode.recall if request.decode else None,
            ),
        )
        self._drop(request)
        request.on_event(Finished(output))

    def _drop(self, request: _Request) -> None:
        with self._lock:
            if request is self._prefilling:
                self._prefilling = None
            if request in self._decoding:
                self._decoding.remove(request)
        if request.cache is not None:
            self._index(request)
            answered = request.cache.num_tokens >= request.num_prompt_tokens
            (self.prefixes.end if answered else self.prefixes.touch)(request.chain, request.cache.num_tokens // PAGE_TOKENS)
            if self.store is not None:
                self.store.flush()
            request.cache.release()
            request.cache = None
