"""``zen-turbo bench attention``: the prefill attention kernel against torch's SDPA and the machine's bf16 GEMM peak.

What it isolates: one causal attention call over a whole prompt, dense, bf16, K and V already in pages (packing happens once per token at
write and is timed apart, as ``store_ms``). Kernel, SDPA and GEMM take turns, ``repeats`` times; the figures are medians, ``*_best`` the
fastest turns. FLOPs count the causal half only, softmax not at all: 4 * head_dim * q_heads * N (N + 1) / 2, for both attentions.

SDPA is the faster of its two ways of grouped queries (enable_gqa, and keys and values repeated beforehand), picked in the warm-up. The GEMM
peak is the best of several shapes (see ``gemm``). Errors are against fp32 SDPA of the same bf16 inputs on up to three heads; inputs carry
outliers (large channels, a few keys that draw everything), because normal noise hides the errors that models meet. An output of magnitude m
is rounded to bf16 by up to m / 512, so read the errors next to ``max_abs_output`` and to SDPA's own.

How to read it: ``vs_gemm`` says how much of what this machine can multiply ends up in attention; the rest is softmax and memory.
``vs_sdpa`` says what replacing torch's kernel brings. A drop of ``vs_gemm`` at equal GEMM rate is a regression of ours.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from zen_turbo import kernels, native
from zen_turbo.attention import blocks
from zen_turbo.bench.gemm import GENERAL_SHAPES, GemmBenchmark, timed
from zen_turbo.bench.report import Experiment, Row
from zen_turbo.errors import ConfigurationError
from zen_turbo.kv.geometry import PageGeometry
from zen_turbo.kv.pool import PagePool
from zen_turbo.kv.sequence import SequenceCache

COLUMNS = (
    "length",
    "q_heads",
    "kv_heads",
    "head_dim",
    "kernel_gflops",
    "sdpa_gflops",
    "gemm_gflops",
    "vs_sdpa",
    "vs_gemm",
    "max_abs_error",
    "sdpa_max_abs_error",
    "store_ms",
)
NUM_CHECKED_HEADS = 3


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """Raises ConfigurationError for a shape that the kernel does not have."""

    length: int
    q_heads: int
    kv_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ConfigurationError(f"A length must be positive, not {self.length}.", param="length")
        if min(self.q_heads, self.kv_heads) < 1 or self.q_heads % self.kv_heads:
            raise ConfigurationError(f"{self.q_heads}/{self.kv_heads}: the second count must divide the first.", param="heads")
        if self.head_dim not in kernels.HEAD_DIMS:
            raise ConfigurationError(f"head_dim must be one of {kernels.HEAD_DIMS}, not {self.head_dim}.", param="head_dim")

    @property
    def flops(self) -> int:
        """Causal FLOP of QK^T and PV."""
        return 4 * self.head_dim * self.q_heads * self.length * (self.length + 1) // 2


class Inputs(NamedTuple):
    """bf16: q [N, q_heads, D], k and v [N, kv_heads, D]."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


def parse_shapes(lengths: Sequence[int], heads: Sequence[str], head_dims: Sequence[int]) -> list[AttentionShape]:
    """Pair heads ("14/2") with head_dims (one serves all), each pair at every length. Raises ConfigurationError."""
    if len(head_dims) == 1:
        head_dims = list(head_dims) * len(heads)
    elif len(heads) == 1:
        heads = list(heads) * len(head_dims)
    if not lengths or not heads or len(heads) != len(head_dims):
        raise ConfigurationError(f"{len(heads)} heads and {len(head_dims)} head_dims do not pair up.", param="head_dim")
    shapes = []
    for length in lengths:
        for pair, head_dim in zip(heads, head_dims, strict=True):
            q_heads, slash, kv_heads = pair.partition("/")
            if not slash or not q_heads.strip().isdecimal() or not kv_heads.strip().isdecimal():
                raise ConfigurationError(f"heads must look like 14/2 (query heads / KV heads), not {pair!r}.", param="heads")
            shapes.append(AttentionShape(length=length, q_heads=int(q_heads), kv_heads=int(kv_heads), head_dim=head_dim))
    return shapes


