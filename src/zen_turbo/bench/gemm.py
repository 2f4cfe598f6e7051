"""The GEMM rate of this machine on bf16 operands, now: the yardstick of every other number.

A rate is the best of several shapes and of two routes (``linear``: as our linear layers run; ``mm``: plain ``torch.mm``, in fp32 where this CPU
has no bf16 products), each shape by its median. It is measured in the same run as what it is compared with, in turns with it, because machines are
shared and clocks move; quote ratios, not rates.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from zen_turbo.models.linear import fitting_linear, packing_available

# rows, in_features, out_features
Shape = tuple[int, int, int]
GENERAL_SHAPES: tuple[Shape, ...] = ((2048, 4096, 4096), (4096, 576, 1536), (4096, 896, 4864), (1024, 2048, 2048), (512, 4864, 896))
ROWS = (512, 2048, 4096)


class GemmRate(NamedTuple):
    """gflops: the highest of the shapes' medians; best_gflops: the fastest single run; shape and route of ``gflops``."""

    gflops: float
    best_gflops: float
    shape: Shape
    route: str


def timed(work: Callable[[], object]) -> float:
    """Wall seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


class GemmBenchmark:
    """Holds operands of every shape (normal noise). ``sample()`` runs each once; ``rate()`` sums up what was sampled so far."""

    def __init__(self, shapes: Sequence[Shape]) -> None:
        generator = torch.Generator().manual_seed(0)
        self._work: dict[tuple[Shape, str], Callable[[], object]] = {}
        for shape in shapes:
            rows, inner, outer = shape
            x = torch.randn(rows, inner, generator=generator).bfloat16()
            weight = torch.randn(outer, inner, generator=generator).bfloat16()
            linear = fitting_linear(weight)
            self._work[shape, "linear"] = lambda x=x, linear=linear: linear(x)
            multiplied = torch.bfloat16 if packing_available() else torch.float32
            left, right = x.to(multiplied), weight.t().contiguous().to(multiplied)
            self._work[shape, "mm"] = lambda left=left, right=right: torch.mm(left, right)
        self._seconds: dict[tuple[Shape, str], list[float]] = {key: [] for key in self._work}
        self._warm = False

    @torch.inference_mode()
    def sample(self) -> None:
        """Run every shape and route once (each once more, unmeasured, the first time)."""
        for key, work in self._work.items():
            if not self._warm:
                work()
            self._seconds[key].append(timed(work))
        self._warm = True

    def reset(self) -> None:
        """Forget the samples, keep the operands."""
        for seconds in self._seconds.values():
            seconds.clear()

    def rate(self) -> GemmRate:
        assert self._warm, "sample() first"

        def flops(key: tuple[Shape, str]) -> int:
            rows, inner, outer = key[0]
            return 2 * rows * inner * outer

        medians = {key: flops(key) / statistics.median(seconds) / 1e9 for key, seconds in self._seconds.items() if seconds}
        fastest = max(medians, key=lambda key: medians[key])
        best = max(flops(key) / min(seconds) / 1e9 for key, seconds in self._seconds.items() if seconds)
        return GemmRate(medians[fastest], best, *fastest)


def shapes_of_model(linear_shapes: Sequence[tuple[int, int]], rows: Sequence[int] = ROWS) -> list[Shape]:
    """Every (in_features, out_features) of a model at several row counts."""
    return [(count, inner, outer) for inner, outer in dict.fromkeys(linear_shapes) for count in rows]
