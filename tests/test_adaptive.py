"""The adaptive policy in the engine: where it is dense, what its result depends on and what not, and how its shares move."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from zen_turbo import LLM
from zen_turbo.attention import blocks, fidelity
from zen_turbo.attention.attend import ChunkPlan
from zen_turbo.attention.fidelity import Fidelity, Observation
from zen_turbo.attention.policies import adaptive
from zen_turbo.bench.fidelity import measured_pass
from zen_turbo.config import PRESETS
from zen_turbo.engine.engine import DENSE_TAIL_TOKENS
from zen_turbo.engine.request import Event, PrefillProgress, RequestOutput, SamplingParams
from zen_turbo.errors import ConfigurationError
from zen_turbo.models.decoder import Decoder
from zen_turbo.models.linear import Linear

GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
SMALL: dict[str, Any] = {
    "attention": "adaptive",
    "prefill_chunk_tokens": 128,
    "kv_cache_bytes": 64 << 20,
    "max_model_len": 16384,
    "dense_tokens": 256,
    "preset": "turbo",
    "linear_dtype": "full",
}
LENGTH = 1500


def make(folder: Path, **knobs: Any) -> LLM:
    return LLM(folder, **{**SMALL, **knobs})


def spied(llm: LLM, prompt: list[int]) -> tuple[RequestOutput, list[torch.Tensor]]:
    """The output, and the logits of every generated token."""
    seen: list[torch.Tensor] = []
    sample = llm.engine._sample

    def spy(request: Any, logits: torch.Tensor) -> None:
        seen.append(logits.clone())
        sample(request, logits)

    llm.engine._sample = spy  # type: ignore[method-assign]
    try:
        return llm.generate(prompt, GREEDY), seen
    finally:
        llm.engine._sample = sample  # type: ignore[method-assign]


def same(first: tuple[RequestOutput, list[torch.Tensor]], second: tuple[RequestOutput, list[torch.Tensor]]) -> bool:
    return first[0].token_ids == second[0].token_ids and all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


@pytest.fixture(params=[2048, 6], ids=["whole end", "bounded end"])
def small_windows(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Many windows within a short prompt, and a preset that leaves out what even a random model has little of; the prompt's end reads all of its
    24 pages, or six."""
    monkeypatch.setattr(fidelity, "WINDOW_TOKENS", 512)
    small = {"mass": (0.6, 0.7), "least_mass": (0.5, 0.55), "most_pages": None, "local_pages": 1, "end_pages": request.param}
    settings = {"price": 1e-3, "near_price": None, **small}
    monkeypatch.setitem(adaptive.PRESETS, "turbo", dataclasses.replace(adaptive.PRESETS["turbo"], **settings))


def test_it_leaves_pages_out_and_says_how_much_it_kept(tiny_folder: Path, small_windows: None) -> None:
    output = make(tiny_folder).generate(tiny.tokens(LENGTH), GREEDY)
    assert output.metrics.density < 0.9
    assert output.metrics.recall is not None and 0.3 < output.metrics.recall < 1
    assert output.metrics.recall_p5 is not None and 0 <= output.metrics.recall_p5 <= output.metrics.recall
    assert output.metrics.select_s > 0


def test_short_prompts_are_dense_to_the_bit(tiny_folder: Path) -> None:
    for length in (1, 100, 256, 300):
        prompt = tiny.tokens(length, seed=length)
        sparse, dense = spied(make(tiny_folder), prompt), spied(make(tiny_folder, attention="dense"), prompt)
        assert same(sparse, dense)
        assert sparse[0].metrics.density == 1 and sparse[0].metrics.recall is None


@pytest.mark.parametrize("small_windows", [48], indirect=True)
def test_all_of_the_mass_is_dense_to_the_bit(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, small_windows: None) -> None:
    monkeypatch.setattr(Fidelity, "mass", lambda self, layer: torch.ones(self._num_heads))
    prompt = tiny.tokens(LENGTH)
    sparse, dense = spied(make(tiny_folder), prompt), spied(make(tiny_folder, attention="dense"), prompt)
    assert same(sparse, dense)
    assert sparse[0].metrics.density == 1
    assert sparse[0].metrics.recall == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize(("share", "most"), [(1.0, {2: 8, 5: 20}), (0.0, {2: 2, 1: 1})], ids=["all of the mass", "by bounds alone"])
