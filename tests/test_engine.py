"""The engine on a tiny model: equivalences, limits, cancelling, and who gets which pages."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from serving import wait_until

from zen_turbo import LLM
from zen_turbo.engine import memory
from zen_turbo.engine import service as service_module
from zen_turbo.engine.engine import Engine
from zen_turbo.engine.request import Event, Failed, Finished, PrefillProgress, RequestOutput, SamplingParams, TokenDelta
from zen_turbo.engine.service import EngineService
from zen_turbo.errors import (
    ConfigurationError,
    ContextLengthExceededError,
    EmptyPromptError,
    InsufficientMemoryError,
    InvalidRequestError,
    ModelNotFoundError,
    RequestCancelledError,
)

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
SMALL: dict[str, Any] = {"prefill_chunk_tokens": 128, "kv_cache_bytes": 32 << 20, "max_model_len": 4096}


@pytest.fixture(scope="module")
def llm(tiny_folder: Path) -> LLM:
    return LLM(tiny_folder, dtype="float32", **SMALL)


@pytest.fixture
def engine(tiny_folder: Path) -> Iterator[Engine]:
    result = LLM(tiny_folder, dtype="float32", **SMALL).engine
    yield result
    result.close()


def run(engine: Engine, *requests: tuple[list[int], SamplingParams]) -> list[RequestOutput]:
    """All requests at once; each must finish."""
    events: list[list[Event]] = [[] for _ in requests]
    for (prompt, sampling), received in zip(requests, events, strict=True):
        engine.submit(prompt, sampling, on_event=received.append)
    while engine.step():
        pass
    outputs = []
    for received in events:
        assert isinstance(received[-1], Finished), received[-1]
        outputs.append(received[-1].output)
    return outputs


def test_greedy_answers_are_those_of_transformers(llm: LLM, tiny_folder: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder).float().eval()
    for seed in range(5):
        prompt = tiny.tokens(150, seed=seed)
        expected = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, 150), do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=0
        )
        assert list(llm.generate(prompt, GREEDY).token_ids) == expected[0, 150:].tolist()


@pytest.mark.parametrize("length", [1, 127, 128, 129, 600, 1100])
def test_chunked_is_one_shot(llm: LLM, tiny_folder: Path, length: int) -> None:
    """1100 tokens are beyond the trained window: three spans of Dual Chunk Attention."""
    whole = LLM(tiny_folder, dtype="float32", **{**SMALL, "prefill_chunk_tokens": 4096})
    prompt = tiny.tokens(length, seed=length)
    assert llm.generate(prompt, GREEDY).token_ids == whole.generate(prompt, GREEDY).token_ids


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cached_is_cold_bit_for_bit(tiny_folder: Path, dtype: str) -> None:
    """Whole pages are reused, and logits do not change by a bit."""
    prompt = tiny.tokens(1000)
    other = [*prompt[:770], *tiny.tokens(300, seed=9)]

    def outcome(first: list[int] | None) -> tuple[RequestOutput, list[torch.Tensor]]:
        engine = LLM(tiny_folder, dtype=dtype, **SMALL).engine
        if first is not None:
            run(engine, (first, GREEDY))
        seen: list[torch.Tensor] = []
        sample = engine._sample

        def spy(request: Any, logits: torch.Tensor) -> None:
            seen.append(logits.clone())
            sample(request, logits)

        engine._sample = spy  # type: ignore[method-assign]
        return run(engine, (other, GREEDY))[0], seen

    cold, cold_logits = outcome(None)
    warm, warm_logits = outcome(prompt)
    assert (cold.cached_tokens, warm.cached_tokens) == (0, 768)
    assert cold.token_ids == warm.token_ids
    assert len(cold_logits) == len(warm_logits) == 12
    assert all(torch.equal(a, b) for a, b in zip(cold_logits, warm_logits, strict=True))


def test_a_prompt_that_was_answered_leaves_a_token_to_compute(engine: Engine) -> None:
    prompt = tiny.tokens(256)
    first, second = (run(engine, (prompt, GREEDY))[0] for _ in range(2))
    assert first.token_ids == second.token_ids
    assert second.cached_tokens == 192  # all 256 are known, but logits of the last one are wanted


def test_a_prefix_can_be_forgotten(engine: Engine) -> None:
    prompt = tiny.tokens(300)
    run(engine, (prompt, GREEDY))
    engine.reset_prefix_cache()
    assert run(engine, (prompt, GREEDY))[0].cached_tokens == 0


def test_a_conversation_reuses_its_answer_too(engine: Engine) -> None:
    prompt = tiny.tokens(120)
    answer = run(engine, (prompt, GREEDY))[0].token_ids
    follow_up = [*prompt, *answer, *tiny.tokens(40, seed=3)]
    assert run(engine, (follow_up, GREEDY))[0].cached_tokens == 128


def test_requests_at_once_answer_as_alone(engine: Engine) -> None:
    prompts = [tiny.tokens(length, seed=length) for length in (300, 70, 513)]
    alone = [run(engine, (prompt, GREEDY))[0].token_ids for prompt in prompts]
    together = run(engine, *((prompt, GREEDY) for prompt in prompts))
    assert [output.token_ids for output in together] == alone


def test_many_prompts_answer_as_alone(tiny_folder: Path) -> None:
    shared = tiny.tokens(300)
    prompts = [[*shared, *tiny.tokens(40, seed=seed)] for seed in (1, 2, 3)]
    lengths = [SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True) for tokens in (3, 12, 7)]
    llm = LLM(tiny_folder, **SMALL)
    alone = [LLM(tiny_folder, **SMALL).generate(prompt, sampling).token_ids for prompt, sampling in zip(prompts, lengths, strict=True)]
    seen: list[int] = []
    together = llm.generate_many(prompts, lengths, on_event=lambda number, event: seen.append(number))
    assert [output.token_ids for output in together] == alone
    assert [output.cached_tokens for output in together] == [0, 256, 256], "what they begin with alike is read once"
    assert set(seen) == {0, 1, 2}
    assert [output.token_ids for output in llm.generate_many(prompts, lengths[0])] == [answer[:3] for answer in alone]
    with pytest.raises(ValueError, match=r"2 prompts .* not 3"):
        llm.generate_many(prompts[:2], lengths)
    with pytest.raises(ContextLengthExceededError):
        llm.generate_many([prompts[0], tiny.tokens(5000)], GREEDY)
    assert not llm.engine.step(), "the others are aborted"
    assert llm.generate_many([]) == []


def test_events_tell_the_story(engine: Engine) -> None:
    events: list[Event] = []
    engine.submit(tiny.tokens(300), GREEDY, on_event=events.append)
    while engine.step():
        pass
    progress = [event for event in events if isinstance(event, PrefillProgress)]
    assert [(event.processed_tokens, event.total_tokens) for event in progress] == [(0, 300), (128, 300), (256, 300), (300, 300)]
    text = "".join(event.text for event in events if isinstance(event, TokenDelta))
    token_ids = [token for event in events if isinstance(event, TokenDelta) for token in event.token_ids]
    final = events[-1]
    assert isinstance(final, Finished)
    assert (final.output.text, list(final.output.token_ids)) == (text, token_ids)
    assert final.output.finish_reason == "length"
    assert 0 < final.output.metrics.attend_s + final.output.metrics.linear_s <= final.output.metrics.ttft_s


def test_stop_strings_and_tokens(llm: LLM) -> None:
    prompt = tiny.tokens(40)
    free = llm.generate(prompt, GREEDY)
    stop = free.text[3:6]
    stopped = llm.generate(prompt, SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, stop=(stop,)))
    assert stopped.text == free.text[: free.text.index(stop)] and stopped.finish_reason == "stop"
    at = free.token_ids[2]
    by_token = llm.generate(prompt, SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, stop_token_ids=(at,)))
    assert by_token.token_ids == free.token_ids[: free.token_ids.index(at) + 1] and by_token.finish_reason == "stop"


def test_a_seed_repeats_and_another_differs(llm: LLM) -> None:
    prompt = tiny.tokens(40)

    def sample(seed: int) -> tuple[int, ...]:
        return llm.generate(prompt, SamplingParams(temperature=1.5, seed=seed, max_tokens=20, ignore_eos=True)).token_ids

    assert sample(1) == sample(1) != sample(2)


def test_logprobs_are_those_of_transformers(engine: Engine, tiny_folder: Path) -> None:
    """Of answer and prompt, over several chunks and tiles, whatever was cached before."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder).float().eval()
    prompt = tiny.tokens(300)
    run(engine, (prompt, GREEDY))
    sampling = SamplingParams(temperature=1.7, seed=3, max_tokens=5, ignore_eos=True, logprobs=2, prompt_logprobs=3, presence_penalty=2)
    events: list[Event] = []
    engine.submit(prompt, sampling, on_event=events.append)
    while engine.step():
        pass
    final = events[-1]
    assert isinstance(final, Finished)
    output = final.output
    assert output.cached_tokens == 0
    with torch.no_grad():
        expected = torch.log_softmax(model(torch.tensor([[*prompt, *output.token_ids]])).logits[0].double(), -1)
    deltas = [value for event in events if isinstance(event, TokenDelta) for value in event.logprobs]
    assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == 299
    assert [value.token_id for value in deltas] == list(output.token_ids)
    for row, value in enumerate([*output.prompt_logprobs, *deltas]):
        best = expected[row].topk(len(value.top))
        assert value.token_id == [*prompt, *output.token_ids][row + 1]
        assert value.logprob == pytest.approx(float(expected[row, value.token_id]), abs=1e-3)
        assert [logprob for _, logprob in value.top] == pytest.approx(best.values.tolist(), abs=1e-3)
    assert [len(value.top) for value in (*output.prompt_logprobs[:2], *deltas[:2])] == [3, 3, 2, 2]
    assert run(engine, (prompt, GREEDY))[0].cached_tokens == 256


