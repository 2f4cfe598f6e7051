"""The decoder against transformers on tiny random checkpoints, and against itself cut into chunks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import tiny
import torch

from zen_turbo.errors import CheckpointError, UnsupportedModelError
from zen_turbo.models.loader import load_checkpoint

BOUND = 2e-3


def oracle(model: Any, token_ids: list[int], rows: int | None = None) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([token_ids]), logits_to_keep=rows or 0).logits[0]


def largest_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    assert float(theirs.std()) > 0.5, "logits so alike that nothing could differ"
    return float((ours - theirs).abs().max())


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_matches_transformers(family: str, tmp_path: Path) -> None:
    model = tiny.model(family)
    token_ids = tiny.tokens(300)
    ours = tiny.logits(tiny.save(model, tmp_path), token_ids)
    assert largest_difference(ours, oracle(model, token_ids)) <= BOUND


@pytest.mark.parametrize("rope", tiny.ROPES)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_every_rope_kind_matches_transformers_within_and_beyond_its_window(family: str, rope: str, tmp_path: Path) -> None:
    model = tiny.model(family, rope=rope, max_position_embeddings=512)
    folder = tiny.save(model, tmp_path)
    for length in (200, 1500):
        token_ids = tiny.tokens(length)
        ours = tiny.logits(folder, token_ids, rows=64, max_model_len=4096)
        assert largest_difference(ours, oracle(model, token_ids, 64)) <= BOUND


@pytest.mark.parametrize("rope", tiny.ROPES)
def test_every_rope_kind_matches_transformers_at_32k(rope: str, tmp_path: Path) -> None:
    model = tiny.model("llama", rope=rope, num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=8192)
    token_ids = tiny.tokens(32_768)
    ours = tiny.logits(tiny.save(model, tmp_path), token_ids, rows=16, chunks=[4096] * 8)
    assert largest_difference(ours, oracle(model, token_ids, 16)) <= BOUND


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "qwen2-window", "qwen3"])
def test_chunks_compute_what_one_shot_does(family: str, dtype: str, tmp_path: Path) -> None:
    folder = tiny.save(tiny.model(family), tmp_path)
    token_ids = tiny.tokens(700)
    whole = tiny.logits(folder, token_ids, dtype=dtype)
    cut = tiny.logits(folder, token_ids, chunks=[64, 256, 320, 60], dtype=dtype)
    # Rows of a linear layer may round differently in tiles of another size.
    tolerance = 1e-4 if dtype == "float32" else 0.15
    assert float((whole - cut).abs().max()) <= tolerance


def test_tokens_one_by_one_compute_what_a_chunk_does(tmp_path: Path) -> None:
    folder = tiny.save(tiny.model("qwen3"), tmp_path)
    token_ids = tiny.tokens(200)
    whole = tiny.logits(folder, token_ids)
    single = tiny.logits(folder, token_ids, chunks=[128, *[1] * 72])
    assert float((whole - single).abs().max()) <= 1e-4


@pytest.mark.parametrize("rope", ["default", "yarn"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dual_chunk_attention_inside_the_window_is_plain_rope(rope: str, dtype: str, tmp_path: Path) -> None:
    """512 tokens of window: the second span begins at 384, so that both rotations of queries take part."""
    folder = tiny.save(tiny.model("qwen2", rope=rope, max_position_embeddings=512), tmp_path)
    token_ids = tiny.tokens(512)
    plain = tiny.logits(folder, token_ids, dtype=dtype)
    extended = tiny.logits(folder, token_ids, dtype=dtype, context_extension="dca")
    assert torch.equal(plain[:384], extended[:384]), "one span: nothing differs, not even rounding"
    assert float((plain - extended).abs().max()) <= (1e-4 if dtype == "float32" else 0.25)
    if dtype == "float32":
        assert torch.equal(plain.argmax(-1), extended.argmax(-1))


def test_dual_chunk_attention_beyond_the_window_differs_from_plain_rope(tmp_path: Path) -> None:
    folder = tiny.save(tiny.model("qwen2", max_position_embeddings=512), tmp_path)
    token_ids = tiny.tokens(1100)
    plain = tiny.logits(folder, token_ids, max_model_len=2048)
    extended = tiny.logits(folder, token_ids, context_extension="dca", max_model_len=2048)
    assert float((plain[513:] - extended[513:]).abs().max()) > 0.01


def test_dual_chunk_attention_in_chunks_is_one_shot(tmp_path: Path) -> None:
    folder = tiny.save(tiny.model("qwen2", max_position_embeddings=512), tmp_path)
    token_ids = tiny.tokens(1300)
    whole = tiny.logits(folder, token_ids, context_extension="dca")
    cut = tiny.logits(folder, token_ids, context_extension="dca", chunks=[256] * 5 + [1] * 20)
    assert float((whole - cut).abs().max()) <= 1e-4


def test_the_dual_chunk_section_of_a_published_checkpoint_is_honoured(tmp_path: Path) -> None:
    folder = tiny.save(tiny.model("qwen2", max_position_embeddings=4096), tmp_path)
    token_ids = tiny.tokens(900)
    by_knobs = tiny.logits(folder, token_ids, context_extension="dca", dca_chunk_size=256, dca_local_size=64, attention_temperature=False)
    config = json.loads((folder / "config.json").read_text())
    config["dual_chunk_attention_config"] = {
        "chunk_size": 256,
        "local_size": 64,
        "original_max_position_embeddings": 256,
        "sparse_attention_enabled": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    budgets = [{"0": ["vertical_and_slash", 1000, 6096, 1.0]}, {"0": ["vertical_and_slash", 30, 800, 0.5]}]
    (folder / "sparse_attention_config.json").write_text(json.dumps(budgets))
    section = load_checkpoint(folder).config.sparse_attention
    assert section == {"sparse_attention_enabled": True, "sparse_attention_config": budgets}
    by_section = tiny.logits(folder, token_ids, context_extension="dca", attention_temperature=False)
    assert torch.equal(by_section, by_knobs)
    warmer = tiny.logits(folder, token_ids, context_extension="dca")
    assert torch.equal(warmer[:256], by_knobs[:256]), "the temperature begins at the section's own window"
    assert not torch.equal(warmer[256:], by_knobs[256:])


@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.BF16])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_gguf_holds_the_same_model(family: str, kind: gguf.GGMLQuantizationType, tmp_path: Path) -> None:
    folder = tiny.save(tiny.model(family).to(torch.float32), tmp_path / "folder")
    path = tiny.save_gguf(folder, tmp_path / "model.gguf", kind)
    ours, theirs = load_checkpoint(path), load_checkpoint(folder)
    assert ours.tensor_names() == theirs.tensor_names()
    rounding = {"F32": 0.0, "F16": 2e-3, "BF16": 8e-3}[kind.name]
    for name in ours.tensor_names():
        torch.testing.assert_close(ours.tensor(name, torch.float32), theirs.tensor(name, torch.float32), rtol=rounding, atol=1e-7)
    assert ours.config.rope.theta == theirs.config.rope.theta
    if kind.name == "F32":
        token_ids = tiny.tokens(100)
        assert torch.equal(tiny.logits(path, token_ids), tiny.logits(folder, token_ids))


def _quantised() -> list[gguf.GGMLQuantizationType]:
    """Every type that the gguf package can write; what it can only read is covered by the models of the catalogue."""
    found = []
    for kind in gguf.GGMLQuantizationType:
        try:
            gguf.quantize(torch.zeros(1, 256).numpy(), kind)
        except (NotImplementedError, KeyError):
            continue
        found.append(kind)
    return found


@pytest.mark.parametrize("kind", _quantised(), ids=lambda kind: kind.name)
def test_quantised_tensors_are_read_as_the_gguf_package_reads_them(kind: gguf.GGMLQuantizationType, tmp_path: Path) -> None:
    folder = tiny.save(tiny.model("qwen2", hidden_size=256, intermediate_size=256), tmp_path / "folder")
    checkpoint = load_checkpoint(tiny.save_gguf(folder, tmp_path / "model.gguf", kind))
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    raw = next(tensor for tensor in reader.tensors if tensor.name == "blk.1.ffn_down.weight")
    expected = torch.from_numpy(gguf.dequantize(raw.data, raw.tensor_type).copy())
    assert torch.equal(checkpoint.tensor("model.layers.1.mlp.down_proj.weight", torch.float32), expected.float())


def test_shards_hold_the_same_model_as_one_file(tmp_path: Path) -> None:
    model = tiny.model("llama")
    one, many = tiny.save(model, tmp_path / "one"), tiny.save(model, tmp_path / "many", max_shard_size="200KB")
    assert len(list(many.glob("*.safetensors"))) > 2
    token_ids = tiny.tokens(70)
    assert torch.equal(tiny.logits(one, token_ids), tiny.logits(many, token_ids))
    assert load_checkpoint(one).fingerprint == load_checkpoint(many).fingerprint


def test_the_fingerprint_tells_models_apart(tmp_path: Path) -> None:
    first, second = (tiny.save(tiny.model("llama", seed=seed), tmp_path / str(seed)) for seed in (1, 2))
    assert load_checkpoint(first).fingerprint == load_checkpoint(first).fingerprint != load_checkpoint(second).fingerprint


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"some_new_trick": 3}, "some_new_trick"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_attention_heads": "many"}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "longrope"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "wobble": 1}}, "wobble"),
        ({"dual_chunk_attention_config": {"chunk_size": 256, "local_size": 64}}, "original_max_position_embeddings"),
        ({"hidden_size": None}, "hidden_size"),
    ],
)
def test_a_config_that_is_not_understood_is_refused_by_name(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    folder = tiny.save(tiny.model("llama"), tmp_path)
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match=words):
        load_checkpoint(folder)


def test_tensors_that_do_not_fit_the_config_are_refused_by_name(tmp_path: Path) -> None:
    folder = tiny.save(tiny.model("llama"), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    for change, words in (
        ({"num_hidden_layers": 3}, r"lacks 9 tensors, the first is model\.layers\.2"),
        ({"num_hidden_layers": 1}, r"has 9 tensors that this model does not use, the first is model\.layers\.1"),
        ({"intermediate_size": 64}, r"gate_proj\.weight has shape \(192, 128\)"),
    ):
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(CheckpointError, match=words):
            load_checkpoint(folder)


def test_a_head_dim_without_a_kernel_is_refused(tmp_path: Path) -> None:
    folder = tiny.save(tiny.model("llama", head_dim=48), tmp_path)
    with pytest.raises(UnsupportedModelError, match="head_dim"):
        tiny.logits(folder, [1, 2, 3])