def test_the_end_of_a_prompt_reads_as_many_pages_as_it_may(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, share: float, most: dict[int, int]
) -> None:
    """Everything else is kept whole, so that what is left out is the end's: three query blocks of 24 pages."""
    monkeypatch.setattr(Fidelity, "mass", lambda self, layer: torch.ones(self._num_heads))
    monkeypatch.setattr(adaptive, "end_mass", lambda mass, settings: torch.full_like(mass, share))
    kept = {}
    for end_pages in (*most, 21, 22):
        settings = {"most_pages": None, "local_pages": 1, "end_pages": end_pages}
        monkeypatch.setitem(adaptive.PRESETS, "turbo", dataclasses.replace(adaptive.PRESETS["turbo"], **settings))
        metrics = make(tiny_folder).generate(tiny.tokens(LENGTH), GREEDY).metrics
        kept[end_pages] = round(metrics.density * 24 * 25 / 2)
    # Sinks, local pages and the diagonal come on top. The end begins in page 21, an eighth of which is two.
    bounded = {end_pages: 300 - sum(max(0, count - pages - 3) for count in (22, 23, 24)) for end_pages, pages in most.items()}
    assert kept == bounded | {21: 300 if share else 300 - sum(count - 2 - 3 for count in (22, 23, 24)), 22: 300}


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_an_end_is_measured_as_a_request_has_it(tiny_folder: Path, small_windows: None, kv_dtype: str) -> None:
    llm, prompt = make(tiny_folder, kv_dtype=kv_dtype), tiny.tokens(LENGTH)
    measured = measured_pass(llm.engine, prompt, llm.engine.new_fidelity(dense_from=LENGTH), num_rows=300)
    assert measured.end_logits is not None and measured.logits.shape == measured.end_logits.shape
    for end in (LENGTH, LENGTH - 300 + 2 * DENSE_TAIL_TOKENS, LENGTH - 300 + DENSE_TAIL_TOKENS):
        _, (first, *_) = spied(make(tiny_folder, kv_dtype=kv_dtype), prompt[:end])
        row = end - LENGTH - 1
        assert torch.equal(measured.end_logits[row], first.view(-1))
        assert not torch.equal(measured.logits[row], first.view(-1)), "without an end it reads less"


@pytest.mark.parametrize("chunk", [64, 256, 512])
def test_the_size_of_chunks_changes_nothing(tiny_folder: Path, small_windows: None, chunk: int) -> None:
    prompt = tiny.tokens(LENGTH)
    first, second = spied(make(tiny_folder), prompt), spied(make(tiny_folder, prefill_chunk_tokens=chunk), prompt)
    assert same(first, second)
    assert first[0].metrics.recall == pytest.approx(second[0].metrics.recall, rel=1e-5)  # a mean over the same samples in another order


def test_a_run_repeats_to_the_bit_on_any_number_of_threads(tiny_folder: Path, small_windows: None) -> None:
    prompt = tiny.tokens(LENGTH)
    assert same(spied(make(tiny_folder), prompt), spied(make(tiny_folder, num_threads=1), prompt))


@pytest.mark.parametrize("shared", [512, 700, 1100, LENGTH])
def test_cached_is_cold_to_the_bit(tiny_folder: Path, small_windows: None, shared: int) -> None:
    first = tiny.tokens(LENGTH)
    second = [*first[:shared], *tiny.tokens(400, seed=9)]
    warm_engine = make(tiny_folder)
    warm_engine.generate(first, GREEDY)
    warm, cold = spied(warm_engine, second), spied(make(tiny_folder), second)
    assert cold[0].cached_tokens == 0
    # Whole pages, before the rows of the first prompt that read everything.
    assert warm[0].cached_tokens == min(shared, LENGTH - DENSE_TAIL_TOKENS) // 64 * 64
    assert same(warm, cold)


