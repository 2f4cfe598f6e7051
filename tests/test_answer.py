"""An answer's tokens in one native call are those of every kernel by a call of its own, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from zen_turbo import LLM
from zen_turbo.attention.answer import Answer, TokenAttention
from zen_turbo.attention.decode import SAMPLE_EVERY, SparseDecode
from zen_turbo.engine.request import SamplingParams
from zen_turbo.kernels import TokenSequence, attend_tokens
from zen_turbo.models.decoder import Decoder

PROMPTS = [tiny.tokens(length, seed=length) for length in (1500, 700, 300)]


class Seen:
    def __init__(self) -> None:
        self.logits: dict[tuple[int, int], torch.Tensor] = {}  # by prompt length and position: who shares a batch depends on time
        self.recalls: dict[tuple[int, int], torch.Tensor] = {}
        self.calls = 0
        self.by_call = 0


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    found = Seen()
    decode, observe, by_call = Decoder.decode_tokens, SparseDecode.observe, Decoder._tokens_by_call

    def spy_decode(self: Decoder, tokens: Any) -> torch.Tensor:
        logits = decode(self, tokens)
        found.logits |= {(token.answer.rope_seq_len, token.position): row for token, row in zip(tokens, logits, strict=True)}
        found.calls += 1
        return logits

    def spy_observe(self: SparseDecode, *, lse_kept: torch.Tensor, lse_full: torch.Tensor) -> None:
        found.recalls[self.prompt_tokens, len(self._recalls)] = torch.stack([lse_kept, lse_full])
        observe(self, lse_kept=lse_kept, lse_full=lse_full)

    def spy_by_call(self: Decoder, *args: Any) -> Any:
        found.by_call += 1
        return by_call(self, *args)

    monkeypatch.setattr(Decoder, "decode_tokens", spy_decode)
    monkeypatch.setattr(SparseDecode, "observe", spy_observe)
    monkeypatch.setattr(Decoder, "_tokens_by_call", spy_by_call)
    return found


def answer(folder: Path, **knobs: Any) -> None:
    """Three prompts of unlike lengths, together."""
    settings: dict[str, Any] = {"prefill_chunk_tokens": 128, "kv_cache_bytes": 64 << 20, "max_model_len": 2048, "decode_dense_tokens": 256}
    engine = LLM(folder, **{**settings, **knobs}).engine
    for prompt, count in zip(PROMPTS, (120, 70, 90), strict=True):
        engine.submit(prompt, SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True), on_event=lambda event: None)
    while engine.step():
        pass
    engine.close()


SPARSE = {"attention": "dense", "decode_attention": "sparse", "decode_pages": 3}
ADAPTIVE = {"attention": "adaptive", "dense_tokens": 256, "decode_pages": 2}


@pytest.mark.parametrize("linear_dtype", ["full", "int8"])
@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("knobs", [{"attention": "dense"}, SPARSE, ADAPTIVE], ids=["dense", "sparse", "adaptive"])
def test_one_call_gives_the_bits_of_many(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, seen: Seen, knobs: dict[str, Any], dtype: str, kv_dtype: str, linear_dtype: str
) -> None:
    """Four spans of Dual Chunk Attention, answers that cross pages, and sampled layers."""
    check(tiny_folder, monkeypatch, seen, dtype=dtype, kv_dtype=kv_dtype, linear_dtype=linear_dtype, **knobs)
    assert bool(seen.recalls) == (knobs in (SPARSE, ADAPTIVE))


@pytest.mark.parametrize("linear_dtype", ["full", "int8"])
@pytest.mark.parametrize(("family", "rope"), [("qwen3", "yarn"), ("smollm3", "default"), ("llama-biases", "dynamic"), ("mistral-full", "llama3")])
def test_families(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: Seen, family: str, rope: str, linear_dtype: str) -> None:
    folder = tiny.save(tiny.model(family, rope=rope), tmp_path)
    check(folder, monkeypatch, seen, linear_dtype=linear_dtype, context_extension="none", **SPARSE)


def check(folder: Path, monkeypatch: pytest.MonkeyPatch, seen: Seen, **knobs: Any) -> None:
    answer(folder, **knobs)
    assert len(seen.logits) == 119 + 69 + 89 > seen.calls and not seen.by_call
    natively, recalls = dict(seen.logits), dict(seen.recalls)
    seen.logits.clear()
    seen.recalls.clear()
    seen.calls = 0
    monkeypatch.setattr(TokenAttention, "serves", staticmethod(lambda _: False))
    answer(folder, **knobs)
    assert seen.by_call == seen.calls and seen.logits.keys() == natively.keys() and seen.recalls.keys() == recalls.keys()
    assert all(torch.equal(seen.logits[key], row) for key, row in natively.items())
    assert all(torch.equal(seen.recalls[key], lse) for key, lse in recalls.items())


def test_windows_and_snapkv_go_by_call(tmp_path: Path, tiny_folder: Path, seen: Seen) -> None:
    answer(tiny_folder, decode_attention="snapkv", decode_pages=3)
    answer(tiny.save(tiny.model("mistral"), tmp_path), context_extension="none")
    assert seen.by_call == seen.calls > 0


def test_a_choice_outlives_its_sequence(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, seen: Seen) -> None:
    """A page table that grows in the middle of a page makes the arguments anew; what was chosen goes on to serve."""
    made: list[int] = []
    begin = TokenAttention.begin

    def spy(self: TokenAttention, answer: Answer, position: int) -> TokenSequence:
        if position % 7 == 3 and answer.sequence is not None:
            views = answer.sequence._views
            views[0] = views[0]._replace(page_table=views[0].page_table.clone())
            made.append(position)
        return begin(self, answer, position)

    monkeypatch.setattr(TokenAttention, "begin", spy)
    check(tiny_folder, monkeypatch, seen, kv_dtype="int8", linear_dtype="int8", **SPARSE)
    assert any(position % 64 > 2 and position % 2 for position in made) and any(position % SAMPLE_EVERY for position in made)


def test_what_does_not_fit_is_refused(tiny_folder: Path, seen: Seen) -> None:
    engine = LLM(tiny_folder, kv_cache_bytes=16 << 20, max_model_len=2048).engine
    rows: list[Any] = []
    decode = engine.decoder.decode_tokens
    engine.decoder.decode_tokens = lambda tokens: rows.extend(tokens) or decode(tokens)  # type: ignore[method-assign,func-returns-value]
    engine.submit(PROMPTS[2], SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True), on_event=lambda event: None)
    while not rows and engine.step():
        pass
    sequence = rows[0].answer.sequence
    angles, _ = engine.decoder.attention.rotation(300)
    dense = engine.decoder.attention.dense_lists(300, 1)
    settings: dict[str, Any] = {"dense": dense, "select_every": 0, "sample": None}
    for position, changes, message in (
        (64 * 4096, {}, "beyond the page table"),
        (300, {"select_every": 2}, "nothing is chosen"),
        (300, {"dense": None}, "list of every page"),
        (300, {"dense": engine.decoder.attention.dense_lists(200, 1)}, "end with the row's page"),
        (300, {"sample": (0, torch.empty(3), torch.empty(4))}, "float32"),
    ):
        with pytest.raises(ValueError, match=message):
            sequence.begin(position, angles, None, **{**settings, **changes})
    width = engine.decoder.config.num_attention_heads * 64
    with pytest.raises(ValueError, match="a row per sequence"):
        attend_tokens([sequence], 0, torch.zeros(1, 3, dtype=torch.bfloat16), torch.zeros(1, width, dtype=torch.bfloat16))
    engine.close()