def make_inputs(shape: AttentionShape, *, seed: int = 0) -> Inputs:
    """Normal noise with outliers as models show them: two channels of Q and K eight times as large, one key in 509 four times as long
    (a sink for many rows), one value channel four times as large."""
    generator = torch.Generator().manual_seed(seed)

    def noise(heads: int) -> torch.Tensor:
        return torch.randn(shape.length, heads, shape.head_dim, generator=generator)

    q, k, v = noise(shape.q_heads), noise(shape.kv_heads), noise(shape.kv_heads)
    for channel in (3, shape.head_dim // 2 + 3):
        q[..., channel] *= 8
        k[..., channel] *= 8
    k[::509] *= 4
    v[..., 5] *= 4
    return Inputs(q.bfloat16(), k.bfloat16(), v.bfloat16())


def reference_errors(shape: AttentionShape, inputs: Inputs, outputs: Sequence[torch.Tensor]) -> list[tuple[float, float]]:
    """(max, mean) absolute error of each output [N, q_heads, D] against fp32 SDPA, over up to NUM_CHECKED_HEADS heads spread evenly."""
    heads = sorted({round(index * (shape.q_heads - 1) / (NUM_CHECKED_HEADS - 1)) for index in range(NUM_CHECKED_HEADS)})
    group = shape.q_heads // shape.kv_heads
    largest, total = [0.0] * len(outputs), [0.0] * len(outputs)
    for head in heads:
        q, k, v = inputs.q[:, head], inputs.k[:, head // group], inputs.v[:, head // group]
        exact = F.scaled_dot_product_attention(*(t.float()[None, None] for t in (q, k, v)), is_causal=True)[0, 0]
        for index, output in enumerate(outputs):
            difference = (output[:, head].float() - exact).abs()
            largest[index] = max(largest[index], float(difference.max()))
            total[index] += float(difference.mean())
    return [(high, mean / len(heads)) for high, mean in zip(largest, total, strict=True)]


class _Kernel:
    """Our kernel on its own pages, as the engine calls it."""

    def __init__(self, shape: AttentionShape, inputs: Inputs) -> None:
        geometry = PageGeometry(num_layers=1, num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim, dtype=torch.bfloat16)
        self._pool = PagePool(geometry, geometry.bytes_for(shape.length) // geometry.slot_bytes)
        self._cache = SequenceCache(self._pool)
        self._cache.reserve(shape.length)
        self._shape = shape
        self._qkv = torch.cat([t.flatten(1) for t in inputs], dim=1)
        self._q = torch.empty_like(inputs.q)
        self.output = torch.empty_like(inputs.q)
        self._lists = blocks.dense_lists(first_position=0, num_rows=shape.length, num_heads=shape.q_heads, span_pages=None)

    def store(self) -> None:
        no_angles = (None, None, None)
        kv = self._cache.pages(0)
        kernels.store(self._qkv, (self._q, None, None), no_angles, kv, first_position=0, num_heads=self._shape.q_heads)

    def attend(self) -> None:
        scale = self._shape.head_dim**-0.5
        kernels.attend((self._q, None, None), self._cache.pages(0), self._lists, self.output, first_position=0, scale=scale)

    def close(self) -> None:
        self._cache.release()
        self._pool.close()


class _Sdpa:
    """torch SDPA, by whichever of its two ways of grouped queries is faster here."""

    def __init__(self, shape: AttentionShape, inputs: Inputs) -> None:
        q, k, v = (t.transpose(0, 1)[None].contiguous() for t in inputs)  # [1, heads, N, D]
        group = shape.q_heads // shape.kv_heads
        repeated_k, repeated_v = (t.repeat_interleave(group, dim=1) for t in (k, v))
        ways: dict[str, Callable[[], torch.Tensor]] = {
            "repeated keys": lambda: F.scaled_dot_product_attention(q, repeated_k, repeated_v, is_causal=True),
            "enable_gqa": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        }
        seconds = {}
        for name, run in ways.items():
            with torch.inference_mode():
                seconds[name] = timed(run)
        self.way = min(seconds, key=lambda name: seconds[name])
        self.run = ways[self.way]

    def output(self) -> torch.Tensor:
        """[N, q_heads, D]"""
        return self.run()[0].transpose(0, 1)


@torch.inference_mode()
def measure(shape: AttentionShape, *, repeats: int, gemm: GemmBenchmark) -> Row:
    """One row. Memory: Q, K, V and outputs in bf16, K and V repeated for SDPA, one head in fp32."""
    inputs = make_inputs(shape)
    kernel = _Kernel(shape, inputs)
    try:
        kernel.store()
        kernel.attend()
        sdpa = _Sdpa(shape, inputs)
        (error, mean_error), (sdpa_error, _) = reference_errors(shape, inputs, [kernel.output, sdpa.output()])
        seconds: dict[str, list[float]] = {"store": [], "kernel": [], "sdpa": []}
        gemm.reset()
        for _ in range(repeats):
            seconds["store"].append(timed(kernel.store))
            seconds["kernel"].append(timed(kernel.attend))
            seconds["sdpa"].append(timed(sdpa.run))
            gemm.sample()
    finally:
        kernel.close()
    rate = gemm.rate()
    gflops = {name: shape.flops / statistics.median(times) / 1e9 for name, times in seconds.items()}
    return {
        "length": shape.length,
        "q_heads": shape.q_heads,
        "kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "dtype": "bfloat16",
        "kernel_gflops": gflops["kernel"],
        "sdpa_gflops": gflops["sdpa"],
        "gemm_gflops": rate.gflops,
        "vs_sdpa": gflops["kernel"] / gflops["sdpa"],
        "vs_gemm": gflops["kernel"] / rate.gflops,
        "max_abs_error": error,
        "mean_abs_error": mean_error,
        "sdpa_max_abs_error": sdpa_error,
        "max_abs_output": float(kernel.output.abs().max()),
        "kernel_best_gflops": shape.flops / min(seconds["kernel"]) / 1e9,
        "sdpa_best_gflops": shape.flops / min(seconds["sdpa"]) / 1e9,
        "gemm_best_gflops": rate.best_gflops,
        "gemm_shape": list(rate.shape),
        "gemm_route": rate.route,
        "sdpa_way": sdpa.way,
        "kernel_ms": 1e3 * statistics.median(seconds["kernel"]),
        "sdpa_ms": 1e3 * statistics.median(seconds["sdpa"]),
        "store_ms": 1e3 * statistics.median(seconds["store"]),
    }


def run(
    *,
    lengths: Sequence[int],
    heads: Sequence[str],
    head_dims: Sequence[int],
    repeats: int = 5,
    num_threads: int | None = None,
    output: Path | None = None,
) -> dict[str, Any]:
    """Measure every shape, print the report, return the record. Raises ConfigurationError for shapes that do not exist."""
    shapes = parse_shapes(lengths, heads, head_dims)
    if repeats < 1:
        raise ConfigurationError(f"repeats must be at least 1, not {repeats}.", param="repeats")
    torch.set_num_threads(num_threads or native.usable_cpus())
    settings = {"lengths": list(lengths), "heads": list(heads), "head_dims": list(head_dims), "repeats": repeats}
    experiment = Experiment("bench", "attention", settings=settings, output=output)
    gemm = GemmBenchmark(GENERAL_SHAPES)
    rows = []
    for number, shape in enumerate(shapes, 1):
        experiment.log(f"[{number}/{len(shapes)}] {shape.length} tokens, {shape.q_heads}/{shape.kv_heads} heads of {shape.head_dim}")
        rows.append(measure(shape, repeats=repeats, gemm=gemm))
    return experiment.finish(rows, columns=COLUMNS, note="Medians in GFLOP/s, causal; errors against fp32.")