def test_prompt_logprobs_are_bounded_with_both_numbers(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zen_turbo.engine.engine.MAX_PROMPT_LOGPROBS", 100)
    with pytest.raises(InvalidRequestError, match="153 numbers; at most 100"):
        engine.submit(tiny.tokens(51), SamplingParams(prompt_logprobs=2), on_event=lambda event: None)


def test_no_tokens_wanted_reads_the_prompt(engine: Engine) -> None:
    output = run(engine, (tiny.tokens(4096), SamplingParams(max_tokens=0)))[0]
    assert (output.text, output.token_ids, output.finish_reason) == ("", (), "length")
    assert run(engine, (tiny.tokens(4090), SamplingParams(max_tokens=1)))[0].cached_tokens == 4032


def test_min_tokens_hold_off_every_end(llm: LLM) -> None:
    prompt = tiny.tokens(40)
    free = llm.generate(prompt, GREEDY)
    early = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True, "stop": (free.text[:2],)}
    assert len(llm.generate(prompt, SamplingParams(**early)).token_ids) < 3
    late = llm.generate(prompt, SamplingParams(**early, min_tokens=6))
    assert len(late.token_ids) >= 6 and late.text.startswith(free.text[:4])
    ends = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True, "stop_token_ids": free.token_ids[:1]}
    assert len(llm.generate(prompt, SamplingParams(**ends)).token_ids) == 1
    assert len(llm.generate(prompt, SamplingParams(**ends, min_tokens=5)).token_ids) >= 5


