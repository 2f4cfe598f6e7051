"""Our linear layers, 8-bit and bf16, against exact arithmetic on the same weights, under every instruction set, and models that use them."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch

from zen_turbo import LLM, kernels
from zen_turbo.config import PRESETS, EngineConfig
from zen_turbo.engine.request import SamplingParams
from zen_turbo.errors import ConfigurationError
from zen_turbo.models import decoder, linear
from zen_turbo.models.decoder import Decoder
from zen_turbo.models.linear import KernelLinear, Linear, fitting_linear, head_linear, int8_linear, linear_arithmetic, packing_available
from zen_turbo.models.loader import load_checkpoint
from zen_turbo.native import selected_isa, use_isa

DTYPES = [torch.bfloat16, torch.float32]


def codes_of(weights: kernels.PackedWeights) -> torch.Tensor:
    """float64 [outputs, padded inputs], without scales."""
    panels, quads, width, _ = weights.codes.shape
    return weights.codes.transpose(1, 2).reshape(panels * width, quads * 4)[: weights.outputs].double() - 128


def rotated(x: torch.Tensor) -> torch.Tensor:
    """Whole blocks of 64 columns times the Hadamard matrix over 8, float32, added up in the kernel's order."""
    whole = x.shape[1] // 64 * 64
    blocks = x[:, :whole].float().reshape(-1, 64) / 8
    lanes = torch.arange(64)
    for distance in (32, 16, 1, 2, 4, 8):
        other = blocks[:, lanes ^ distance]
        blocks = torch.where((lanes & distance) > 0, other - blocks, other + blocks)
    return torch.cat([blocks.view(len(x), whole), x[:, whole:].float()], dim=1)


def exact(x: torch.Tensor, weights: kernels.PackedWeights, bias: torch.Tensor | None) -> torch.Tensor:
    """float64: x quantised as the kernel says it, times the weight that the codes stand for."""
    codes = codes_of(weights)
    padded = torch.zeros(len(x), codes.shape[1])
    padded[:, : weights.inputs] = rotated(x) if weights.rotated else x.float()
    parts = padded.view(len(x), weights.groups, -1)
    largest = parts.abs().amax(dim=2, keepdim=True)
    inverse = torch.where(largest > 0, 127 / largest, torch.zeros(()))
    quantised = ((parts * inverse).round().double() * (largest / 127).double()).view(len(x), -1)
    y = quantised @ codes.T * weights.scales[: weights.outputs].double()
    return y if bias is None else y + bias[: weights.outputs].double()


