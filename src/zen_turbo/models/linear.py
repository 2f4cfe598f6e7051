"""Linear layers: oneDNN bf16 with weights packed once, plain fp32, or a kernel of our own on bf16 or 8-bit weights.

Rows are processed in tiles of ``TILE_ROWS``. A fixed tile keeps the large intermediate of a gated MLP in the last-level cache and, more
important, makes a row's result independent of the chunk it was computed in: oneDNN picks its blocking from the number of rows.

The packed path uses two private operators of torch (``mkldnn._reorder_linear_weight``, ``mkldnn._linear_pointwise``); a test pins them and
``packing_available`` tests for them, because eager ``F.linear`` would reorder the weight on every call.

oneDNN's bf16 needs AVX-512. Without it torch multiplies bf16 at an eighth of the rate of fp32, so our own kernel widens there: bf16 weights, fp32
products and sums.

8-bit integers take half the memory and, from AVX2 on, about half the time; what they cost is measured by
``bench fidelity --linear-dtype int8``. A loud channel in the activations would cost most; it is spread by a rotation (``csrc/linear_int8.inl``). With
activations in sixteen bits, a head of 8-bit weights is about as near to exact arithmetic as one in bf16, whose logits are rounded
(``scripts/compare_head.py``), and a token waits for half as many bytes. With the default preset 8-bit layers read
what lies beyond ``FAR_TOKENS`` of a prompt; shorter prompts, and the tokens of answers, go through the weights as they are (``int8-far``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from zen_turbo import kernels
from zen_turbo.config import EngineConfig
from zen_turbo.native import selected_isa

TILE_ROWS = 512


@functools.cache
def packing_available() -> bool:
    """Whether torch has the prepacked bf16 linear on this CPU."""
    try:
        weight = torch.ops.mkldnn._reorder_linear_weight(torch.zeros(16, 16, dtype=torch.bfloat16), TILE_ROWS)
        torch.ops.mkldnn._linear_pointwise(torch.zeros(1, 16, dtype=torch.bfloat16), weight, None, "none", [], "")
    except (AttributeError, RuntimeError):
        return False
    return True


class Linear:
    """y = x W^T + b. weight: [out_features, in_features], bias: [out_features] or None; both bf16 or both f32."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        self._bias = bias
        self._packed = weight.dtype == torch.bfloat16 and packing_available()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, TILE_ROWS) if self._packed else weight

    @property
    def flops_per_row(self) -> int:
        return 2 * self.in_features * self.out_features

    @property
    def has_bias(self) -> bool:
        return self._bias is not None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [rows, in_features], contiguous -> [rows, out_features]. Call it with at most TILE_ROWS rows."""
        if self._packed:
            return torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return F.linear(x, self._weight, self._bias)


class KernelLinear(Linear):
    """The same by our own kernels. pack: what the weight becomes; results have the dtype of the weight. fine: 8-bit weights meet activations of
    sixteen bits, and results are float32."""

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        pack: Callable[[torch.Tensor], kernels.PackedWeights] = kernels.pack_bf16,
        fine: bool = False,
    ) -> None:
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        self._weights = pack(weight)
        self._fine = fine
        self._bias = None
        if bias is not None:
            self._bias = torch.zeros(self._weights.padded_outputs)
            self._bias[: self.out_features] = bias.float()

    @property
    def weights(self) -> kernels.LinearWeights:
        return kernels.LinearWeights(self._weights, self._bias)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        out = x.new_empty((len(x), self.out_features), dtype=torch.float32 if self._fine else x.dtype)
        kernels.linear(x, self._weights, out, bias=self._bias, fine=self._fine)
        return out


def fitting_linear(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Linear:
    """The fastest layer of this CPU that keeps the weight as it is."""
    kind = KernelLinear if weight.dtype == torch.bfloat16 and not packing_available() else Linear
    return kind(weight, bias)


def head_linear(weight: torch.Tensor) -> Linear:
    """The output head: in bf16 engines of 8-bit weights and 16-bit activations, half the bytes of bf16; else as the weight is."""
    if weight.dtype == torch.bfloat16 and selected_isa() != "scalar":
        return KernelLinear(weight, pack=kernels.pack_int8, fine=True)
    return fitting_linear(weight)


class Kinds(NamedTuple):
    """What a layer's weights become: for a prompt's tokens from FAR_TOKENS on, and for all others."""

    near: Callable[..., Linear]
    far: Callable[..., Linear]


# Weights on 8-bit integers; activations are quantised row by row.
int8_linear = functools.partial(KernelLinear, pack=functools.partial(kernels.pack_int8, rotate=True))

LINEARS = {
    "full": Kinds(fitting_linear, fitting_linear),
    "int8": Kinds(int8_linear, int8_linear),
    "int8-far": Kinds(fitting_linear, int8_linear),
}
_OF_PRESET = {"turbo": "int8", "balanced": "int8-far", "faithful": "full"}


def linear_arithmetic(config: EngineConfig) -> str:
    """A key of LINEARS: ``linear_dtype``, with auto resolved for this CPU (the scalar kernels are slower with integers)."""
    if config.linear_dtype != "auto":
        return config.linear_dtype
    for_speed = config.attention == "adaptive" and config.dtype == "bfloat16" and selected_isa() != "scalar"
    return _OF_PRESET[config.preset] if for_speed else "full"
