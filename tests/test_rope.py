"""Rotary frequencies against transformers' own functions, and angles at a million positions against extended precision."""

from __future__ import annotations

import math
from typing import Any

import mpmath
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from zen_turbo.attention.rope import RotaryEmbedding
from zen_turbo.errors import UnsupportedModelError
from zen_turbo.models.config import RopeConfig

HEAD_DIM = 64
MAX_POSITIONS = 4096
FAR = [0, 1, 63, 32_767, 32_768, 131_071, 262_144, 524_287, 777_777, 999_999, 1_000_000]
ANGLE_BOUND_RAD = 1e-5

# Fields of RopeConfig that differ from its defaults; the first ones are published checkpoints' (Llama 3.1 and 3.2, Qwen2.5, gpt-oss).
SCALED = {
    "llama3.1": dict(kind="llama3", theta=5e5, factor=8.0, original_max_position_embeddings=8192),
    "llama3.2": dict(kind="llama3", theta=5e5, factor=32.0, original_max_position_embeddings=8192),
    "llama3-bounds": dict(
        kind="llama3", theta=1e4, factor=3.0, original_max_position_embeddings=100, low_freq_factor=2.0, high_freq_factor=9.0
    ),
    "yarn-qwen2.5": dict(kind="yarn", theta=1e6, factor=4.0, original_max_position_embeddings=32768),
    "yarn-not-truncated": dict(kind="yarn", theta=150_000.0, factor=32.0, original_max_position_embeddings=4096, truncate=False),
    "yarn-betas": dict(kind="yarn", theta=1e4, factor=16.0, original_max_position_embeddings=4096, beta_fast=20.0, beta_slow=2.0),
    # Both bounds fall on one dimension, so that the blend is a step.
    "yarn-step": dict(
        kind="yarn", theta=1e4, factor=4.0, original_max_position_embeddings=4096, beta_fast=32.0, beta_slow=32.0, truncate=False
    ),
    "yarn-mscales": dict(kind="yarn", theta=1e4, factor=40.0, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=0.707),
    "yarn-one-mscale": dict(kind="yarn", theta=1e4, factor=40.0, original_max_position_embeddings=4096, mscale=0.707),
    "yarn-attention-factor": dict(kind="yarn", theta=1e4, factor=8.0, original_max_position_embeddings=4096, attention_factor=1.25),
    "yarn-factor-1": dict(kind="yarn", theta=1e4, factor=1.0, original_max_position_embeddings=4096),
    "linear": dict(kind="linear", theta=1e4, factor=4.0),
    "dynamic": dict(kind="dynamic", theta=1e4, factor=2.0, original_max_position_embeddings=MAX_POSITIONS),
}


def config_of_transformers(settings: dict[str, Any]) -> LlamaConfig:
    parameters = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if settings["kind"] == "llama3" else {}
    parameters |= {name: value for name, value in settings.items() if name not in ("kind", "theta")}
    return LlamaConfig(
        hidden_size=4 * HEAD_DIM,
        num_attention_heads=4,
        head_dim=HEAD_DIM,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={**parameters, "rope_type": settings["kind"], "rope_theta": settings["theta"]},
    )