def test_special_tokens_are_shown_on_request(llm: LLM) -> None:
    prompt, bias = tiny.tokens(40), {1: 100.0}  # <|im_start|>, again and again
    shown = SamplingParams(temperature=0.0, max_tokens=2, logit_bias=bias, skip_special_tokens=False)
    assert llm.generate(prompt, shown).text == "<|im_start|>" * 2
    assert llm.generate(prompt, SamplingParams(temperature=0.0, max_tokens=2, logit_bias=bias)).text == ""


# Refusals: before anything is computed, and with the numbers.


def test_a_prompt_that_is_too_long_is_refused_with_both_numbers(engine: Engine) -> None:
    with pytest.raises(ContextLengthExceededError, match=r"maximum context length is 4096 tokens.*4090 tokens plus 12") as caught:
        engine.submit(tiny.tokens(4090), GREEDY, on_event=lambda event: None)
    assert caught.value.details == {"n_prompt_tokens": 4090, "n_ctx": 4096}
    assert not engine.has_work()


def test_a_prompt_that_memory_cannot_hold_is_refused_with_both_numbers(tiny_folder: Path) -> None:
    engine = LLM(tiny_folder, dtype="float32", attention="dense", **{**SMALL, "kv_cache_bytes": 1 << 20}).engine
    with pytest.raises(InsufficientMemoryError, match="GiB but only") as caught:
        engine.submit(tiny.tokens(1000), GREEDY, on_event=lambda event: None)
    assert caught.value.details["need_bytes"] == 16 * 64 * 2 * 2 * 2 * 64 * 4 > caught.value.details["have_bytes"]
    assert run(engine, (tiny.tokens(400), GREEDY))[0].finish_reason == "length"