def check_against(
    expected: torch.Tensor,
    x: torch.Tensor,
    weights: kernels.PackedWeights,
    bias: torch.Tensor | None,
    *,
    fine: bool = False,
    **tolerance: float,
) -> torch.Tensor:
    """What the kernel makes of x, and that neither threads nor the other rows change a bit of it."""
    out = torch.full((len(x), weights.outputs), float("nan"), dtype=torch.float32 if fine else x.dtype)
    kernels.linear(x, weights, out, bias=bias, fine=fine)
    torch.testing.assert_close(out.double(), expected, **tolerance)
    again = torch.empty_like(out)
    kernels.linear(x, weights, again, bias=bias, fine=fine, num_threads=1)
    assert torch.equal(out, again)
    for row in range(0, len(x), max(1, len(x) // 3)):
        alone = torch.empty_like(out[:1])
        kernels.linear(x[row : row + 1].contiguous(), weights, alone, bias=bias, fine=fine)
        assert torch.equal(alone[0], out[row]), "a row depends on itself alone"
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "f32"])
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "bias"), [(1, 64, 64, False), (2, 896, 1152, True), (7, 4865, 130, False), (200, 100, 65, True)]
)
def test_fine_activations_have_sixteen_bits(isa: str, dtype: torch.dtype, rows: int, inputs: int, outputs: int, bias: bool) -> None:
    """Against exact products with the weight that the codes stand for; eight bits are a hundred times as far off."""
    generator = torch.Generator().manual_seed(inputs)
    x = torch.randn(rows, inputs, generator=generator).to(dtype)
    x[:, 0] *= 50
    x[rows // 2 : rows // 2 + (rows > 1)] = 0
    weights = kernels.pack_int8(torch.randn(outputs, inputs, generator=generator))
    offset = torch.randn(weights.padded_outputs, generator=generator) if bias else None
    expected = x.double() @ codes_of(weights)[:, :inputs].T * weights.scales[:outputs].double()
    if offset is not None:
        expected += offset[:outputs].double()
    step = x.float().abs().amax() / 127 / 254
    deviation = step / 12**0.5 * (codes_of(weights).norm(dim=1) * weights.scales[:outputs]).max()  # of roundings
    found = check_against(expected, x, weights, offset, fine=True, rtol=1e-5, atol=6 * float(deviation))
    coarse = torch.empty(rows, outputs)
    kernels.linear(x, weights, coarse, bias=offset)
    error, coarse_error = (found.double() - expected).norm(), (coarse.double() - expected).norm()
    assert error < coarse_error / 100


@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "f32"])
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "bias"), [(1, 64, 64, False), (2, 896, 1152, True), (7, 1300, 130, False), (200, 100, 65, True), (13, 4, 3, True)]
)
def test_bf16_weights_are_multiplied_in_fp32(isa: str, dtype: torch.dtype, rows: int, inputs: int, outputs: int, bias: bool) -> None:
    generator = torch.Generator().manual_seed(inputs)
    x = torch.randn(rows, inputs, generator=generator).to(dtype)
    weight = torch.randn(outputs, inputs, generator=generator).bfloat16()
    weights = kernels.pack_bf16(weight)
    offset = torch.randn(weights.padded_outputs, generator=generator) if bias else None
    expected = x.double() @ weight.double().T + (offset[:outputs].double() if offset is not None else 0)
    rtol, atol = (2**-8, 1e-5 * inputs) if dtype == torch.bfloat16 else (1e-5, 1e-6 * inputs)
    check_against(expected, x, weights, offset, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "f32"])
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "groups", "bias"),
    [(1, 64, 64, 1, False), (2, 896, 1152, 1, True), (7, 4864, 130, 8, False), (200, 100, 65, 1, True), (5, 2050, 16, 3, True), (13, 4, 3, 1, False)],
)
@pytest.mark.parametrize("rotate", [False, True], ids=["plain", "rotated"])
def test_products_are_exact_on_the_codes(
    isa: str, dtype: torch.dtype, rows: int, inputs: int, outputs: int, groups: int, bias: bool, rotate: bool
) -> None:
    generator = torch.Generator().manual_seed(inputs)
    x = torch.randn(rows, inputs, generator=generator).to(dtype)
    x[:, 0] *= 50
    x[rows // 2] = 0
    weight = torch.randn(outputs, inputs, generator=generator).to(dtype)
    weight[0] = 0
    weights = kernels.pack_int8(weight, rotate=rotate)
    assert weights.groups == groups
    offset = torch.randn(weights.padded_outputs, generator=generator) if bias else None
    rtol, atol = (1e-2, 1e-3 * inputs**0.5) if dtype == torch.bfloat16 else (1e-5, 1e-4)
    check_against(exact(x, weights, offset), x, weights, offset, rtol=rtol, atol=atol)


@pytest.mark.parametrize("inputs", [896, 4864, 2000])
def test_rotation_spreads_loud_channels(isa: str, inputs: int) -> None:
    """The product is that of the weight as it was; two channels fifty times as loud as the others cost eight bits less than a third."""
    generator = torch.Generator().manual_seed(inputs)
    x, weight = torch.randn(30, inputs, generator=generator), torch.randn(70, inputs, generator=generator)
    x[:, [5, inputs // 2]] *= 50
    weight[:, [5, inputs // 2]] /= 50  # all channels matter alike
    product = x.double() @ weight.double().T

    def error(rotate: bool, fine: bool) -> float:
        out = torch.empty(30, 70)
        kernels.linear(x, kernels.pack_int8(weight, rotate=rotate), out, fine=fine)
        return float((out.double() - product).norm() / product.norm())

    assert error(rotate=True, fine=True) < 0.02, "what is left is the weight's own rounding"
    assert error(rotate=True, fine=False) < error(rotate=False, fine=False) / 3


@pytest.mark.parametrize("rotate", [False, True])
def test_a_weight_may_be_quantised_in_parts(rotate: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(200, 128, generator=torch.Generator().manual_seed(3))
    whole = kernels.pack_int8(weight, rotate=rotate)
    monkeypatch.setattr("zen_turbo.kernels.layers._OUTPUTS_AT_ONCE", 64)
    parts = kernels.pack_int8(weight, rotate=rotate)
    if not rotate:
        assert torch.equal(parts.scales, whole.scales) and torch.equal(parts.codes, whole.codes)
    torch.testing.assert_close(parts.scales, whole.scales)
    assert (parts.codes.int() - whole.codes.int()).abs().max() <= 1, "a rotation is a product of matrices, which may round otherwise"


def test_codes_at_their_ends_do_not_overflow(isa: str) -> None:
    weights = kernels.pack_int8(torch.tensor([[1.0, -1.0]]).repeat(4, 512) * torch.tensor([[1.0], [-1.0], [1.0], [0.0]]))
    x = torch.tensor([[1.0, -1.0]]).repeat(3, 512) * torch.tensor([[1.0], [-1.0], [0.0]])
    out = torch.empty(3, 4)
    kernels.linear(x, weights, out)
    torch.testing.assert_close(out, torch.tensor([[1024.0, -1024, 1024, 0], [-1024, 1024, -1024, 0], [0, 0, 0, 0]]))


def test_they_come_near_the_layer_that_they_replace() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(300, 896, generator=generator) * 0.02, torch.randn(300, generator=generator)
    x = torch.randn(40, 896, generator=generator)
    fine, coarse = Linear(weight, bias), int8_linear(weight, bias)
    assert (coarse.out_features, coarse.in_features, coarse.has_bias, coarse.flops_per_row) == (300, 896, True, fine.flops_per_row)
    error = (coarse(x) - fine(x)).norm() / (fine(x) - bias).norm()
    assert error < 0.02


def test_presets_multiply_8_bit_integers_where_that_is_faster() -> None:
    chosen = {preset: linear_arithmetic(EngineConfig(preset=preset)) for preset in PRESETS}
    fast = {"turbo": "int8", "balanced": "int8-far", "faithful": "full"}
    assert chosen == (fast if selected_isa() != "scalar" else dict.fromkeys(PRESETS, "full"))
    for preset in PRESETS:
        with use_isa("scalar"):
            assert linear_arithmetic(EngineConfig(preset=preset)) == "full"
        for other in ({"attention": "dense"}, {"dtype": "float32"}, {"linear_dtype": "full"}):
            assert linear_arithmetic(EngineConfig.from_dict({"preset": preset, **other})) == "full"
    for kind in ("int8", "int8-far"):
        assert linear_arithmetic(EngineConfig(attention="dense", linear_dtype=kind)) == kind


def test_far_tokens_of_a_prompt_alone_are_read_with_integers(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = tiny.tokens(400)
    full, coarse = (tiny.logits(tiny_folder, prompt, linear_dtype=kind) for kind in ("full", "int8"))
    assert torch.equal(tiny.logits(tiny_folder, prompt, linear_dtype="int8-far"), full), "no position of this model is far"
    monkeypatch.setattr(decoder, "FAR_TOKENS", 128)
    mixed = tiny.logits(tiny_folder, prompt, linear_dtype="int8-far")
    assert torch.equal(mixed[:128], full[:128])
    differ = [bool((mixed[row] != full[row]).any() and (mixed[row] != coarse[row]).any()) for row in range(128, 400)]
    assert all(differ), "far rows are multiplied like integers, and their pages begin with exact ones"
    assert float((mixed - full).norm() / full.norm()) < 0.05
    for chunks in ([64] * 6 + [16], [64, 192, 144]):
        assert torch.equal(tiny.logits(tiny_folder, prompt, linear_dtype="int8-far", chunks=chunks), mixed)
    assert torch.equal(tiny.logits(tiny_folder, prompt, linear_dtype="int8-far", max_model_len=128), full), "such layers are not loaded"


def test_answers_to_far_prompts_come_from_full_layers(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is multiplied by integers is counted: rows of the prompt, none of the answer."""
    rows = []
    products = KernelLinear.__call__

    def count(layer: KernelLinear, x: torch.Tensor) -> torch.Tensor:
        if not layer._fine:
            rows.append(len(x))
        return products(layer, x)

    monkeypatch.setattr(KernelLinear, "__call__", count)
    monkeypatch.setattr(decoder, "FAR_TOKENS", 128)
    knobs = {"prefill_chunk_tokens": 128, "kv_cache_bytes": 16 << 20, "max_model_len": 2048, "dtype": "float32", "linear_dtype": "int8-far"}
    output = LLM(tiny_folder, **knobs).generate(tiny.tokens(200), SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True))
    assert len(output.token_ids) == 8
    assert rows == [72] * 4 * 2, "four linear layers of two blocks"


def test_a_model_on_8_bit_integers_says_almost_the_same(tiny_folder: Path) -> None:
    prompt = tiny.tokens(300)
    fine, coarse = (tiny.logits(tiny_folder, prompt, rows=50, linear_dtype=kind) for kind in ("full", "int8"))
    assert not torch.equal(fine, coarse)
    assert float((fine - coarse).norm() / fine.norm()) < 0.05
    knobs = {"prefill_chunk_tokens": 128, "kv_cache_bytes": 16 << 20, "max_model_len": 2048, "linear_dtype": "int8"}
    llm = LLM(tiny_folder, **knobs)
    greedy = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    first, again = (llm.generate(prompt, greedy) for _ in range(2))
    assert first.token_ids == again.token_ids and again.cached_tokens == 256
    with pytest.raises(ConfigurationError, match="linear_dtype"):
        LLM(tiny_folder, linear_dtype="int4")


def test_a_cpu_without_bf16_products_widens(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bf16, f32 = torch.zeros(16, 16, dtype=torch.bfloat16), torch.zeros(16, 16)
    assert isinstance(fitting_linear(bf16), KernelLinear) is not packing_available()
    monkeypatch.setattr(linear, "packing_available", lambda: False)
    assert isinstance(fitting_linear(bf16), KernelLinear) and not isinstance(fitting_linear(f32), KernelLinear)
    checkpoint = load_checkpoint(tiny_folder)
    assert isinstance(Decoder(checkpoint, EngineConfig())._head, KernelLinear), "torch takes ten times as long for a batch's logits"
    checkpoint.close()
    prompt = tiny.tokens(300)
    found, exact = (tiny.logits(tiny_folder, prompt, rows=50, dtype=dtype) for dtype in ("bfloat16", "float32"))
    assert float((found - exact).norm() / exact.norm()) < 0.02


def test_wrong_arguments_are_refused() -> None:
    weights = kernels.pack_int8(torch.randn(10, 20))
    x, out = torch.randn(3, 20), torch.empty(3, 10)
    for wrong in (
        {"x": torch.randn(3, 19)},
        {"out": torch.empty(3, 11)},
        {"out": torch.empty(3, 10, dtype=torch.bfloat16)},
        {"bias": torch.zeros(10)},
        {"x": torch.randn(20, 3).T},
    ):
        values = {"x": x, "out": out, "bias": None, **wrong}
        with pytest.raises(ValueError):
            kernels.linear(values["x"], weights, values["out"], bias=values["bias"])
    plain, x = kernels.pack_bf16(torch.randn(10, 20).bfloat16()), x.bfloat16()
    with pytest.raises(ValueError, match="fine"):
        kernels.linear(x, plain, out.bfloat16(), fine=True)
    with pytest.raises(ValueError, match="out must be"):
        kernels.linear(x, plain, out)


def test_the_head_of_bf16_engines_is_exact_but_for_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loud channel, as the last norm gives, costs it nothing."""
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(1000, 896, generator=generator) * 0.02).bfloat16(), torch.randn(30, 896, generator=generator).bfloat16()
    x[:, 5] *= 30
    head, eight_bits = head_linear(weight), KernelLinear(weight, pack=kernels.pack_int8)
    exact = x.double() @ weight.double().T
    found = head(x)
    assert found.dtype == torch.float32 and isinstance(head, KernelLinear)

    def error(logits: torch.Tensor) -> float:
        return float((logits.double() - exact).norm() / exact.norm())

    assert error(found) < 0.01 < 3 * error(found) < error(eight_bits(x))
    assert type(head_linear(weight.float())) is Linear, "fp32 engines are oracles"
    monkeypatch.setattr(linear, "selected_isa", lambda: "scalar")
    assert type(head_linear(weight)) is type(fitting_linear(weight))
