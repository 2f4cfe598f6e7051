"""The rest of a layer: normalisation, activation and products with packed weights."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from zen_turbo import native
from zen_turbo.kernels.checks import DTYPES, calling, need

_PANEL_OUTPUTS = {torch.uint8: 64, torch.bfloat16: 16}  # outputs of a linear layer that lie together, by the dtype of its codes
_ROTATED_INPUTS = 64  # of a block
_OUTPUTS_AT_ONCE = 16384  # outputs that are quantised at a time: a head of ten times as many would take four times its fp32 size


def norm_args(
    residual: torch.Tensor,
    delta: torch.Tensor | None,
    weight: torch.Tensor,
    out: torch.Tensor,
    *,
    eps: float,
    num_threads: int | None = None,
) -> native.NormArgs:
    """residual += delta (in place, if given), then out = residual / sqrt(mean(residual^2) + eps) * weight.

    residual: f32 [rows, width]; delta, out: bf16 or f32 [rows, width]; weight: f32 [width]; all contiguous. RMSNorm: arXiv 1910.07467.
    """
    rows, width = residual.shape
    need(residual.dtype == torch.float32 and residual.is_contiguous(), "residual must be contiguous float32")
    need(weight.dtype == torch.float32 and weight.shape == (width,), f"weight must be float32 [{width}]")
    for tensor in (delta, out):
        if tensor is not None:
            same = tensor.shape == residual.shape and tensor.dtype == out.dtype and tensor.is_contiguous()
            need(same and tensor.dtype in DTYPES, f"delta and out must be contiguous [{rows}, {width}] of one dtype")
    return native.NormArgs(
        residual.data_ptr(),
        delta.data_ptr() if delta is not None else None,
        weight.data_ptr(),
        out.data_ptr(),
        rows,
        width,
        eps,
        DTYPES[out.dtype],
        num_threads or torch.get_num_threads(),
    )


add_rms_norm = calling("zt_norm", norm_args)


def silu_args(gate_up: torch.Tensor, out: torch.Tensor, *, num_threads: int | None = None) -> native.SiluArgs:
    """out = silu(gate) * up. gate_up: bf16 or f32 [rows, 2 * width], gate first; out: [rows, width]; contiguous (SwiGLU, arXiv 2002.05202)."""
    rows, width = out.shape
    need(gate_up.shape == (rows, 2 * width) and gate_up.dtype == out.dtype and out.dtype in DTYPES, "gate_up must be [rows, 2 * width]")
    need(gate_up.is_contiguous() and out.is_contiguous(), "gate_up and out must be contiguous")
    return native.SiluArgs(gate_up.data_ptr(), out.data_ptr(), rows, width, DTYPES[out.dtype], num_threads or torch.get_num_threads())


silu_mul = calling("zt_silu", silu_args)


class PackedWeights(NamedTuple):
    """A weight [outputs, inputs] as the kernels of ``csrc/linear.inl`` read it.

    codes: uint8 [panels, padded_inputs / 4, 64, 4], or bfloat16 [panels, inputs, 16]; scales: float32 [panels * 64], one per output, or None
    with bfloat16; groups: equal parts of the inputs with a scale of their own in every row of activations (1 with bfloat16); rotated: whole blocks
    of 64 inputs are, and activations have to be.
    """

    codes: torch.Tensor
    scales: torch.Tensor | None
    inputs: int
    outputs: int
    groups: int
    rotated: bool = False

    @property
    def padded_outputs(self) -> int:
        return self.codes.shape[0] * _PANEL_OUTPUTS[self.codes.dtype]


def _panels_of(weight: torch.Tensor, dtype: torch.dtype, padded_inputs: int) -> torch.Tensor:
    """Room for a weight in whole panels: zeros of ``dtype``, [panels * panel outputs, padded_inputs]."""
    panel = _PANEL_OUTPUTS[dtype]
    return torch.zeros((-(-len(weight) // panel) * panel, padded_inputs), dtype=dtype)


def _rotated(weight: torch.Tensor) -> torch.Tensor:
    """Whole blocks of inputs times the orthogonal Hadamard matrix, f32 [outputs, inputs]."""
    hadamard = torch.ones(1, 1)
    while len(hadamard) < _ROTATED_INPUTS:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], dim=1), torch.cat([hadamard, -hadamard], dim=1)])
    whole = weight.shape[1] // _ROTATED_INPUTS * _ROTATED_INPUTS
    blocks = weight[:, :whole].reshape(len(weight), -1, _ROTATED_INPUTS) @ (hadamard / math.sqrt(_ROTATED_INPUTS))
    return torch.cat([blocks.view(len(weight), whole), weight[:, whole:]], dim=1)


def pack_int8(weight: torch.Tensor, *, most_group_inputs: int = 1024, rotate: bool = False) -> PackedWeights:
    """Quantise a weight, bf16 or f32 [outputs, inputs]: one scale per output, codes to nearest. Groups are as few as give at most
    ``most_group_inputs`` inputs each. rotate: multiply whole blocks of 64 inputs by the Hadamard matrix first, here and in activations, which
    spreads their loud channels (QuaRot, arXiv 2404.00456); products stay what they are but for rounding."""
    outputs, inputs = weight.shape
    fewest = -(-inputs // most_group_inputs)
    groups = next((count for count in range(fewest, 2 * fewest + 1) if inputs % (4 * count) == 0), fewest)  # equal parts without padding, if any
    codes = _panels_of(weight, torch.uint8, -(-inputs // (4 * groups)) * 4 * groups)
    codes.fill_(128)
    scales = torch.zeros(len(codes))
    for start in range(0, outputs, _OUTPUTS_AT_ONCE):
        rows = slice(start, min(start + _OUTPUTS_AT_ONCE, outputs))
        part = _rotated(weight[rows].float()) if rotate else weight[rows].float()
        largest = part.abs().amax(dim=1)
        scales[rows] = largest / 127
        inverse = torch.where(largest > 0, 127 / largest, torch.zeros(()))
        codes[rows, :inputs] = ((part * inverse[:, None]).round() + 128).to(torch.uint8)
    tiles = codes.view(-1, _PANEL_OUTPUTS[torch.uint8], codes.shape[1] // 4, 4).transpose(1, 2).contiguous()
    return PackedWeights(tiles, scales, inputs, outputs, groups, rotate)


def pack_bf16(weight: torch.Tensor) -> PackedWeights:
    """A bf16 weight [outputs, inputs] in panels, as it is."""
    outputs, inputs = weight.shape
    need(weight.dtype == torch.bfloat16, f"the weight must be bfloat16, not {weight.dtype}")
    panels = _panels_of(weight, torch.bfloat16, inputs)
    panels[:outputs] = weight
    return PackedWeights(panels.view(-1, _PANEL_OUTPUTS[torch.bfloat16], inputs).transpose(1, 2).contiguous(), None, inputs, outputs, 1)


def linear_args(
    x: torch.Tensor,
    weights: PackedWeights,
    out: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    fine: bool = False,
    num_threads: int | None = None,
) -> native.LinearArgs:
    """out = x W^T + bias. x: bf16 or f32 [rows, inputs]; with 8-bit weights it is quantised here, per row and group, otherwise products and sums
    are in float32. out: [rows, outputs] of the same dtype, or with 8-bit weights float32; both contiguous. bias: float32 [padded_outputs]. fine: with
    8-bit weights, x is quantised to sixteen bits instead of eight, for twice the products and as many bytes of weights. A row's result depends on
    that row alone, to the bit."""
    rows = x.shape[0]
    need(x.shape == (rows, weights.inputs) and x.dtype in DTYPES and x.is_contiguous(), f"x must be contiguous [rows, {weights.inputs}]")
    need(weights.scales is not None or not fine, "only 8-bit weights know fine activations")
    same = out.dtype == x.dtype or (weights.scales is not None and out.dtype == torch.float32)
    need(out.shape == (rows, weights.outputs) and same and out.is_contiguous(), f"out must be {x.dtype} [{rows}, {weights.outputs}]")
    padded = weights.padded_outputs
    need(bias is None or (bias.dtype == torch.float32 and bias.shape == (padded,)), f"bias must be float32 [{padded}]: whole panels")
    return native.LinearArgs(
        x.data_ptr(),
        weights.codes.data_ptr(),
        weights.scales.data_ptr() if weights.scales is not None else None,
        bias.data_ptr() if bias is not None else None,
        out.data_ptr(),
        rows,
        weights.inputs,
        weights.outputs,
        weights.groups,
        DTYPES[x.dtype],
        DTYPES[out.dtype],
        fine,
        weights.rotated,
        num_threads or torch.get_num_threads(),
    )


linear = calling("zt_linear", linear_args)
