"""Choosing tokens, stop strings, and the pool of pages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zen_turbo.engine.logprobs import PromptLogprobs, token_logprobs
from zen_turbo.engine.request import SamplingParams
from zen_turbo.engine.sampler import Sampler
from zen_turbo.engine.stop import StopMatcher
from zen_turbo.errors import InsufficientMemoryError
from zen_turbo.kv.geometry import PageGeometry
from zen_turbo.kv.pool import PagePool
from zen_turbo.kv.sequence import SequenceCache

LOGITS = torch.tensor([1.0, 3.0, 2.0, 0.0, 3.0])


def probabilities(**settings: float | int) -> list[float]:
    return Sampler(SamplingParams(**settings)).probabilities(LOGITS).tolist()  # type: ignore[arg-type]


def test_greedy_takes_the_first_of_equals() -> None:
    assert Sampler(SamplingParams(temperature=0.0)).sample(LOGITS) == 1


def test_temperature_divides_logits() -> None:
    assert probabilities(temperature=2.0) == pytest.approx(torch.softmax(LOGITS.double() / 2, -1).tolist())


def test_no_temperature_is_too_small() -> None:
    assert probabilities(temperature=5e-324) == probabilities(temperature=1e-9) == [0, 0.5, 0, 0, 0.5]


def test_top_k_keeps_k() -> None:
    kept = probabilities(top_k=3)
    assert [p > 0 for p in kept] == [False, True, True, False, True] and sum(kept) == pytest.approx(1)
    assert [p > 0 for p in probabilities(top_k=1)] == [False, True, False, False, False]


def test_top_p_keeps_the_token_that_crosses_it() -> None:
    # exp of the logits: 20.1 twice, 7.4, 2.7, 1: shares .392 .392 .144 .053 .020
    assert [p > 0 for p in probabilities(top_p=0.39)] == [False, True, False, False, False]
    assert [p > 0 for p in probabilities(top_p=0.79)] == [False, True, True, False, True]


def test_min_p_is_relative_to_the_likeliest() -> None:
    assert [p > 0 for p in probabilities(min_p=0.3)] == [False, True, True, False, True]
    assert [p > 0 for p in probabilities(min_p=0.4)] == [False, True, False, False, True]


def test_samples_follow_the_distribution() -> None:
    sampler = Sampler(SamplingParams(seed=0))
    counts = torch.bincount(torch.tensor([sampler.sample(LOGITS) for _ in range(4000)]), minlength=5) / 4000
    assert float((counts - torch.softmax(LOGITS, -1)).abs().max()) < 0.03


def adjusted(sampled: list[int], **settings: Any) -> list[float]:
    """The logits for the token after ``sampled``, which is forced by a bias that is then taken back."""
    sampler = Sampler(SamplingParams(temperature=0.0, **settings), prompt_token_ids=[3, 3, 0], end_token_ids=[1])
    for token in sampled:
        assert sampler.sample(torch.full((5,), -50.0).index_fill(0, torch.tensor([token]), 50.0)) == token
    return sampler.adjusted(LOGITS).tolist()


def test_presence_and_frequency_count_the_answer_only() -> None:
    assert adjusted([], presence_penalty=1.5, frequency_penalty=0.5) == LOGITS.tolist()
    assert adjusted([4, 2, 4], presence_penalty=1.5) == [1.0, 3.0, 0.5, 0.0, 1.5]
    assert adjusted([4, 2, 4], frequency_penalty=0.5) == [1.0, 3.0, 1.5, 0.0, 2.0]
    assert adjusted([4, 2, 4], presence_penalty=-1, frequency_penalty=0.5) == [1.0, 3.0, 2.5, 0.0, 3.0]


def test_repetition_counts_prompt_and_answer_and_moves_both_signs_down() -> None:
    assert adjusted([4], repetition_penalty=2.0) == [0.5, 3.0, 2.0, 0.0, 1.5]
    sampler = Sampler(SamplingParams(repetition_penalty=2.0), prompt_token_ids=[0])
    assert sampler.adjusted(torch.tensor([-1.0, -1.0])).tolist() == [-2.0, -1.0]


def test_a_bias_is_added_and_logits_are_left_as_they_are() -> None:
    before = LOGITS.clone()
    assert adjusted([], logit_bias={0: 2.5, 3: -100}) == [3.5, 3.0, 2.0, -100.0, 3.0]
    assert torch.equal(before, LOGITS)


def test_no_end_token_before_min_tokens() -> None:
    assert adjusted([4], min_tokens=2) == [1.0, float("-inf"), 2.0, 0.0, 3.0]
    assert adjusted([4, 4], min_tokens=2) == LOGITS.tolist()


def test_logprobs_are_of_the_model_and_name_the_token() -> None:
    expected = torch.log_softmax(LOGITS.double(), -1).tolist()
    value = token_logprobs(LOGITS, 2, 3)
    assert (value.token_id, value.logprob) == (2, pytest.approx(expected[2]))
    assert {token for token, _ in value.top[:2]} == {1, 4} and value.top[2][0] == 2
    assert [logprob for _, logprob in value.top] == pytest.approx([expected[1], expected[4], expected[2]])
    assert token_logprobs(LOGITS, 2, 0).top == () and len(token_logprobs(LOGITS, 2, 20).top) == 5


@given(st.lists(st.integers(1, 4), min_size=1, max_size=6), st.integers(0, 3))
def test_prompt_logprobs_in_any_tiles(sizes: list[int], top: int) -> None:
    total = sum(sizes)
    generator = torch.Generator().manual_seed(total)
    tokens = torch.randint(7, (total,), generator=generator).tolist()
    logits = torch.randn((total, 7), generator=generator)
    gathered, at = PromptLogprobs(tokens, top), 0
    for size in sizes:
        gathered.add(at, logits[at : at + size])
        at += size
    expected = [token_logprobs(logits[row], tokens[row + 1], top) for row in range(total - 1)]
    found = gathered.result()
    assert [value.token_id for value in found] == tokens[1:]
    assert [value.logprob for value in found] == pytest.approx([value.logprob for value in expected], abs=1e-5)
    assert [[token for token, _ in value.top] for value in found] == [[token for token, _ in value.top] for value in expected]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_an_error(value: float) -> None:
    for temperature in (0.0, 1.0):
        with pytest.raises(FloatingPointError):
            Sampler(SamplingParams(temperature=temperature)).sample(torch.tensor([0.0, value]))


@given(st.text("ab<|>", max_size=30), st.lists(st.text("ab<|>", min_size=1, max_size=5), min_size=1, max_size=3), st.lists(st.integers(1, 4)))
def test_stop_strings_in_any_portions(text: str, stops: list[str], sizes: list[int]) -> None:
    """However the text arrives, what is shown ends before the first stop string, and nothing is shown too early."""
    matcher = StopMatcher(tuple(stops))
    shown, stopped, at = "", False, 0
    for size in [*sizes, *[1] * len(text)]:
        piece, stopped = matcher.push(text[at : at + size])
        shown += piece
        at += size
        if stopped or at >= len(text):
            break
    if not stopped:
        shown += matcher.flush()
    # The stop string that is complete first wins; of several, the one that begins first.
    for end in range(len(text) + 1):
        begins = [text[:end].find(stop) for stop in stops if stop in text[:end]]
        if begins:
            break
    else:
        assert not stopped and shown == text
        return
    assert stopped
    assert text.startswith(shown) and any(text[len(shown) :].startswith(stop) for stop in stops)
    assert not any(stop in shown for stop in stops)


def test_a_stop_string_may_be_shown() -> None:
    matcher = StopMatcher(("<end>", "end"), include=True)
    assert [matcher.push("some <en"), matcher.push("d> more")] == [("some ", False), ("<end>", True)]


GEOMETRY = PageGeometry(num_layers=2, num_key_value_heads=2, head_dim=64, dtype=torch.bfloat16)


def test_sizes() -> None:
    assert GEOMETRY.page_bytes == 2 * 64 * 64 * 2
    assert GEOMETRY.slot_bytes == 4 * GEOMETRY.page_bytes
    assert [GEOMETRY.bytes_for(tokens) // GEOMETRY.slot_bytes for tokens in (0, 1, 64, 65)] == [0, 1, 1, 2]


@given(st.lists(st.tuples(st.sampled_from("reserve adopt release".split()), st.integers(0, 5), st.integers(0, 12))))
def test_slots_are_never_lost_or_shared_by_mistake(steps: list[tuple[str, int, int]]) -> None:
    """Any history of sequences: every slot is free or owned, and a slot of two sequences holds the same page of both."""
    pool = PagePool(GEOMETRY, 24)
    sequences = [SequenceCache(pool) for _ in range(6)]
    for action, index, pages in steps:
        cache = sequences[index]
        if action == "reserve":
            before = cache.slots
            try:
                cache.reserve(64 * pages)
            except InsufficientMemoryError:
                assert cache.slots == before
            else:
                cache.commit(max(cache.num_tokens, 64 * len(cache.slots)))
        elif action == "adopt":
            sequences[(index + 1) % 6].release()
            sequences[(index + 1) % 6].adopt(cache.slots[: min(pages, cache.num_tokens // 64)])
        else:
            cache.release()
    owned = {slot for cache in sequences for slot in cache.slots}
    assert len(owned) + pool.num_free == pool.num_slots
    for cache in sequences:
        assert len(set(cache.slots)) == len(cache.slots)
        cache.release()
    assert pool.num_free == pool.num_slots
    pool.close()
