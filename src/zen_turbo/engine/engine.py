"""The engine: ``step()`` is plan -> forward -> sample -> commit, one unit of work at a time.

A unit is one token of every request that is answering, in one batch, and then a while of reading one prompt (``scheduler.py`` says which). A chunk
may rest between any two of its layers, so a short question waits for a layer of a long prompt's chunk and not for the chunk. Chunks lie on a fixed
grid of absolute positions, so what a chunk computes depends on its tokens and on what precedes them, never on how the work was cut, on what came
between, or on how long the request turns out to be.

Full pages are indexed as they are written and kept until memory is wanted (``reuse.py``): a request starts after the longest prefix that is known,
and one that continues a conversation after its last answer.

``submit`` and ``abort`` may be called from any thread and never wait for a unit of work; ``step`` from one.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from zen_turbo.attention.answer import Answer
from zen_turbo.attention.decode import DECODERS, DecodeSettings, SparseDecode
from zen_turbo.attention.fidelity import WINDOW_TOKENS, Fidelity
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
from zen_turbo.engine.reuse import Reuse
from zen_turbo.engine.running import Running
from zen_turbo.engine.sampler import Sampler
from zen_turbo.engine.scheduler import Admission, Scheduler
from zen_turbo.engine.stop import StopMatcher
from zen_turbo.errors import (
    ConfigurationError,
    ContextLengthExceededError,
    EmptyPromptError,
    InsufficientMemoryError,
    InvalidRequestError,
    RequestCancelledError,
)
from zen_turbo.kv.geometry import PageGeometry, pages_for
from zen_turbo.kv.pool import PagePool
from zen_turbo.models.catalogue import resolve_model
from zen_turbo.models.decoder import Decoder, TokenRow, trained_window
from zen_turbo.models.loader import load_checkpoint
from zen_turbo.native import usable_cpus
from zen_turbo.text.chat_template import ChatTemplate, load_chat_template
from zen_turbo.text.tokenizer import Tokenizer, load_tokenizer

_LOG = logging.getLogger(__name__)
DCA_MAX_MODEL_LEN = 1_048_576
DENSE_TAIL_TOKENS = 128  # the prompt's end, where the question is, reads everything, or as much as a preset says
KV_SHARE_OF_FREE_MEMORY = 0.85
PREFILL_QUANTUM_S = 0.2  # how long one prompt is read before answers and other prompts get their turn; at least one layer of a chunk


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
        self.reuse = Reuse(
            self.pool,
            self.config,
            model_name=self.model_name,
            model_fingerprint=self.model_fingerprint,
            dual_chunk=self.decoder.dual_chunk,
            dense_tail_tokens=DENSE_TAIL_TOKENS if self.config.attention != "dense" else 0,
            length_matters=self.model_config.rope.kind == "dynamic",
        )
        self._scheduler: Scheduler[Running] = Scheduler(max_running=self.config.max_num_seqs)
        self._known: dict[str, Running] = {}  # every request that has not ended; under the lock, as is the inbox
        self._inbox: list[Running] = []
        self._lock = threading.Lock()
        self._stepping: int | None = None  # the thread that is in step

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
            wanted = min(room, max(1, self.pool.num_slots * PAGE_TOKENS - len(tokens)))
        need = self.geometry.bytes_for(len(tokens) + wanted)
        if need > have:
            raise InsufficientMemoryError(f"A request of {len(tokens)} + {wanted} tokens", need_bytes=need, have_bytes=have)
        ends = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else self.eos_token_ids)}
        request = Running(
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
            detokenizer=self.tokenizer.incremental(skip_special_tokens=sampling.skip_special_tokens),
            prompt_logprobs=PromptLogprobs(tokens, sampling.prompt_logprobs) if sampling.prompt_logprobs is not None else None,
            chain=self.reuse.chain(tokens),
            submitted=time.perf_counter(),
        )
        with self._lock:
            if request.request_id in self._known:
                raise InvalidRequestError(f"A request {request.request_id!r} is running already.", param="request_id")
            self._known[request.request_id] = request
            self._inbox.append(request)
        return request.request_id

    def abort(self, request_id: str) -> bool:
        """Ask a request to end; it does so before the next layer and sends Finished with reason "abort". False if it is not known."""
        with self._lock:
            request = self._known.get(request_id)
        if request is None:
            return False
        request.aborted.set()
        return True

    def has_work(self) -> bool:
        return bool(self._known)

    @property
    def num_waiting(self) -> int:
        """Requests that nothing was computed for yet."""
        return len(self._inbox) + self._scheduler.num_waiting

    @property
    def num_running(self) -> int:
        """Requests whose prompt is being read or that are being answered."""
        return self._scheduler.num_running

    @property
    def kv_cache_usage(self) -> float:
        """Share of the page slots that requests hold, shared ones counted once; between 0 and 1. Pages kept for later prompts do not count: they
        give way. From any thread."""
        held: set[int] = set()
        for request in list(self._known.values()):
            if (cache := request.cache) is not None:
                held.update(cache.slots)
        return len(held) / self.pool.num_slots

    def estimate(self, total_tokens: int) -> memory.MemoryEstimate:
        """Memory that a request of so many tokens takes, in bytes."""
        return memory.estimate(
            self.model_config, self.geometry, total_tokens=total_tokens, chunk_tokens=self.config.prefill_chunk_tokens
        )

    # One unit of work.

    def step(self) -> bool:
        """Do one unit of work; False when there is none."""
        assert self._stepping in (None, threading.get_ident()), "two threads step one engine"
        self._stepping = threading.get_ident()
        try:
            return self._step()
        finally:
            self._stepping = None

    def _step(self) -> bool:
        with self._lock:
            arrived, self._inbox = self._inbox, []
        for request in arrived:
            self._scheduler.add(request)
        for request in [request for request in self._scheduler if request.aborted.is_set()]:
            self._finish(request, "abort")
        plan = self._scheduler.plan(self._admit)
        if plan is None:
            return bool(self._known)
        if plan.decodes:
            self._decode(plan.decodes)
        if plan.prefill is not None:
            self._guard(plan.prefill, self._read)
        return True

    def fail_all(self, error: Exception) -> None:
        """End every request with ``error``; for a fault of the engine itself. Call it from the thread of ``step``."""
        with self._lock:
            requests = list(self._known.values())
            self._inbox.clear()
        for request in requests:
            self._fail(request, error)

    def reset_prefix_cache(self) -> None:
        """Forget every page that no request holds: the next prompt is read from its beginning. Call it from the thread of ``step``."""
        self.reuse.prefixes.clear()

    def close(self) -> None:
        self.fail_all(RequestCancelledError("The engine was closed."))
        self.reuse.close()
        self.pool.close()

    def _admit(self, request: Running) -> Admission:
        """Reserve every page the request may need, reusing the longest known prefix."""
        try:
            if self.reuse.worth_waiting(request, self._scheduler.prefilling):
                return Admission.LATER
            if self.config.attention != "dense":
                request.fidelity = self.new_fidelity(dense_from=request.num_prompt_tokens - DENSE_TAIL_TOKENS)
            if not self.reuse.reserve(request):
                return Admission.NO_MEMORY
            request.decode = self.new_decode(prompt_tokens=request.num_prompt_tokens, fidelity=request.fidelity)
            request.admitted = time.perf_counter()
            self._progress(request)
            return Admission.ADMITTED
        except Exception as error:
            self._fail(request, error)
            return Admission.LATER

    def new_decode(self, *, prompt_tokens: int, fidelity: Fidelity | None, policy: str | None = None) -> SparseDecode | None:
        """What selects and measures for one answer, with the engine's policy or another; None where every token reads everything.
        fidelity: of the prompt's prefill."""
        kind = DECODERS.get(policy or self.config.decode_policy)
        if kind is None:
            return None
        settings = DecodeSettings(most_pages=self.config.decode_pages, dense_pages=self.config.decode_dense_tokens // PAGE_TOKENS)
        return kind(settings, num_layers=self.model_config.num_hidden_layers, prompt_tokens=prompt_tokens, fidelity=fidelity)

    def new_fidelity(self, *, dense_from: int) -> Fidelity:
        """What steers and measures one sparse prefill with the engine's settings; rows from ``dense_from`` on are the prompt's end."""
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

    def _guard(self, request: Running, work: Callable[[Running], None]) -> None:
        """Run one request's unit; an error ends that request and no other."""
        try:
            work(request)
        except Exception as error:
            self._fail(request, error)

    def _read(self, request: Running) -> None:
        """Compute layers of the prompt's chunks until the quantum is over or the prompt is read."""
        cache, began = request.cache, time.perf_counter()
        assert cache is not None
        while not request.aborted.is_set():
            start = cache.num_tokens
            end = self._chunk_end(request)
            if request.run is None:
                request.run = self.decoder.begin(
                    torch.tensor(request.tokens[start:end], dtype=torch.int64),
                    cache.pages,
                    first_position=start,
                    rope_seq_len=request.num_prompt_tokens,
                    fidelity=request.fidelity,
                    decode=request.decode if end == request.num_prompt_tokens else None,
                    timers=request.timers,
                )
            if not self.decoder.advance(request.run):
                run, request.run = request.run, None
                if request.prompt_logprobs is not None:
                    self.decoder.each_logits(run, request.prompt_logprobs.add)
                cache.commit(end)
                self.reuse.keep(request)
                self._progress(request)
                if end == request.num_prompt_tokens:
                    self.reuse.end_of_prompt(request)
                    self._scheduler.answer(request)
                    if request.max_tokens:
                        self._sample(request, self.decoder.logits(run, slice(end - start - 1, end - start))[0])
                    else:
                        self._finish(request, "length")
                    return
            if time.perf_counter() - began >= PREFILL_QUANTUM_S:
                return

    def _chunk_end(self, request: Running) -> int:
        assert request.cache is not None
        grid = self.config.prefill_chunk_tokens
        return min((request.cache.num_tokens // grid + 1) * grid, request.num_prompt_tokens)

    def _progress(self, request: Running) -> None:
        assert request.cache is not None
        elapsed = time.perf_counter() - request.admitted
        request.on_event(PrefillProgress(request.num_prompt_tokens, request.cached_tokens, request.cache.num_tokens, elapsed))

    def _decode(self, requests: Sequence[Running]) -> None:
        """One token for each, in one batch; if that fails, one by one, so that only the request at fault ends."""
        try:
            logits = self.decoder.decode_tokens([self._token_row(request) for request in requests])
        except Exception as error:
            if len(requests) == 1:
                self._fail(requests[0], error)
                return
            for request in requests:
                self._decode((request,))
            return
        for request, row in zip(requests, logits, strict=True):
            assert request.cache is not None
            request.cache.commit(len(request.tokens))
            self._guard(request, lambda request, row=row: self._sample(request, row))

    @staticmethod
    def _token_row(request: Running) -> TokenRow:
        assert request.cache is not None
        position = len(request.tokens) - 1
        if request.answer is None:
            request.answer = Answer(request.cache.pages, request.decode, rope_seq_len=request.num_prompt_tokens)
        return TokenRow(request.tokens[position], position, request.answer)

    def _sample(self, request: Running, logits: torch.Tensor) -> None:
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
        text = request.detokenizer.push(token) if shown else ""
        stopped = self._emit(request, TokenDelta(text, (token,), logprobs), flush=last)
        if last or stopped:
            self._finish(request, "stop" if complete or stopped else "length")

    def _emit(self, request: Running, delta: TokenDelta, *, flush: bool) -> bool:
        """Send new text through the stop strings; ``flush`` also sends what was held back. True if a stop string was found."""
        text = delta.text + (request.detokenizer.flush() if flush else "")
        if request.num_generated < request.sampling.min_tokens:
            shown, stopped = text, False
        else:
            shown, stopped = request.stops.push(text)
        if flush and not stopped:
            shown += request.stops.flush()
        request.text += shown
        request.on_event(delta._replace(text=shown))
        return stopped

    def _finish(self, request: Running, reason: str) -> None:
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

    def _fail(self, request: Running, error: Exception) -> None:
        self._drop(request)
        request.on_event(Failed(error))

    def _drop(self, request: Running) -> None:
        self._scheduler.remove(request)
        request.run = None
        self.reuse.leave(request)
        with self._lock:
            self._known.pop(request.request_id, None)