def test_a_prompt_that_was_cancelled_leaves_a_prefix_that_is_cold_to_the_bit(tiny_folder: Path, small_windows: None) -> None:
    """The cached prefix ends where no chunk began: its shares must be known all the same."""
    prompt = tiny.tokens(LENGTH)
    engine = make(tiny_folder).engine

    def stop(event: Event) -> None:
        if isinstance(event, PrefillProgress) and event.processed_tokens == 1024:
            engine.abort(request_id)

    request_id = engine.submit(prompt, GREEDY, on_event=stop)
    while engine.step():
        pass
    llm = make(tiny_folder)
    llm.engine.close()
    llm.engine = engine
    warm, cold = spied(llm, prompt), spied(make(tiny_folder), prompt)
    assert warm[0].cached_tokens == 1024
    assert same(warm, cold)


def test_a_chunk_must_divide_the_window(tiny_folder: Path) -> None:
    with pytest.raises(ConfigurationError, match="must divide 8192"):
        make(tiny_folder, prefill_chunk_tokens=192)


def plan(first_position: int, num_rows: int) -> ChunkPlan:
    lists = blocks.dense_lists(first_position=first_position, num_rows=num_rows, num_heads=1, span_pages=None)
    return ChunkPlan(first_position, num_rows, (None, None, None), None, lists, 1.0)


SETTINGS = adaptive.AdaptiveSettings(price=1e-3, mass=(0.9,), least_mass=(0.6,), most_mass=0.999, end_pages=4096)


def steering(**values: Any) -> Fidelity:
    return Fidelity(SETTINGS, num_layers=2, num_heads=3, **{"dense_below": 4096, "dense_from": 100_000, **values})


@pytest.mark.parametrize(
    ("first_position", "num_rows", "expected"),
    [(0, 2048, range(0)), (2048, 4096, range(32, 64)), (4096, 2048, range(32)), (98304, 2048, range(26)), (100_352, 2048, range(0))],
)
def test_which_blocks_may_leave_pages_out(first_position: int, num_rows: int, expected: range) -> None:
    found = plan(first_position, num_rows).sparse_blocks(steering())
    assert list(found) == list(expected)


def test_rows_to_sample_do_not_depend_on_chunks() -> None:
    state = steering()
    for layer in range(3):
        whole = {8192 * 3 + row for row in state.rows_to_sample(8192 * 3, 8192, layer)}
        pieces = {start + row for start in range(8192 * 3, 8192 * 4, 1024) for row in state.rows_to_sample(start, 1024, layer)}
        assert whole == pieces and len(whole) == fidelity.samples_in(3)
    assert state.rows_to_sample(0, 4096, 0) == []
    assert all(row < 100_000 - 98_304 for layer in range(50) for row in state.rows_to_sample(98_304, 2048, layer))


def observe(state: Fidelity, layer: int, error: list[float], *, position: int = 5000) -> None:
    lse = torch.zeros(3)
    state.observe_row(Observation(position, layer, torch.tensor(error), torch.full((3,), 10.0)), lse_kept=lse - 0.1, lse_full=lse)


def test_shares_follow_what_they_cost_from_the_next_window_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adaptive, "_FARTHER", 1 << 40)  # one price at any position
    state = steering()
    state.begin_chunk(0)
    observe(state, 0, [1e-9, 0.01, 0.1])  # nothing, the price, ten times the price
    state.begin_chunk(2048)
    assert state.mass(0).tolist() == pytest.approx([0.9, 0.9, 0.9])
    state.begin_chunk(8192)
    mass = state.mass(0).tolist()
    assert mass == pytest.approx([0.6, 0.9, 1 - 0.1 * 10 ** (-1 / 2.4)]), "what costs nothing falls to the least share"
    assert state.mass(1).tolist() == pytest.approx([0.9, 0.9, 0.9]), "layers learn apart"
    state.begin_chunk(16384)
    assert state.mass(0).tolist() == pytest.approx(mass), "nothing was sampled, nothing moves"
    for window in range(3, 60):
        observe(state, 0, [0.0, 0.01, 0.1])
        state.begin_chunk(window * 8192)
    assert state.mass(0).tolist() == pytest.approx([0.6, 0.9, 0.999], abs=1e-4), "one that costs too much at any share has the most"
    for window in range(60, 200):
        observe(state, 0, [0.0, 0.01, 1e-9])
        state.begin_chunk(window * 8192)
    assert state.mass(0).tolist() == pytest.approx([0.6, 0.9, 0.6], abs=1e-4), "and what was raised comes down again"