def test_other_refusals(engine: Engine, tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(EmptyPromptError):
        engine.submit([], GREEDY, on_event=lambda event: None)
    with pytest.raises(InvalidRequestError, match="320"):
        engine.submit([320], GREEDY, on_event=lambda event: None)
    with pytest.raises(InvalidRequestError, match="320"):
        engine.submit([3], SamplingParams(logit_bias={320: 1.0}), on_event=lambda event: None)
    for values in (
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"top_k": -2},
        {"min_p": 2},
        {"max_tokens": -1},
        {"stop": ("",)},
        {"presence_penalty": 2.5},
        {"frequency_penalty": float("nan")},
        {"repetition_penalty": 0},
        {"logit_bias": {3: 101}},
        {"min_tokens": 300},
        {"logprobs": 21},
        {"prompt_logprobs": -1},
        {"min_tokens": 1, "grammar": 'start: "a"'},
    ):
        with pytest.raises(InvalidRequestError) as caught:
            SamplingParams(**values)  # type: ignore[arg-type]
        assert caught.value.param in values
    for knobs, words in (
        ({"attention": "psychic"}, "attention must be one of"),
        ({"prefill_chunk_tokens": 100}, "multiple of 64"),
        ({"colour": "red"}, "colour"),
        ({"kv_cache_bytes": -1}, "positive"),
        ({"dca_chunk_size": 256, "dca_local_size": 300}, "dca_local_size 300"),
    ):
        with pytest.raises(ConfigurationError, match=words):
            LLM(tiny_folder, **knobs)
    with pytest.raises(ContextLengthExceededError):
        LLM(tiny_folder, context_extension="none", max_model_len=513)
    with pytest.raises(ModelNotFoundError, match="no-such-model"):
        LLM("no-such-model")
    with pytest.raises(ModelNotFoundError):
        LLM(tmp_path)


# Memory


def test_nothing_leaks(engine: Engine) -> None:
    total = engine.pool.num_free
    for seed in range(4):
        run(engine, (tiny.tokens(300 + 50 * seed, seed=seed), GREEDY), (tiny.tokens(90, seed=seed), GREEDY))
    engine.reset_prefix_cache()
    assert engine.pool.num_free == total


def test_a_request_waits_until_memory_is_free(tiny_folder: Path) -> None:
    engine = LLM(tiny_folder, dtype="float32", attention="dense", **{**SMALL, "kv_cache_bytes": 12 * 64 * 2 * 2 * 2 * 64 * 4}).engine
    assert engine.pool.num_slots == 12
    outputs = run(engine, *((tiny.tokens(500, seed=seed), GREEDY) for seed in range(3)))
    alone = LLM(tiny_folder, dtype="float32", **SMALL).engine
    assert [output.token_ids for output in outputs] == [run(alone, (tiny.tokens(500, seed=seed), GREEDY))[0].token_ids for seed in range(3)]


# Cancelling


def test_abort_between_layers_ends_the_request_and_no_other(engine: Engine) -> None:
    """Abort from another thread's point of view: while the first layer of a chunk is being computed."""
    events: list[Event] = []
    request_id = engine.submit(tiny.tokens(600), GREEDY, on_event=events.append)
    layers: list[int] = []
    layer = engine.decoder._layer

    def interrupting(*args: Any, **settings: Any) -> torch.Tensor:
        layers.append(1)
        if len(layers) == 3:  # first layer of the second chunk
            assert engine.abort(request_id)
        return layer(*args, **settings)

    engine.decoder._layer = interrupting  # type: ignore[method-assign]
    while engine.step():
        pass
    assert len(layers) == 3, "the second layer of that chunk was not computed"
    final = events[-1]
    assert isinstance(final, Finished) and final.output.finish_reason == "abort" and final.output.token_ids == ()
    engine.decoder._layer = layer  # type: ignore[method-assign]
    resumed = run(engine, (tiny.tokens(600), GREEDY))[0]
    assert resumed.cached_tokens == 128, "what was computed before the abort is kept"
    assert not engine.abort(request_id)


