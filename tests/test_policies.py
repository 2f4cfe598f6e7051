"""The published sparse methods on our kernels: with everything kept they are dense, they keep what they should, and they work chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny
import torch
from test_kernels import make_view
from test_select import random_qkv, store, with_summaries

from zen_turbo import LLM
from zen_turbo.attention import blocks, reference
from zen_turbo.attention.blocks import Chunk
from zen_turbo.attention.fidelity import Select
from zen_turbo.attention.policies import adaptive, flexprefill, minference, tri_shape, xattention
from zen_turbo.attention.selection import policy_of
from zen_turbo.config import ATTENTION_POLICIES
from zen_turbo.engine.request import SamplingParams
from zen_turbo.errors import UnsupportedModelError
from zen_turbo.kernels import BlockLists

FIRST, ROWS, HEADS, KV_HEADS, SPAN = 24 * 64, 200, 4, 2, 10
NAMES = tuple(name for name in ATTENTION_POLICIES if name != "dense")


class Made(NamedTuple):
    chunk: Chunk
    keys: torch.Tensor  # [tokens, kv heads, head_dim], as stored


def make(*, span: int | None = SPAN, dtype: torch.dtype = torch.bfloat16, edit: Callable[[torch.Tensor], None] = lambda qkv: None) -> Made:
    length = FIRST + ROWS
    qkv = random_qkv(length, HEADS, KV_HEADS, 64, dtype)
    edit(qkv)
    view = with_summaries(make_view(-(-length // 64), KV_HEADS, 64, dtype), 64)
    q = store(qkv, view, heads=HEADS)[FIRST:].contiguous()
    other = [torch.roll(q, shift, dims=2).contiguous() for shift in (1, 2)]  # any other rotations
    chunk = Chunk(
        queries=(q, *other) if span else (q, None, None),
        kv=view,
        first_position=FIRST,
        scale=0.125,
        span_pages=span,
        logit_factor=1 + torch.rand(ROWS, generator=torch.Generator().manual_seed(5)),
        sparse_blocks=range(4),
    )
    return Made(chunk, qkv[:, HEADS : HEADS + KV_HEADS])


def everything(name: str) -> Select:
    """The policy with settings that keep all."""
    policies: dict[str, Select] = {
        "adaptive": lambda chunk, layer: adaptive.select(chunk, layer, 1, torch.ones(HEADS), adaptive.PRESETS["balanced"], window=0),
        "minference": lambda chunk, layer: minference.select(chunk, layer, minference.MinferenceSettings(verticals=10**6, slashes=10**6)),
        "flexprefill": lambda chunk, layer: flexprefill.select(chunk, flexprefill.FlexPrefillSettings(gamma=1.0)),
        "xattention": lambda chunk, layer: xattention.select(chunk, xattention.XAttentionSettings(threshold=1.0)),
        "tri_shape": lambda chunk, layer: tri_shape.select(chunk, tri_shape.TriShapeSettings(local_pages=1000)),
    }
    return policies[name]


def usual(name: str) -> Select:
    policy = policy_of(name, preset="turbo", mass=None, sparse_attention=None)
    if isinstance(policy, adaptive.AdaptiveSettings):
        settings = policy
        return lambda chunk, layer: adaptive.select(chunk, layer, 1, torch.full((HEADS,), settings.mass[0]), settings, window=0)
    return policy


def nested(lists: BlockLists) -> reference.Lists:
    return reference.unpack_lists(lists.offsets, lists.entries, num_blocks=4)


@pytest.mark.parametrize("span", [None, SPAN])
@pytest.mark.parametrize("name", NAMES)
def test_everything_kept_is_dense(name: str, span: int | None) -> None:
    made = make(span=span)
    lists = everything(name)(made.chunk, 0)
    dense = blocks.dense_lists(first_position=FIRST, num_rows=ROWS, num_heads=HEADS, span_pages=span)
    assert nested(lists) == list(nested(dense)) * (HEADS // lists.heads_per_list)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_kept_is_causal_sorted_and_has_the_diagonal(name: str) -> None:
    made = make()
    lists = usual(name)(made.chunk, 0)
    for blocks_of_list in nested(lists):
        for block, pairs in enumerate(blocks_of_list):
            pages = [page for page, _ in pairs]
            assert pages == sorted(set(pages)) and pages[-1] == FIRST // 64 + block and pages[0] == 0
            assert all(variant == min((FIRST // 64 + block) // SPAN - page // SPAN, 2) for page, variant in pairs)


@pytest.mark.parametrize("name", NAMES)
def test_blocks_that_must_read_everything_do(name: str) -> None:
    made = make()
    chunk = Chunk(**{**vars(made.chunk), "sparse_blocks": range(1, 3)})
    for blocks_of_list in nested(usual(name)(chunk, 0)):
        assert [len(blocks_of_list[block]) for block in (0, 3)] == [FIRST // 64 + 1, FIRST // 64 + 4]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_stored_keys_are_read_back(dtype: torch.dtype) -> None:
    made = make(dtype=dtype)
    for head in range(KV_HEADS):
        keys = made.chunk.keys(head)
        assert torch.equal(keys[: FIRST + ROWS], made.keys[:, head].float())
        assert not keys[FIRST + ROWS :].any()


@pytest.mark.parametrize("span", [None, SPAN])
def test_logits_are_those_of_the_reference(span: int | None) -> None:
    chunk, keys = make(span=span, dtype=torch.float32)
    rows = torch.arange(128, 192)
    found = chunk.logits(rows, 3, chunk.keys(1))
    for page in range(FIRST // 64 + 3):
        variant = 0 if span is None else min((FIRST // 64 + 2) // span - page // span, 2)
        query = chunk.queries[variant]
        assert query is not None and chunk.logit_factor is not None
        expected = query[rows, 3] @ keys[page * 64 : page * 64 + 64, 1].T * chunk.scale * chunk.logit_factor[rows, None]
        torch.testing.assert_close(found[:, page * 64 : page * 64 + 64], expected, rtol=1e-4, atol=1e-4)


def test_minference_keeps_the_line_that_draws_everything() -> None:
    column = 700

    def loud(qkv: torch.Tensor) -> None:
        qkv[:, :HEADS] = 0.1
        qkv[column, HEADS : HEADS + KV_HEADS] = 10  # every query looks at this key

    made = make(span=None, edit=loud)
    lists = minference.select(made.chunk, 0, minference.MinferenceSettings(verticals=40, slashes=110))
    for blocks_of_list in nested(lists):
        for block, pairs in enumerate(blocks_of_list):
            pages = {page for page, _ in pairs}
            assert column // 64 in pages
            assert {FIRST // 64 + block - 1, FIRST // 64 + block} <= pages, "the nearest hundred diagonals"
            assert len(pages) < 15


def test_budgets_of_a_checkpoint_are_per_layer_and_head() -> None:
    budgets = minference.budgets_of([{"0": ["vertical_and_slash", 40, 110, 0.5], "1": ["vertical_and_slash", 10**6, 100, 1.0]}])
    assert budgets == {(0, 0): (40, 110), (0, 1): (10**6, 100)}
    chunk = make().chunk
    settings = minference.MinferenceSettings(verticals=40, slashes=110, budgets=budgets)
    sizes = [sum(len(pairs) for pairs in blocks_of_list) for blocks_of_list in nested(minference.select(chunk, 0, settings))]
    dense = sum(range(FIRST // 64 + 1, FIRST // 64 + 5))
    assert sizes[1] == dense and sizes[0] < dense
    for wrong in ({"0": []}, [["vertical_and_slash", 1, 2]], [{"0": ["stream_llm", 1, 2]}], [{"x": ["vertical_and_slash", 1, 2]}]):
        with pytest.raises(UnsupportedModelError, match="sparse_attention_config"):
            minference.budgets_of(wrong)
    assert minference.budgets_of(None) == {}


def test_xattention_finds_the_block_that_draws_everything() -> None:
    def loud(qkv: torch.Tensor) -> None:
        qkv[:, :HEADS] = 0.2
        qkv[5 * 64 : 6 * 64, HEADS : HEADS + KV_HEADS] = 10

    made = make(span=None, edit=loud)
    for blocks_of_list in nested(xattention.select(made.chunk, xattention.XAttentionSettings())):
        for block, pairs in enumerate(blocks_of_list):
            assert [page for page, _ in pairs] == [0, 5, FIRST // 64 + block]


def test_flexprefill_takes_the_map_where_means_tell_all() -> None:
    def blocky(qkv: torch.Tensor) -> None:
        qkv[:, :HEADS] = 0.2
        qkv[:, HEADS : HEADS + KV_HEADS] = 0  # keys are alike within a page: the mean is the key
        qkv[7 * 64 : 8 * 64, HEADS : HEADS + KV_HEADS] = 10

    chunk = make(span=None, edit=blocky).chunk
    assert float(flexprefill._divergence(torch.tensor([0.5, 0.5]), torch.tensor([0.5, 0.5]))) == 0
    assert flexprefill._divergence(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])) == pytest.approx(0.8326, abs=1e-3)
    for blocks_of_list in nested(flexprefill.select(chunk, flexprefill.FlexPrefillSettings(min_tokens=64))):
        assert all(7 in {page for page, _ in pairs} and len(pairs) < 8 for pairs in blocks_of_list)


def test_largest_by_mass() -> None:
    energy = torch.tensor([[0.1, 0.5, 0.0, 0.4], [0.25, 0.25, 0.25, 0.25]])
    assert blocks.largest_by_mass(energy, 0.85).tolist() == [[False, True, False, True], [True] * 4]
    assert blocks.largest_by_mass(energy, 0.45).tolist() == [[False, True, False, False], [True, True, False, False]]
    assert blocks.largest_by_mass(energy, 1.0).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_engine_runs_every_policy(tiny_folder: Path, name: str) -> None:
    settings: dict[str, Any] = {"prefill_chunk_tokens": 256, "kv_cache_bytes": 64 << 20, "max_model_len": 8192, "dense_tokens": 256}
    llm = LLM(tiny_folder, attention=name, **settings)
    greedy = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    first, second = (llm.generate(tiny.tokens(1700), greedy) for _ in range(2))
    assert first.metrics.recall is not None and first.metrics.density <= 1
    # All but the last token, or whole chunks where a policy looks at chunks.
    assert (second.cached_tokens, second.token_ids) == (1664 if name == "adaptive" else 1536, first.token_ids)