def test_a_correction_is_no_larger_than_fourfold() -> None:
    settings = dataclasses.replace(SETTINGS, mass=(0.99,))
    learnt = adaptive.begin(1, 2, settings)
    moved = adaptive.learn(learnt, torch.tensor([[1.0, 1e-12]]), torch.tensor([[5.0, 5.0]]), 8192, dataclasses.replace(settings, most_mass=0.99999))
    assert moved.left_out[0].tolist() == pytest.approx([0.01 / 4, 0.01 * 4])


def test_a_head_without_samples_keeps_its_share() -> None:
    """Whatever bounds the shares of others: nothing is known of it."""
    learnt = adaptive.begin(2, 3, dataclasses.replace(SETTINGS, mass=(0.9, 1.0)))
    for _ in range(200):
        learnt = adaptive.learn(learnt, torch.zeros(2, 3), torch.zeros(2, 3), 8192, SETTINGS)
    assert learnt.left_out.tolist() == [pytest.approx([0.1] * 3), [0.0] * 3]


@pytest.mark.parametrize(("error_exponent", "pages_exponent"), [(1.7, 0.7), (1.2, 0.3), (3.0, 1.0)])
def test_heads_come_to_rest_at_the_price(error_exponent: float, pages_exponent: float) -> None:
    """Also heads whose laws have other exponents than the policy believes."""
    scale = torch.tensor([[0.2, 1.0, 5.0]])
    settings = dataclasses.replace(SETTINGS, most_mass=0.999999, least_mass=(0.01,))
    learnt = adaptive.begin(1, 3, settings)
    for _ in range(300):
        error, pages = scale * learnt.left_out**error_exponent, 8 * learnt.left_out**-pages_exponent
        learnt = adaptive.learn(learnt, error, pages, 8192, settings)
    assert (error / pages)[0].tolist() == pytest.approx([1e-3] * 3, rel=1e-3)


def test_the_end_leaves_out_a_ninth_but_never_more_than_other_rows_do() -> None:
    mass = torch.tensor([0.1, 0.55, 0.91, 0.998, 0.9995])
    assert torch.allclose(adaptive.end_mass(mass, SETTINGS), torch.tensor([0.9, 0.95, 0.99, 0.999, 0.9995]))
    price, worth = SETTINGS.price, 9**2.4
    left_out = torch.full((1, 1), 0.2)
    learnt = adaptive.Learnt(left_out, torch.full((1, 1), price * 30 / 0.2**2.4), torch.full((1, 1), 30.0))
    cheaper = dataclasses.replace(SETTINGS, price=price / worth, least_mass=(0.0,))
    for _ in range(3):  # a share moves by no more than fourfold
        learnt = adaptive.learn(learnt, torch.zeros(1, 1), torch.zeros(1, 1), 8192, cheaper)
    assert torch.allclose(1 - learnt.left_out, adaptive.end_mass(1 - left_out, SETTINGS)), "what a page at a two-hundredth of the price buys"
    assert 150 < worth < 250


