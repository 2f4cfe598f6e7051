"""Sparse decode: all pages selected is dense, and what is left out is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from zen_turbo import LLM
from zen_turbo.attention.answer import TokenAttention
from zen_turbo.attention.decode import SAMPLE_EVERY, DecodeSettings, SnapDecode, SparseDecode
from zen_turbo.attention.fidelity import Fidelity
from zen_turbo.engine.request import RequestOutput, SamplingParams
from zen_turbo.errors import ConfigurationError

GREEDY = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
PROMPT = tiny.tokens(1500)


def answer(folder: Path, **knobs: Any) -> RequestOutput:
    settings: dict[str, Any] = {"prefill_chunk_tokens": 128, "kv_cache_bytes": 32 << 20, "max_model_len": 4096, "decode_dense_tokens": 256}
    llm = LLM(folder, **{**settings, **knobs})
    try:
        return llm.generate(PROMPT, GREEDY)
    finally:
        llm.engine.close()


@pytest.fixture
def by_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel of a token by a call of its own, so that one can look at what selects; ``test_answer`` has that the bits are the same."""
    monkeypatch.setattr(TokenAttention, "serves", staticmethod(lambda _: False))


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_pages_are_dense_token_for_token(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, kv_dtype: str) -> None:
    """1,500 tokens are four spans of Dual Chunk Attention, and the answer crosses pages."""
    settings = DecodeSettings(mass=1.0, most_pages=1000)
    monkeypatch.setattr("zen_turbo.engine.engine.DecodeSettings", lambda **knobs: settings)
    dense = answer(tiny_folder, dtype=dtype, kv_dtype=kv_dtype)
    for policy in ("sparse", "snapkv"):
        assert answer(tiny_folder, dtype=dtype, kv_dtype=kv_dtype, decode_attention=policy).token_ids == dense.token_ids
    assert dense.metrics.decode_recall is None


@pytest.mark.parametrize(("policy", "kind", "most"), [("sparse", SparseDecode, 1 + 8 + 1 + 3), ("snapkv", SnapDecode, 1 + 8 + 2 + 3)])
def test_a_small_budget_is_kept_and_its_recall_said(
    tiny_folder: Path, by_call: None, monkeypatch: pytest.MonkeyPatch, policy: str, kind: type[SparseDecode], most: int
) -> None:
    """Sink, recent, the token's own (and with snapkv all since the prompt's last eight), the budget."""
    counts: list[int] = []
    select = kind.select

    def spy(self: SparseDecode, *args: Any, **kwargs: Any) -> Any:
        lists = select(self, *args, **kwargs)
        counts.extend(lists.offsets.diff().tolist())
        return lists

    monkeypatch.setattr(kind, "select", spy)
    sparse = answer(tiny_folder, decode_attention=policy, decode_pages=3)
    assert counts and most - 1 <= max(counts) <= most
    assert sparse.metrics.decode_recall is not None and 0.3 < sparse.metrics.decode_recall < 0.999
    assert sparse.metrics.recall is None and sparse.metrics.density == 1, "the prefill was dense"


def test_a_short_context_is_read_whole(tiny_folder: Path) -> None:
    dense, sparse = answer(tiny_folder), answer(tiny_folder, decode_attention="sparse", decode_pages=1, decode_dense_tokens=1600)
    assert sparse.token_ids == dense.token_ids
    assert sparse.metrics.decode_recall is None, "nothing was left out"


def test_a_sparse_prefill_decodes_sparsely_unless_told_otherwise(tiny_folder: Path) -> None:
    knobs = {"attention": "adaptive", "dense_tokens": 256, "decode_pages": 2}
    assert answer(tiny_folder, **knobs).metrics.decode_recall is not None
    assert answer(tiny_folder, **knobs, decode_attention="dense").metrics.decode_recall is None
    with pytest.raises(ConfigurationError, match="decode_pages"):
        answer(tiny_folder, decode_pages=0)
    with pytest.raises(ConfigurationError, match="decode_dense_tokens"):
        answer(tiny_folder, decode_dense_tokens=-1)


def test_heads_read_what_the_prefill_saw_them_need(tiny_folder: Path, by_call: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The neediest head of a group decides; a budget of two pages is eight for those who need them."""
    counts: list[list[int]] = []
    select = SparseDecode.select

    def spy(self: SparseDecode, *args: Any) -> Any:
        lists = select(self, *args)
        counts.append(lists.offsets.diff().tolist())
        return lists

    def needs(self: Fidelity, layer: int) -> torch.Tensor:
        heads = torch.zeros(self._num_heads)
        heads[1] = 1.0
        return heads

    monkeypatch.setattr(SparseDecode, "select", spy)
    knobs = {"attention": "adaptive", "dense_tokens": 256, "decode_pages": 2}
    answer(tiny_folder, **knobs)
    assert counts and all(count <= 1 + 8 + 1 + 2 for each in counts for count in each), "nothing was learnt in so short a prompt"
    counts.clear()
    monkeypatch.setattr(Fidelity, "needs", needs)
    answer(tiny_folder, **knobs)
    needy, others = zip(*((each[0], each[1:]) for each in counts), strict=True)
    assert max(needy) == 1 + 8 + 1 + 8
    assert {count for each in others for count in each} == {1 + 8 + 1}


def test_a_choice_serves_the_next_token_of_the_same_page(tiny_folder: Path, by_call: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers take turns to choose, all of them for the first token and for the first one of a page."""
    chosen: list[tuple[int, int]] = []
    read: list[tuple[int, int, list[int]]] = []
    choose, select = SparseDecode._choose, SparseDecode.select

    def spy_choose(self: SparseDecode, token: Any, layer: int) -> Any:
        chosen.append((token.first_position, layer))
        return choose(self, token, layer)

    def spy_select(self: SparseDecode, token: Any, layer: int) -> Any:
        lists = select(self, token, layer)
        read.append((token.first_position, layer, lists.entries.tolist()))
        return lists

    monkeypatch.setattr(SparseDecode, "_choose", spy_choose)
    monkeypatch.setattr(SparseDecode, "select", spy_select)
    answer(tiny_folder, decode_attention="sparse", decode_pages=3)
    layers = sorted({layer for _, layer, _ in read})
    positions = sorted({position for position, _, _ in read})
    assert positions == list(range(len(PROMPT), len(PROMPT) + 39)) and 1536 in positions and len(layers) > 1
    expected = [(p, layer) for p in positions for layer in layers if p in (positions[0], 1536) or (p + layer) % 2 == 0]
    assert chosen == expected
    lists = {(position, layer): entries for position, layer, entries in read}
    assert all(lists[p, layer] == lists[p - 1, layer] for p, layer, _ in read if (p, layer) not in chosen)
    assert all(entries[-1] >> 2 == p // 64 for (p, _), entries in lists.items()), "the token's own page is always read"


def test_every_layer_has_its_turn_to_be_sampled() -> None:
    state = SparseDecode(DecodeSettings(), num_layers=3, prompt_tokens=10)
    turns = [state.sampled_layer(position) for position in range(0, SAMPLE_EVERY * 6)]
    assert [turn for turn in turns if turn is not None] == [0, 1, 2, 0, 1, 2]
    state.observe(lse_kept=torch.tensor([-0.1, 0.0]), lse_full=torch.tensor([0.0, 0.0]))
    assert state.recall == pytest.approx((1 + torch.tensor(-0.1).exp().item()) / 2)