def test_a_fault_in_one_request_leaves_the_others_alone(engine: Engine) -> None:
    good, bad = tiny.tokens(200, seed=1), tiny.tokens(200, seed=2)
    alone = run(engine, (good, GREEDY))[0].token_ids
    begin = engine.decoder.begin

    def faulty(token_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if token_ids.tolist() == bad[: len(token_ids)]:
            raise RuntimeError("broken")
        return begin(token_ids, *args, **kwargs)

    engine.decoder.begin = faulty  # type: ignore[method-assign]
    results: dict[str, Event] = {}
    for name, prompt in (("bad", bad), ("good", good)):
        engine.submit(prompt, GREEDY, on_event=lambda event, name=name: results.__setitem__(name, event))
    while engine.step():
        pass
    assert isinstance(results["bad"], Failed) and str(results["bad"].error) == "broken"
    assert isinstance(results["good"], Finished) and results["good"].output.token_ids == alone


def test_an_interrupt_of_generate_frees_everything(engine: Engine, tiny_folder: Path) -> None:
    llm = LLM(tiny_folder, dtype="float32", **SMALL)

    def interrupt(event: Event) -> None:
        if isinstance(event, PrefillProgress) and event.processed_tokens == 256:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        llm.generate(tiny.tokens(600), GREEDY, on_event=interrupt)
    assert not llm.engine.has_work()
    llm.engine.reset_prefix_cache()
    assert llm.engine.pool.num_free == llm.engine.pool.num_slots


# The service


def test_the_service_serves_threads(engine: Engine) -> None:
    prompts = [tiny.tokens(length, seed=length) for length in (40, 200, 333)]
    alone = [run(engine, (prompt, GREEDY))[0].token_ids for prompt in prompts]
    service = EngineService(engine)
    results: dict[int, tuple[int, ...]] = {}

    def ask(index: int) -> None:
        *_, last = service.submit(prompts[index], GREEDY)
        assert isinstance(last, Finished)
        results[index] = last.output.token_ids

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    service.close()
    assert [results[index] for index in range(3)] == alone
    with pytest.raises(RequestCancelledError):
        service.submit([5], GREEDY)


def test_freed_memory_goes_back_in_a_pause_and_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    released = []
    monkeypatch.setattr(memory, "release_freed", lambda: released.append(service.num_running))
    monkeypatch.setattr(service_module, "IDLE_S", 0.05)
    service = EngineService(engine)
    for _ in range(2):
        time.sleep(0.3)  # several pauses long
        before = len(released)
        *_, last = service.submit(tiny.tokens(60), GREEDY)
        assert isinstance(last, Finished)
        wait_until(lambda before=before: len(released) > before)
        time.sleep(0.3)
        assert released[before:] == [0]
    service.close()


def test_a_service_leaves_the_work_of_others_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "IDLE_S", 0.05)
    service = EngineService(engine)
    events: list[Event] = []
    engine.submit(tiny.tokens(60), GREEDY, on_event=events.append)
    time.sleep(0.5)  # it looked up after its pause, and is none the wiser
    assert not events and engine.has_work()
    service.close()
    while engine.has_work():
        engine.step()
    assert isinstance(events[-1], Finished | Failed)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library is not glibc")
def test_release_is_seen_by_the_system() -> None:
    """Small pieces, freed but for the last: without help glibc keeps what lies below it."""
    code = """
import ctypes, psutil
from zen_turbo.engine.memory import release_freed
own, c = psutil.Process(), ctypes.CDLL(None)
c.malloc.restype, c.malloc.argtypes, c.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
pieces = [c.malloc(4096) for _ in range(20000)]
for piece in pieces:
    ctypes.memset(piece, 1, 4096)
for piece in pieces[:-1]:
    c.free(piece)
before = own.memory_info().rss
release_freed()
print(before - own.memory_info().rss)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 60 << 20


def test_two_threads_must_not_step_one_engine(engine: Engine) -> None:
    inside, go_on = threading.Event(), threading.Event()

    def wait(event: Event) -> None:
        inside.set()
        go_on.wait()

    engine.submit(tiny.tokens(100), GREEDY, on_event=wait)
    other = threading.Thread(target=engine.step)
    other.start()
    inside.wait()
    with pytest.raises(AssertionError, match="two threads"):
        engine.step()
    go_on.set()
    other.join()
    assert engine.step(), "the first one goes on"


def test_closing_the_service_ends_what_runs(engine: Engine) -> None:
    service = EngineService(engine)
    stream = service.submit(tiny.tokens(60), SamplingParams(temperature=0.0, max_tokens=4000, ignore_eos=True))
    first = next(iter(stream))
    assert isinstance(first, PrefillProgress)
    service.close()
    *_, last = stream
    assert isinstance(last, Failed) and isinstance(last.error, RequestCancelledError)
