"""int8 pages: codes and scales, attention over them against the reference on what they stand for, and the engine's equivalences."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny
import torch
from test_adaptive import same, spied
from test_kernels import BOUNDS, DTYPES, LSE_BOUNDS
from test_select import random_qkv, store

from zen_turbo import LLM, kernels
from zen_turbo.attention import blocks, reference
from zen_turbo.engine.request import SamplingParams
from zen_turbo.kernels import PageView

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "f32"])


def make_view(num_pages: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> PageView:
    """Pages full of garbage, in a table without order."""
    slots = num_pages + 3
    pages = torch.full((slots, kv_heads, kernels.page_bytes(head_dim, torch.int8)), 0x81, dtype=torch.uint8)
    table = torch.randperm(slots, generator=torch.Generator().manual_seed(0))[:num_pages].to(torch.int32)
    open_page = torch.full((kv_heads, kernels.page_bytes(head_dim, dtype)), 0xFF, dtype=torch.uint8)  # NaN
    return PageView(pages, table, open_page=open_page)


class Unpacked(NamedTuple):
    """Of full pages, float32 [tokens, kv heads, head_dim] and the scales [pages, kv heads, head_dim] and [tokens, kv heads]."""

    k: torch.Tensor
    v: torch.Tensor
    k_scales: torch.Tensor
    v_scales: torch.Tensor


def unpack(view: PageView, num_pages: int, head_dim: int, dtype: torch.dtype) -> Unpacked:
    pair, count = (2 if dtype == torch.bfloat16 else 1), 64 * head_dim
    stored = view.pages[view.page_table[:num_pages].long()]  # [pages, kv heads, bytes]
    heads = stored.shape[1]
    codes = stored[..., : 2 * count].contiguous().view(torch.int8).float()
    scales = stored[..., 2 * count :].contiguous().view(torch.float32)
    k_scales, v_scales = scales[..., :head_dim], scales[..., head_dim:]
    k = codes[..., :count].view(num_pages, heads, 4, head_dim // pair, 16, pair).permute(0, 1, 2, 4, 3, 5)
    v = codes[..., count:].view(num_pages, heads, 64 // pair, head_dim, pair).permute(0, 1, 2, 4, 3)
    k = k.reshape(num_pages, heads, 64, head_dim) * k_scales[:, :, None]
    v = v.reshape(num_pages, heads, 64, head_dim) * v_scales[..., None]
    k, v = (x.transpose(1, 2).reshape(num_pages * 64, heads, head_dim) for x in (k, v))
    return Unpacked(k, v, k_scales, v_scales.transpose(1, 2).reshape(num_pages * 64, heads))


@dtypes
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_codes_are_the_nearest_and_scales_fit(isa: str, head_dim: int, dtype: torch.dtype) -> None:
    qkv = random_qkv(192, 2, 2, head_dim, dtype)
    qkv[:, 2:4, 3] *= 50  # a loud channel
    qkv[70, 4:] *= 30  # a loud value
    qkv[:, 2:4, 5] = 0
    view = make_view(3, 2, head_dim, dtype)
    store(qkv, view, heads=2)
    found = unpack(view, 3, head_dim, dtype)
    k, v = qkv[:, 2:4].float(), qkv[:, 4:].float()
    torch.testing.assert_close(found.k_scales, k.view(3, 64, 2, head_dim).abs().amax(dim=1) / 127)
    torch.testing.assert_close(found.v_scales, v.abs().amax(dim=-1) / 127)
    assert float(((found.k - k).view(3, 64, 2, head_dim).abs() - found.k_scales[:, None] * 0.5001).max()) <= 1e-6
    assert float(((found.v - v).abs() - found.v_scales[..., None] * 0.5001).max()) <= 1e-6


@dtypes
def test_a_page_filled_in_pieces_is_one_filled_at_once(isa: str, dtype: torch.dtype) -> None:
    qkv = random_qkv(200, 2, 2, 64, dtype)
    whole, pieces = (make_view(4, 2, 64, dtype) for _ in range(2))
    store(qkv, whole, heads=2)
    for start, end in ((0, 10), (10, 64), (64, 127), (127, 129), (129, 200)):
        store(qkv[start:end], pieces, heads=2, first_position=start)
    full = whole.page_table[:3].long()
    assert torch.equal(whole.pages[full], pieces.pages[full])
    assert whole.open_page is not None and pieces.open_page is not None
    assert torch.equal(whole.open_page, pieces.open_page)


CASES = [(256, 4, 2, 64), (250, 14, 2, 64), (129, 4, 1, 128), (130, 4, 2, 80), (200, 2, 1, 256)]


@dtypes
@pytest.mark.parametrize(("length", "heads", "kv_heads", "head_dim"), CASES)
def test_attention_is_that_of_what_the_codes_stand_for(
    isa: str, length: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    qkv = random_qkv(length, heads, kv_heads, head_dim, dtype)
    view = make_view(-(-length // 64), kv_heads, head_dim, dtype)
    q = store(qkv, view, heads=heads)
    view = view._replace(stored_tokens=length)
    full = length // 64
    unpacked = unpack(view, full, head_dim, dtype)
    k = torch.cat((unpacked.k.to(dtype), qkv[full * 64 :, heads : heads + kv_heads]))
    v = torch.cat((unpacked.v.to(dtype), qkv[full * 64 :, heads + kv_heads :]))
    positions, scale = torch.arange(length), head_dim**-0.5
    expected = reference.attention(q, k, v, q_positions=positions, k_positions=positions, scale=scale)
    lists = blocks.dense_lists(first_position=0, num_rows=length, num_heads=heads, span_pages=None)
    out, lse = torch.full_like(q, math.nan), torch.empty(heads, length)
    kernels.attend((q, None, None), view, lists, out, first_position=0, scale=scale, lse=lse)
    assert float((out.double() - expected.out).abs().max()) <= 2 * BOUNDS[dtype]
    torch.testing.assert_close(lse.double(), expected.lse.T, rtol=1e-5, atol=LSE_BOUNDS[dtype])
    last = length - 1
    lists = blocks.dense_lists(first_position=last, num_rows=1, num_heads=heads, span_pages=None)
    row = torch.full_like(q[-1:], math.nan)
    kernels.decode((q[-1:].contiguous(), None, None), view, lists, row, first_position=last, scale=scale)
    assert float((row.double() - expected.out[-1:]).abs().max()) <= 2 * BOUNDS[dtype]


@pytest.mark.parametrize("window", [None, 1500], ids=["whole", "window"])
@pytest.mark.parametrize("heads", [2, 14, 32])
def test_a_token_reads_codes_as_a_prompt_does(isa: str, heads: int, window: int | None) -> None:
    """Long enough for lists in several parts, three spans, loud channels and values, the last page open and not."""
    kv_heads, head_dim, span_pages, dtype = 2, 64, 16, torch.bfloat16
    for length in (4490, 4480):
        qkv = random_qkv(length, heads, kv_heads, head_dim, dtype)
        qkv[:, heads : heads + 2, 3] *= 5
        qkv[1000, heads + 2 :] *= 30
        num_pages = -(-length // 64)
        view = make_view(num_pages, kv_heads, head_dim, dtype)
        q = store(qkv, view, heads=heads)[-1:].contiguous()
        view = view._replace(stored_tokens=length)
        queries = (q, (q * 0.5).contiguous(), (q * -1.5).contiguous())
        factor, last = torch.tensor([1.25]), length - 1
        lists = blocks.dense_lists(first_position=last, num_rows=1, num_heads=heads, span_pages=span_pages, window=window)
        assert window or lists.entries.numel() > 2 * 32
        settings: dict[str, Any] = {"scale": head_dim**-0.5, "window": window, "logit_factor": factor}
        expected, found = (torch.full_like(q, math.nan) for _ in range(2))
        expected_lse, found_lse = torch.empty(heads, 1), torch.empty(heads, 1)
        kernels.attend(queries, view, lists, expected, first_position=last, lse=expected_lse, **settings)
        kernels.decode(queries, view, lists, found, first_position=last, lse=found_lse, **settings)
        bound = 2 * BOUNDS[dtype] * float(expected.float().abs().max().clamp_min(1))
        assert float((found.float() - expected.float()).abs().max()) <= bound
        torch.testing.assert_close(found_lse, expected_lse, rtol=1e-3, atol=0.02)  # keys that attend rounds to bf16


def test_stored_tokens_must_be_told() -> None:
    qkv = random_qkv(100, 2, 1, 64, torch.float32)
    view = make_view(2, 1, 64, torch.float32)
    q = store(qkv, view, heads=2)
    lists = blocks.dense_lists(first_position=0, num_rows=100, num_heads=2, span_pages=None)
    with pytest.raises(ValueError, match="stored_tokens"):
        kernels.attend((q, None, None), view, lists, torch.empty_like(q), first_position=0, scale=0.125)
    with pytest.raises(ValueError, match="open_page must be"):
        wrong = view._replace(open_page=view.pages[0], stored_tokens=100)
        kernels.attend((q, None, None), wrong, lists, torch.empty_like(q), first_position=0, scale=0.125)


# The engine

GREEDY = SamplingParams(temperature=0.0, max_tokens=80, ignore_eos=True)  # more than a page
SMALL: dict[str, Any] = {"kv_dtype": "int8", "prefill_chunk_tokens": 128, "kv_cache_bytes": 32 << 20, "max_model_len": 8192}


def make(folder: Path, **knobs: Any) -> LLM:
    return LLM(folder, **{**SMALL, **knobs})


def test_a_token_takes_half_the_memory(tiny_folder: Path) -> None:
    int8, bf16 = (make(tiny_folder, kv_dtype=kind, attention="dense").engine.geometry for kind in ("int8", "auto"))
    assert 0.5 < int8.slot_bytes / bf16.slot_bytes < 0.55


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_chunked_is_one_shot(tiny_folder: Path, dtype: str) -> None:
    prompt = tiny.tokens(1100)
    first, second = (spied(make(tiny_folder, dtype=dtype, prefill_chunk_tokens=chunk), prompt) for chunk in (128, 4096))
    assert first[0].token_ids == second[0].token_ids
    assert all(torch.allclose(a, b, atol=1e-3 if dtype == "float32" else 0.1) for a, b in zip(first[1], second[1], strict=True))


@pytest.mark.parametrize("attention", ["dense", "adaptive"])
def test_cached_is_cold_to_the_bit(tiny_folder: Path, attention: str) -> None:
    first = tiny.tokens(1000)
    second = [*first[:700], *tiny.tokens(300, seed=9)]
    knobs: dict[str, Any] = {"attention": attention, "dense_tokens": 256}
    warm_engine = make(tiny_folder, **knobs)
    warm_engine.generate(first, GREEDY)
    warm, cold = spied(warm_engine, second), spied(make(tiny_folder, **knobs), second)
    assert (cold[0].cached_tokens, warm[0].cached_tokens) == (0, 640)
    assert same(warm, cold)


def test_logits_are_close_to_those_of_unquantised_pages(tiny_folder: Path) -> None:
    prompt = tiny.tokens(900)
    int8, exact = (spied(make(tiny_folder, dtype="float32", kv_dtype=kind), prompt)[1][0] for kind in ("int8", "auto"))
    assert 0 < float((int8 - exact).abs().max()) < 0.02 * float(exact.abs().max())


@pytest.mark.parametrize("name", ["minference", "flexprefill", "xattention", "tri_shape"])
def test_policies_read_int8_keys(tiny_folder: Path, name: str) -> None:
    llm = make(tiny_folder, attention=name, dense_tokens=256)
    assert llm.generate(tiny.tokens(1001), GREEDY).metrics.recall is not None
