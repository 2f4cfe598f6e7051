"""Dual Chunk Attention's positions: the published distances, the invariants of the geometry, and the temperature."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zen_turbo.attention import dca
from zen_turbo.attention.dca import DualChunk
from zen_turbo.errors import ConfigurationError

TINY = DualChunk(chunk_size=8, local_size=2, trained_window=8, page_tokens=1)  # L = 6

# Distances from query i to keys 0..i, as the published code clamps them.
PUBLISHED_DISTANCES = {
    5: [5, 4, 3, 2, 1, 0],
    8: [8, 7, 6, 5, 4, 3, 2, 1, 0],
    9: [8, 7, 6, 5, 4, 3, 3, 2, 1, 0],
    13: [8, 7, 6, 5, 4, 3, 7, 6, 5, 4, 3, 2, 1, 0],
    19: [8, 7, 6, 5, 4, 3, 8, 7, 6, 5, 4, 3, 7, 6, 5, 4, 3, 2, 1, 0],
}


def distances(query: int, geometry: DualChunk) -> list[int]:
    """From one query to every key at or before it, by the functions under test."""
    keys = torch.arange(query + 1)
    at = torch.tensor([query])
    variants = dca.query_positions(at, geometry)
    spans = dca.span_of(at, geometry) - dca.span_of(keys, geometry)
    chosen = torch.cat([variants[min(int(span), 2)] for span in spans])
    return (chosen - dca.key_positions(keys, geometry)).tolist()


@pytest.mark.parametrize("query", PUBLISHED_DISTANCES)
def test_distances_are_those_of_the_published_code(query: int) -> None:
    assert distances(query, TINY) == PUBLISHED_DISTANCES[query]


def test_the_positions_of_a_published_checkpoint() -> None:
    geometry = DualChunk(chunk_size=262_144, local_size=8192, trained_window=262_144)
    assert geometry.span == 253_952
    positions = torch.tensor([0, 253_951, 253_952, 262_143, 262_144, 262_145, 1_000_000])
    assert dca.span_of(positions, geometry).tolist() == [0, 0, 1, 1, 1, 1, 3]
    assert dca.key_positions(positions, geometry).tolist() == [0, 253_951, 0, 8191, 8192, 8193, 238_144]
    variants = dca.query_positions(positions, geometry)
    assert variants.intra.tolist() == dca.key_positions(positions, geometry).tolist()
    assert variants.succ.tolist() == [253_952, 262_144, 253_952, 262_143, 262_144, 262_144, 262_144]
    assert variants.inter.tolist() == [262_144] * len(positions)
    assert all(variant.dtype == torch.int64 for variant in variants)


@st.composite
def geometries(draw: st.DrawFn) -> DualChunk:
    span = draw(st.integers(2, 40))
    local = draw(st.integers(1, span))
    return DualChunk(chunk_size=span + local, local_size=local, trained_window=span + local, page_tokens=1)


@given(geometries(), st.integers(0, 400))
def test_distances_are_true_where_they_can_be_and_never_beyond_the_chunk(geometry: DualChunk, query: int) -> None:
    found = distances(query, geometry)
    true = list(range(query, -1, -1))
    if query < geometry.chunk_size:
        assert found == true
    assert all(0 <= distance <= geometry.chunk_size for distance in found)
    # The nearest keys: at least local_size of them always lie at their true distance.
    near = min(query + 1, geometry.local_size + 1)
    assert found[-near:] == true[-near:]


@given(geometries(), st.integers(0, 400))
def test_scoring_positions_are_continuous(geometry: DualChunk, query: int) -> None:
    at = torch.tensor([query])
    scoring, clamped = dca.scoring_positions(at, geometry), dca.query_positions(at, geometry)
    keys = torch.arange(query + 1)
    near = dca.span_of(keys, geometry) >= query // geometry.span - 1
    variant = torch.where(dca.span_of(keys, geometry) == query // geometry.span, scoring.intra, scoring.succ)
    assert torch.equal((variant - dca.key_positions(keys, geometry))[near], (query - keys)[near])
    assert int(scoring.inter) == query % geometry.span + geometry.chunk_size
    assert int(scoring.intra) == int(clamped.intra)
    assert int(clamped.succ) == min(int(scoring.succ), geometry.chunk_size)


@pytest.mark.parametrize(
    ("chunk_size", "local_size", "words"),
    [
        (32_768, 8191, "must be a multiple of 64"),
        (32_768, 8200, "must be a multiple of 64"),
        (256, 192, "third span"),
        (64, 64, "must lie between"),
        (64, 128, "must lie between"),
        (64, 0, "must lie between"),
        (64, -64, "must lie between"),
    ],
)
def test_impossible_geometry_is_refused_with_its_numbers(chunk_size: int, local_size: int, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words) as caught:
        DualChunk(chunk_size=chunk_size, local_size=local_size, trained_window=64)
    assert str(local_size) in str(caught.value)
    assert str(chunk_size) in str(caught.value)
    assert caught.value.code == "invalid_configuration"


def test_a_trained_window_must_be_positive() -> None:
    with pytest.raises(ConfigurationError, match="trained window"):
        DualChunk(chunk_size=128, local_size=64, trained_window=0)


@pytest.mark.parametrize(("window", "local"), [(32_768, 8192), (8192, 2048), (2048, 512), (40_960, 10_240), (131_072, 32_768)])
def test_default_geometry(window: int, local: int) -> None:
    assert dca.default_for(window) == DualChunk(chunk_size=window, local_size=local, trained_window=window)


@pytest.mark.parametrize("window", [0, 64, 1000, 1_010_000, 85, 32_767])  # 85 - 85 // 4 = 64 would fit, but only by rounding
def test_no_default_geometry_is_an_error_that_says_what_to_set(window: int) -> None:
    with pytest.raises(ConfigurationError) as caught:
        dca.default_for(window)
    assert str(window) in str(caught.value)


def test_temperature_is_one_inside_the_window_and_grows_after_it() -> None:
    window = 32_768
    inside = dca.temperature(torch.arange(window), window)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, torch.ones(window))
    after = dca.temperature(torch.arange(window, 4 * window), window)
    assert (after.diff() >= 0).all()
    assert float(after[0]) > 1
    position = torch.tensor([1_010_000 - 1])
    assert float(dca.temperature(position, 262_144)) == pytest.approx((0.1 * math.log(1_010_000 / 262_144) + 1) ** 2, rel=1e-6)
    assert float(dca.temperature(position, 262_144)) == pytest.approx(1.288, abs=5e-4)


@given(st.integers(1, 2_000_000), st.integers(1, 300_000))
def test_the_last_query_has_the_temperature_of_the_published_rule(num_tokens: int, window: int) -> None:
    own = float(dca.temperature(torch.tensor([num_tokens - 1]), window))
    assert own == pytest.approx(dca.original_temperature(num_tokens, window), rel=1e-6)
