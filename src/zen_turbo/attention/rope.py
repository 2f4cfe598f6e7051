"""Rotary position embedding: frequencies of every kind that checkpoints ask for, and angles that stay right at a million positions.

An angle is position * frequency, both in fp64, and its cosine and sine are taken in fp64 (which reduces it mod 2 pi there); only the
results are fp32. In fp32 the product alone is off by hundredths of a radian at position 10^6. Tables are made per chunk, never for a whole
window.

Kinds (``rope_type`` of a Hugging Face config): default (arXiv 2104.09864), linear (position interpolation, 2306.15595), dynamic (NTK by
length), llama3 (Llama 3.1's piecewise scaling), yarn (2309.00071). ``frequency_factors`` divides the frequencies; GGUF stores llama3 so.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from zen_turbo.errors import UnsupportedModelError

if TYPE_CHECKING:
    from zen_turbo.models.config import RopeConfig


class RotaryEmbedding:
    """Angles of one model's rotation. ``rope`` is a RopeConfig; head_dim (even) is the rotated width.

    Raises UnsupportedModelError for a kind it does not know and for numbers that give no usable frequency.
    """

    def __init__(self, rope: RopeConfig, head_dim: int) -> None:
        self.rope = rope
        self.head_dim = head_dim
        self._plain = _powers(rope.theta, head_dim)
        factors = rope.frequency_factors
        if factors is not None and len(factors) != head_dim // 2:
            raise UnsupportedModelError(
                f"The checkpoint has {len(factors)} rope frequency factors, head_dim {head_dim} needs {head_dim // 2}."
            )
        if not self._is_usable():
            raise UnsupportedModelError(f"These rope parameters give frequencies or scales that are not finite and positive: {rope}.")

    def _is_usable(self) -> bool:
        try:
            numbers = [*self.inverse_frequencies().tolist(), self.attention_factor]
        except UnsupportedModelError:
            raise
        except (ArithmeticError, ValueError):  # logarithm of what is not positive, or division by its zero
            return False
        return all(math.isfinite(number) and number > 0 for number in numbers)

    @property
    def depends_on_length(self) -> bool:
        """Whether keys are rotated differently for prompts of different lengths, so that prompts may not share them."""
        return self.rope.kind == "dynamic"

    def inverse_frequencies(self, seq_len: int | None = None) -> torch.Tensor:
        """float64 [head_dim / 2], radians per position.

        ``seq_len`` matters to dynamic only: the prompt's length in tokens, fixed when the request is admitted, so that every chunk and
        every answer token rotates as a one-shot prefill does (chunked = one shot). transformers takes the longest length seen so far,
        which is the same for a one-shot prefill, but mixes keys of several rotations in one cache when it is fed in pieces. None means
        no longer than the trained window.
        """
        kind = self.rope.kind
        if kind == "default":
            frequencies = self._plain
        elif kind == "linear":
            frequencies = self._plain / self.rope.factor
        elif kind == "dynamic":
            frequencies = self._dynamic(seq_len)
        elif kind == "llama3":
            frequencies = self._llama3()
        elif kind == "yarn":
            frequencies = self._yarn()
        else:
            raise UnsupportedModelError(f"Rope type {kind!r} is not supported (default, linear, dynamic, llama3, yarn are).")
        if self.rope.frequency_factors is not None:
            frequencies = frequencies / torch.tensor(self.rope.frequency_factors, dtype=torch.float64)
        return frequencies

    def _window(self) -> int:
        window = self.rope.original_max_position_embeddings
        if window is None or window <= 0:
            raise UnsupportedModelError(f"Rope type {self.rope.kind!r} needs original_max_position_embeddings, not {window}.")
        return window

    def _dynamic(self, seq_len: int | None) -> torch.Tensor:
        """Beyond the window the base grows with the length, so that the slowest dimension is interpolated and the fastest is not."""
        window = self._window()
        if seq_len is None or seq_len <= window:
            return self._plain
        growth = self.rope.factor * seq_len / window - (self.rope.factor - 1)
        return _powers(self.rope.theta * growth ** (self.head_dim / (self.head_dim - 2)), self.head_dim)

    def _llama3(self) -> torch.Tensor:
        """Frequencies with many turns inside the window stay, those with few are interpolated, and a linear blend lies between."""
        rope = self.rope
        turns = self._window() * self._plain / (2 * math.pi)
        kept = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
        return self._plain * (kept + (1 - kept) / rope.factor)

    def _yarn(self) -> torch.Tensor:
        """As llama3, but the blend is linear in the index of the dimension, between those that turn beta_fast and beta_slow times."""
        rope, window = self.rope, self._window()

        def index_with(turns: float) -> float:
            return self.head_dim * math.log(window / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

        low, high = index_with(rope.beta_fast), index_with(rope.beta_slow)
        if rope.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.head_dim - 1)
        width = high - low if high != low else 0.001  # transformers' guard: a step instead of a division by zero
        interpolated = ((torch.arange(self.head_dim // 2, dtype=torch.float64) - low) / width).clamp(0, 1)
        return self._plain * (1 - interpolated + interpolated / rope.factor)

    @property
    def attention_factor(self) -> float:
        """What cos and sin are multiplied by, so that logits grow by its square: 1 but for yarn."""
        rope = self.rope
        if rope.kind != "yarn":
            return 1.0
        if rope.attention_factor is not None:
            return rope.attention_factor
        if rope.mscale and rope.mscale_all_dim:
            return _yarn_scale(rope.factor, rope.mscale) / _yarn_scale(rope.factor, rope.mscale_all_dim)
        return _yarn_scale(rope.factor, 1.0)

    def cos_sin(self, positions: torch.Tensor, *, seq_len: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """positions: int64 [T] -> cos, sin: float32 [T, head_dim / 2]. Peak memory: 24 bytes per position and pair of dimensions."""
        angles = positions.to(torch.float64)[:, None] * self.inverse_frequencies(seq_len)
        factor = self.attention_factor
        return (angles.cos() * factor).float(), (angles.sin() * factor).float()


def _powers(theta: float, head_dim: int) -> torch.Tensor:
    return theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)


def _yarn_scale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0