def test_pages_are_worth_more_where_there_are_few_pairs() -> None:
    settings = dataclasses.replace(SETTINGS, price=1e-3, near_price=1e-5)
    prices = [adaptive.price_at(position, settings) for position in (0, 24576, 32768, 131072, 262144, 1048576)]
    assert prices == pytest.approx([1e-5, 1e-5, 1e-3, 1e-3, 2e-3, 8e-3])
    assert adaptive.price_at(8192, SETTINGS) == SETTINGS.price, "with one price it holds up to 128K"
    steeper = dataclasses.replace(settings, price_growth=1.5)
    assert [adaptive.price_at(position, steeper) for position in (32768, 131072, 524288)] == pytest.approx([1e-3, 1e-3, 8e-3])
    near, far = (adaptive.learn(adaptive.begin(1, 1, settings), torch.ones(1, 1), torch.full((1, 1), 4e2), at, settings) for at in (24576, 131072))
    assert 0 < float(near.left_out) < float(far.left_out)


def test_fewer_rows_are_scored_far_out_but_never_more_than_near() -> None:
    positions = (0, 131072, 262144 - 8192, 262144, 524288, 1048576 - 8192, 1 << 30)
    rows = {most: [adaptive.sample_rows_at(at, dataclasses.replace(SETTINGS, sample_rows=most)) for at in positions] for most in (32, 8, 2)}
    assert rows == {32: [32, 32, 32, 16, 8, 8, 4], 8: [8, 8, 8, 4, 4, 4, 4], 2: [2] * 7}


def test_few_samples_among_many_do_not_turn_a_share_around() -> None:
    """One window that sees a tenth of the usual error, after many that saw it whole, moves little."""
    settings = dataclasses.replace(SETTINGS, most_mass=0.9999)
    learnt, error, pages = adaptive.begin(1, 1, settings), torch.tensor([[0.03]]), torch.tensor([[5.0]])
    for _ in range(50):
        rate = (learnt.left_out / 0.1) ** 1.7
        learnt = adaptive.learn(learnt, error * rate, pages * (learnt.left_out / 0.1) ** -0.7, 8192, settings)
    before = float(learnt.left_out)
    rate = (learnt.left_out / 0.1) ** 1.7
    after = float(adaptive.learn(learnt, error * rate / 10, pages * (learnt.left_out / 0.1) ** -0.7, 8192, settings).left_out)
    assert before < after < before * 1.1


def test_the_parts_of_the_depth_begin_with_their_own_shares() -> None:
    settings = dataclasses.replace(SETTINGS, mass=(0.5, 0.9, 0.75))
    share = adaptive.begin(7, 2, settings).left_out
    assert (1 - share[:, 0]).tolist() == pytest.approx([0.5, 0.5, 0.5, 0.9, 0.9, 0.75, 0.75])
    assert torch.equal(share[:, 0], share[:, 1])