def exact_angles(theta: float, positions: list[int], head_dim: int) -> list[list[mpmath.mpf]]:
    """Unscaled angles with 50 digits, reduced to [-pi, pi)."""
    with mpmath.workdps(50):
        frequencies = [mpmath.mpf(theta) ** (-mpmath.mpf(2 * pair) / head_dim) for pair in range(head_dim // 2)]
        return [[(position * frequency + mpmath.pi) % (2 * mpmath.pi) - mpmath.pi for frequency in frequencies] for position in positions]


def largest_error_rad(cos: torch.Tensor, sin: torch.Tensor, exact: list[list[mpmath.mpf]]) -> float:
    """Of the angles that cos and sin stand for, recovered by atan2, around the circle."""
    errors = torch.atan2(sin.double(), cos.double()) - torch.tensor([[float(angle) for angle in row] for row in exact], dtype=torch.float64)
    return float(torch.remainder(errors + math.pi, 2 * math.pi).sub(math.pi).abs().max())


@pytest.mark.parametrize("name", SCALED)
def test_frequencies_and_attention_factor_match_transformers(name: str) -> None:
    settings = SCALED[name]
    theirs, their_factor = ROPE_INIT_FUNCTIONS[settings["kind"]](config_of_transformers(settings), None)
    ours = RotaryEmbedding(RopeConfig(**settings), HEAD_DIM)
    torch.testing.assert_close(ours.inverse_frequencies().float(), theirs, rtol=1e-6, atol=0)
    assert ours.attention_factor == pytest.approx(their_factor, rel=1e-12)


@pytest.mark.parametrize("seq_len", [1, MAX_POSITIONS, MAX_POSITIONS + 1, 3 * MAX_POSITIONS, 1_000_000])
def test_dynamic_matches_transformers_at_every_length(seq_len: int) -> None:
    settings = SCALED["dynamic"]
    theirs, _ = ROPE_INIT_FUNCTIONS["dynamic"](config_of_transformers(settings), None, seq_len=seq_len)
    ours = RotaryEmbedding(RopeConfig(**settings), HEAD_DIM).inverse_frequencies(seq_len)
    torch.testing.assert_close(ours.float(), theirs, rtol=1e-6, atol=0)


def test_dynamic_rotates_every_chunk_as_one_shot_does() -> None:
    rotary = RotaryEmbedding(RopeConfig(**SCALED["dynamic"]), HEAD_DIM)
    positions = torch.arange(3 * MAX_POSITIONS)
    whole = rotary.cos_sin(positions, seq_len=len(positions))
    for chunk in positions.split(1000):
        cos, sin = rotary.cos_sin(chunk, seq_len=len(positions))
        assert torch.equal(cos, whole[0][chunk])
        assert torch.equal(sin, whole[1][chunk])
    assert not torch.equal(whole[0], rotary.cos_sin(positions)[0])
    assert rotary.depends_on_length
    assert not RotaryEmbedding(RopeConfig(), HEAD_DIM).depends_on_length


@pytest.mark.parametrize("name", ["llama3.1", "yarn-mscales", "linear"])
def test_cos_and_sin_match_transformers_where_its_fp32_is_exact_enough(name: str) -> None:
    settings = SCALED[name]
    positions = torch.arange(256)
    theirs = LlamaRotaryEmbedding(config_of_transformers(settings))(torch.zeros(1), positions[None])
    ours = RotaryEmbedding(RopeConfig(**settings), HEAD_DIM).cos_sin(positions)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == torch.float32
        assert mine.shape == (256, HEAD_DIM // 2)
        torch.testing.assert_close(torch.cat((mine, mine), dim=-1), other[0], rtol=0, atol=5e-5)  # fp32 angles up to 256


def test_frequency_factors_are_llama3_as_gguf_stores_it() -> None:
    scaled = RotaryEmbedding(RopeConfig(**SCALED["llama3.1"]), HEAD_DIM).inverse_frequencies()
    plain = RotaryEmbedding(RopeConfig(theta=5e5), HEAD_DIM).inverse_frequencies()
    factors = tuple((plain / scaled).float().tolist())  # GGUF holds them in fp32
    stored = RotaryEmbedding(RopeConfig(theta=5e5, frequency_factors=factors), HEAD_DIM)
    assert min(factors) == 1.0
    assert max(factors) == pytest.approx(8.0)
    torch.testing.assert_close(stored.inverse_frequencies(), scaled, rtol=1e-7, atol=0)


@pytest.mark.parametrize("theta", [1e4, 1e6, 1e7])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_angles_up_to_a_million_are_exact(theta: float, head_dim: int) -> None:
    exact = exact_angles(theta, FAR, head_dim)
    positions = torch.tensor(FAR)
    rotary = RotaryEmbedding(RopeConfig(theta=theta), head_dim)
    assert largest_error_rad(*rotary.cos_sin(positions), exact) <= ANGLE_BOUND_RAD
    angles = positions.double()[:, None] * rotary.inverse_frequencies()
    assert largest_error_rad(angles.cos(), angles.sin(), exact) <= 1e-8


def test_the_bound_is_one_that_fp32_angles_fail() -> None:
    frequencies = 1.0 / (1e6 ** (torch.arange(0, HEAD_DIM, 2, dtype=torch.float32) / HEAD_DIM))
    angles = torch.tensor(FAR, dtype=torch.float32)[:, None] * frequencies
    assert largest_error_rad(angles.cos(), angles.sin(), exact_angles(1e6, FAR, HEAD_DIM)) > 1000 * ANGLE_BOUND_RAD


def test_yarn_scales_cos_and_sin() -> None:
    rotary = RotaryEmbedding(RopeConfig(**SCALED["yarn-qwen2.5"]), HEAD_DIM)
    cos, sin = rotary.cos_sin(torch.tensor([0, 5, 1_000_000]))
    expected = torch.full_like(cos, 0.1 * math.log(4) + 1)
    torch.testing.assert_close((cos.square() + sin.square()).sqrt(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(kind="longrope"), "longrope"),
        (dict(frequency_factors=(1.0,)), "1 rope frequency factors"),
        (dict(frequency_factors=(0.0,) * 32), "not finite"),
        (dict(kind="yarn", factor=4.0), "original_max_position_embeddings"),
        (dict(kind="yarn", factor=4.0, theta=1.0, original_max_position_embeddings=4096), "not finite"),
        (dict(kind="yarn", factor=4.0, beta_fast=-1.0, original_max_position_embeddings=4096), "not finite"),
        (dict(kind="yarn", factor=4.0, attention_factor=math.inf, original_max_position_embeddings=4096), "not finite"),
        (dict(kind="linear", factor=0.0), "not finite"),
        (dict(theta=math.nan), "not finite"),
    ],
)
def test_unusable_parameters_are_refused_by_name(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedModelError, match=words):
        RotaryEmbedding(RopeConfig(**settings), HEAD_DIM)
