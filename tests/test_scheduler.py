"""Who works next: order, fairness, admission; and on a tiny model, that neither company nor interruptions change an answer."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from zen_turbo import LLM
from zen_turbo.engine import engine as engine_module
from zen_turbo.engine.engine import Engine
from zen_turbo.engine.request import Event, Failed, Finished, PrefillProgress, RequestOutput, SamplingParams, TokenDelta
from zen_turbo.engine.scheduler import MOST_PASSED, OLDEST_EVERY, Admission, Plan, Scheduler
from zen_turbo.errors import InvalidRequestError

GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
SMALL: dict[str, Any] = {"prefill_chunk_tokens": 128, "kv_cache_bytes": 32 << 20, "max_model_len": 4096}


@dataclass(eq=False)
class Job:
    unread_tokens: int
    answer_tokens: int = 0
    outcomes: list[Admission] = field(default_factory=list)

    def admit(self) -> Admission:
        return self.outcomes.pop(0) if self.outcomes else Admission.ADMITTED


def plan(scheduler: Scheduler[Job]) -> Plan[Job] | None:
    return scheduler.plan(lambda job: job.admit())


def work(scheduler: Scheduler[Job], unit: int = 1) -> Plan[Job] | None:
    """One unit, done."""
    found = plan(scheduler)
    if found is None:
        return None
    for job in found.decodes:
        job.answer_tokens -= 1
        if job.answer_tokens <= 0:
            scheduler.remove(job)
    if found.prefill is not None:
        found.prefill.unread_tokens -= unit
        if found.prefill.unread_tokens <= 0:
            scheduler.answer(found.prefill)
    return found


def test_short_prompts_go_before_long_ones_but_for_the_share_of_the_oldest() -> None:
    scheduler: Scheduler[Job] = Scheduler(max_running=8)
    book, question = Job(1000), Job(40)
    scheduler.add(book)
    assert [work(scheduler).prefill for _ in range(3)] == [book] * 3  # type: ignore[union-attr]
    scheduler.add(question)
    turns = [work(scheduler).prefill for _ in range(40)]  # type: ignore[union-attr]
    assert turns.count(book) == 40 // OLDEST_EVERY
    assert all(book in turns[at : at + OLDEST_EVERY] for at in range(40 - OLDEST_EVERY))


def test_the_oldest_is_read_however_much_arrives() -> None:
    scheduler: Scheduler[Job] = Scheduler(max_running=8)
    book = Job(200)
    scheduler.add(book)
    for _ in range(200 * OLDEST_EVERY):
        scheduler.add(Job(1, answer_tokens=1))
        work(scheduler)
    assert book.unread_tokens <= 0


def test_every_answer_gets_a_token_in_every_plan() -> None:
    scheduler: Scheduler[Job] = Scheduler(max_running=8)
    answering = [Job(1, answer_tokens=50) for _ in range(3)]
    for job in answering:
        scheduler.add(job)
    for _ in answering:
        work(scheduler)
    scheduler.add(Job(10))
    for _ in range(5):
        found = work(scheduler)
        assert found is not None and found.decodes == tuple(answering) and found.prefill is not None


def test_one_that_finds_no_memory_lets_others_pass_only_so_often() -> None:
    scheduler: Scheduler[Job] = Scheduler(max_running=100)
    large = Job(5, outcomes=[Admission.NO_MEMORY] * 1000)
    scheduler.add(large)
    small = [Job(1) for _ in range(MOST_PASSED + 10)]
    for job in small:
        scheduler.add(job)
    plan(scheduler)
    assert set(scheduler.prefilling) == set(small[:MOST_PASSED])
    large.outcomes.clear()
    plan(scheduler)
    assert set(scheduler.prefilling) == {large, *small}


def test_one_that_is_better_off_waiting_blocks_nobody() -> None:
    scheduler: Scheduler[Job] = Scheduler(max_running=100)
    twin = Job(5, outcomes=[Admission.LATER] * 1000)
    others = [Job(1) for _ in range(2 * MOST_PASSED)]
    for job in (twin, *others):
        scheduler.add(job)
    plan(scheduler)
    assert set(scheduler.prefilling) == set(others)


def test_random_work_always_ends() -> None:
    """Arrivals, refusals, removals: every job that is not removed is done, and the number running is bounded."""
    chance = random.Random(1)
    for _ in range(50):
        scheduler: Scheduler[Job] = Scheduler(max_running=chance.randint(1, 5))
        limit = scheduler._max_running
        jobs = []
        for _ in range(200):
            if chance.random() < 0.3:
                outcomes = chance.choices([Admission.NO_MEMORY, Admission.LATER], k=chance.randint(0, 3))
                jobs.append(Job(chance.randint(1, 20), chance.randint(1, 5), outcomes))
                scheduler.add(jobs[-1])
            if jobs and chance.random() < 0.05:
                gone = chance.choice(jobs)
                scheduler.remove(gone)
                gone.unread_tokens = gone.answer_tokens = 0
            work(scheduler, unit=chance.randint(1, 4))
            assert scheduler.num_running <= limit
        for _ in range(10_000):
            if not list(scheduler):
                break
            work(scheduler)
        assert not list(scheduler)
        assert all(job.unread_tokens <= 0 and job.answer_tokens <= 0 for job in jobs)


# On a tiny model.


@pytest.fixture
def layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "PREFILL_QUANTUM_S", 0.0)


def finish(engine: Engine, **prompts: list[int]) -> dict[str, RequestOutput]:
    """All at once."""
    last: dict[str, Event] = {}
    for name, prompt in prompts.items():
        engine.submit(prompt, GREEDY, on_event=lambda event, name=name: last.__setitem__(name, event))
    while engine.step():
        pass
    outputs = {}
    for name, event in last.items():
        assert isinstance(event, Finished), event
        outputs[name] = event.output
    return outputs


@pytest.mark.parametrize("attention", ["dense", "adaptive"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_company_and_interruptions_change_no_answer(tiny_folder: Path, dtype: str, attention: str, layer_by_layer: None) -> None:
    knobs = {"dtype": dtype, "attention": attention, "dense_tokens": 128, "decode_dense_tokens": 256, "decode_pages": 2}
    prompts = {f"p{length}": tiny.tokens(length, seed=length) for length in (1000, 70, 513, 300, 64)}
    alone = {name: finish(LLM(tiny_folder, **SMALL, **knobs).engine, **{name: prompt})[name].token_ids for name, prompt in prompts.items()}
    together = finish(LLM(tiny_folder, **SMALL, **knobs).engine, **prompts)
    assert {name: output.token_ids for name, output in together.items()} == alone


def test_a_row_has_the_same_bits_whoever_shares_its_batch(tiny_folder: Path) -> None:
    """In bfloat16; what other libraries than oneDNN do to single rows is not ours to say."""
    engine = LLM(tiny_folder, **SMALL).engine
    prompts = [tiny.tokens(length, seed=length) for length in (130, 200, 77)]

    def rows(batches: list[list[list[int]]]) -> list[torch.Tensor]:
        seen: list[torch.Tensor] = []
        decode = engine.decoder.decode_tokens

        def spy(tokens: Any) -> torch.Tensor:
            seen.extend(decode(tokens))
            return decode(tokens)

        engine.decoder.decode_tokens = spy  # type: ignore[method-assign]
        for batch in batches:
            engine.reset_prefix_cache()
            for prompt in batch:
                engine.submit(prompt, SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True), on_event=lambda event: None)
            while engine.step():
                pass
        engine.decoder.decode_tokens = decode  # type: ignore[method-assign]
        return seen

    apart, together = rows([[prompt] for prompt in prompts]), rows([prompts])
    assert len(apart) == len(together) == 3
    assert all(any(torch.equal(row, other) for other in together) for row in apart)


def test_a_short_question_is_answered_while_a_book_is_read(tiny_folder: Path, layer_by_layer: None) -> None:
    engine = LLM(tiny_folder, dtype="float32", **SMALL).engine
    order: list[str] = []
    engine.submit(tiny.tokens(3000), GREEDY, on_event=lambda event: order.append("book") if isinstance(event, Finished) else None)
    for _ in range(3):
        engine.step()
    engine.submit(tiny.tokens(50, seed=1), GREEDY, on_event=lambda event: order.append("question") if isinstance(event, Finished) else None)
    chunks = 0
    while engine.step():
        chunks += not order
    assert order == ["question", "book"]
    assert chunks <= OLDEST_EVERY / (OLDEST_EVERY - 1) * 2 + 2 + GREEDY.max_tokens, "layers of the question, and tokens of its answer"


def test_two_questions_about_one_document_read_it_once(tiny_folder: Path, layer_by_layer: None) -> None:
    document = tiny.tokens(1000)
    for attention, found in (("dense", 896), ("adaptive", 768)):  # the last pages before an end that reads everything are not for others
        engine = LLM(tiny_folder, attention=attention, dense_tokens=128, **SMALL).engine
        outputs = finish(engine, **{name: [*document, *tiny.tokens(40, seed=seed)] for name, seed in (("first", 1), ("second", 2), ("twin", 1))})
        # The second one starts when less than half of what it would have to compute is still to come from the first.
        assert [outputs[name].cached_tokens for name in ("first", "second", "twin")] == [0, found, 1024]
        assert outputs["twin"].token_ids == outputs["first"].token_ids


def test_one_that_waits_for_a_twin_goes_on_when_the_twin_leaves(tiny_folder: Path, layer_by_layer: None) -> None:
    engine = LLM(tiny_folder, dtype="float32", **SMALL).engine
    prompt = tiny.tokens(900)
    events: dict[str, list[Event]] = {"first": [], "twin": []}
    first = engine.submit(prompt, GREEDY, on_event=events["first"].append)
    engine.submit(prompt, GREEDY, on_event=events["twin"].append)
    for _ in range(6):
        engine.step()
    assert not events["twin"]
    engine.abort(first)
    while engine.step():
        pass
    ends = {name: [event for event in seen if isinstance(event, Finished | Failed)] for name, seen in events.items()}
    assert [len(seen) for seen in ends.values()] == [1, 1]
    twin = ends["twin"][0]
    assert isinstance(twin, Finished) and twin.output.finish_reason == "length" and twin.output.cached_tokens > 0


def test_an_abort_reaches_one_that_waits(tiny_folder: Path) -> None:
    engine = LLM(tiny_folder, dtype="float32", max_num_seqs=1, **SMALL).engine
    events: list[Event] = []
    engine.submit(tiny.tokens(500), GREEDY, request_id="mine", on_event=lambda event: None)
    with pytest.raises(InvalidRequestError, match="mine"):
        engine.submit(tiny.tokens(500), GREEDY, request_id="mine", on_event=lambda event: None)
    engine.step()
    waiting = engine.submit(tiny.tokens(70, seed=2), GREEDY, on_event=events.append)
    engine.step()
    assert (engine.num_waiting, engine.num_running) == (1, 1)
    assert engine.abort(waiting)
    engine.step()
    (event,) = events
    assert isinstance(event, Finished) and event.output.finish_reason == "abort"
    while engine.step():
        pass
    assert not engine.has_work()


def test_random_arrivals_aborts_and_little_memory_leave_nothing_behind(tiny_folder: Path, layer_by_layer: None) -> None:
    """Every request ends in exactly one of finished, aborted, failed; a finished one has the answer it has alone; no page is lost."""
    chance = random.Random(7)
    engine = LLM(tiny_folder, **{**SMALL, "kv_cache_bytes": 24 * 64 * 2 * 2 * 2 * 64 * 2}).engine
    alone = LLM(tiny_folder, **SMALL).engine
    documents = [tiny.tokens(length, seed=seed) for length in (64, 200, 700) for seed in range(2)]
    prompts = [[*documents[n % 6], *tiny.tokens(chance.randint(1, 90), seed=n)] for n in range(12)]
    expected = [finish(alone, only=prompt)["only"].token_ids for prompt in prompts]
    ended: list[tuple[int, list[Event]]] = []
    ids = []
    for _ in range(400):
        if chance.random() < 0.15:
            which, events = chance.randrange(len(prompts)), []
            ids.append(engine.submit(prompts[which], GREEDY, on_event=events.append))
            ended.append((which, events))
        if ids and chance.random() < 0.05:
            engine.abort(chance.choice(ids))
        engine.step()
    while engine.step():
        pass
    reasons = set()
    for which, events in ended:
        (last,) = [event for event in events if isinstance(event, Finished | Failed)]
        assert last is events[-1] and isinstance(last, Finished)
        reasons.add(last.output.finish_reason)
        if last.output.finish_reason == "length":
            assert last.output.token_ids == expected[which]
        progress = [event.processed_tokens for event in events if isinstance(event, PrefillProgress)]
        assert progress == sorted(progress)
        assert sum(len(event.token_ids) for event in events if isinstance(event, TokenDelta)) == len(last.output.token_ids)
    assert reasons == {"length", "abort"}
    assert not engine.has_work()
    engine.pool.verify([engine.reuse.prefixes.slots])
    engine.reset_prefix_cache()
    assert engine.pool.num_free == engine.pool.num_slots