def test_what_was_learnt_goes_with_a_prefix() -> None:
    first = steering()
    for chunk in range(10):
        first.begin_chunk(chunk * 2048)
        for row in (30, 1000):
            observe(first, 1, [0.5 / (chunk + 1), 1e-3, 1e-9], position=chunk * 2048 + row)
    for pages in (1, 70, 128, 129, 200, 256):
        second, again = steering(), steering()
        second.resume([first.note(page) for page in range(pages)])
        for start in range(0, pages * 64, 64):
            again.begin_chunk(start)
            for seen in first.note(start // 64).observations:
                again.observe_row(seen, lse_kept=torch.zeros(3), lse_full=torch.zeros(3))
        for state in (second, again):
            state.begin_chunk(pages * 64)
            observe(state, 1, [0.5, 0.5, 0.5], position=pages * 64)
            state.begin_chunk(24576)
        assert torch.equal(second.mass(1), again.mass(1)), pages


def test_telemetry_counts_what_was_observed() -> None:
    state = steering()
    assert (state.density, state.recall, state.recall_p5) == (1.0, None, None)
    observe(state, 0, [0.0, 0.0, 0.0])
    assert state.recall == pytest.approx(math.exp(-0.1))
    lists = blocks.dense_lists(first_position=0, num_rows=128, num_heads=3, span_pages=None)
    state.observe_lists(lists, num_heads=3, causal_pairs=6)
    assert state.density == 0.5


@pytest.mark.parametrize("bias", [False, True])
def test_the_error_of_a_head_is_what_it_does_to_the_residual_stream(bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    found, exact = (torch.randn(3, 64, generator=generator) for _ in range(2))
    weight, residual = torch.randn(50, 192, generator=generator), torch.randn(50, generator=generator)
    offset = torch.randn(50, generator=generator) if bias else None
    errors = Decoder._head_errors(Linear(weight, offset), found, exact, residual)
    stream = residual + weight @ exact.flatten() + (offset if offset is not None else 0)
    for head in range(3):
        change = weight[:, head * 64 : (head + 1) * 64] @ (found - exact)[head]
        assert float(errors[head]) == pytest.approx(float(change.square().sum() / stream.square().sum()), rel=1e-4)


def test_a_preset_may_bound_the_pages_of_a_block(tiny_folder: Path, small_windows: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers, two bounds: no block of the sparse rows reads more than sinks, local pages, its own and the bound."""
    bounded = dataclasses.replace(adaptive.PRESETS["turbo"], mass=(0.9, 0.99), most_pages=(2, 5))
    monkeypatch.setitem(adaptive.PRESETS, "turbo", bounded)
    most: dict[int, int] = {0: 0, 1: 0}
    select = Fidelity.select

    def spy(self: Fidelity, chunk: blocks.Chunk, layer: int) -> Any:
        lists = select(self, chunk, layer)
        counts = lists.offsets.diff().view(-1, chunk.num_blocks)[:, list(chunk.sparse_blocks)]
        most[layer] = max(most[layer], *counts.flatten().tolist(), 0)
        return lists

    monkeypatch.setattr(Fidelity, "select", spy)
    make(tiny_folder).generate(tiny.tokens(LENGTH), GREEDY)
    assert most == {0: 1 + 1 + 1 + 2, 1: 1 + 1 + 1 + 5}


def test_a_share_may_fall_further_where_pages_have_their_full_price() -> None:
    settings = dataclasses.replace(SETTINGS, far_least_mass=(0.5,))
    needless = torch.full((1, 1), 1e-12)
    shares = {}
    for position in (8192, 24576, 32768):
        learnt = adaptive.begin(1, 1, settings)
        for _ in range(3):
            learnt = adaptive.learn(learnt, needless, torch.ones(1, 1), position, settings)
        shares[position] = 1 - float(learnt.left_out)
    assert shares == pytest.approx({8192: 0.6, 24576: 0.6, 32768: 0.5})
    fixed = adaptive.settings_of("faithful", 0.9)
    assert fixed.least_mass == (0.9,) and fixed.far_least_mass is None, "one share everywhere"


def test_presets_pay_less_for_more() -> None:
    assert tuple(adaptive.PRESETS) == PRESETS
    presets = list(adaptive.PRESETS.values())
    prices = [settings.price for settings in presets]
    assert prices == sorted(prices, reverse=True)
    near = [settings.near_price for settings in presets if settings.near_price is not None]
    assert len(near) == len(presets) and near == sorted(near, reverse=True)
    assert all(settings.near_price is not None and settings.near_price < settings.price for settings in presets)
    for lower, higher in itertools.pairwise(presets):
        assert all(a < b for a, b in zip(lower.mass, higher.mass, strict=True))
        assert all(a < b for a, b in zip(lower.least_mass, higher.far_least_mass or higher.least_mass, strict=True))
    assert adaptive.settings_of("turbo", None) is adaptive.PRESETS["turbo"]
    fixed = adaptive.settings_of("turbo", 0.9)
    begun = adaptive.begin(1, 1, fixed)
    after = adaptive.learn(begun, torch.ones(1, 1), torch.ones(1, 1), 8192, fixed)
    assert torch.equal(after.left_out, begun.left_out), "a share that was asked for stays"
    whole = adaptive.settings_of("turbo", 1.0)
    begun = adaptive.begin(1, 1, whole)
    assert float(adaptive.learn(begun, torch.zeros(1, 1), torch.ones(1, 1), 8192, whole).left_out) == 0, "and so does all of it"
