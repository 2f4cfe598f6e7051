"""``zen-turbo bench prefill``: time to first token of real prompts, and where the time goes.

The prompt is real text (the Python standard library's source, or ``--text``) cut to exactly N tokens, without a chat template. Every run
starts one token later in that text, so that no prefix is ever reused; the engine's ``cached_tokens`` is checked to be 0. One short
unmeasured run warms up kernels and memory.

``linear_floor_s`` is the time the linear layers alone need: their FLOPs (output head once, embedding not at all) over the best bf16 GEMM
rate measured around the run, on this model's shapes. ``floor_ratio`` = ttft_s / linear_floor_s: 1 would be a prefill whose attention, norms
and bookkeeping cost nothing. Dense attention makes it grow with length; a good sparse policy keeps it near 1.

    ttft_s = linear_s + attend_s + select_s + other_s        gemm_attend_share = (linear_s + attend_s) / ttft_s

``other_s`` is everything else: norms, activation functions, rotation and packing, embedding, block lists, sampling, Python. ``density`` and
``recall`` are what the policy kept; a sparse run's speed means nothing without them. ``peak_rss_gib`` is the process's peak so far, so run
lengths in ascending order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zen_turbo.attention.policies.adaptive import settings_of
from zen_turbo.bench.gemm import GemmBenchmark, GemmRate, shapes_of_model
from zen_turbo.bench.report import GIB, Experiment, Row
from zen_turbo.bench.text import fingerprint, read_tokens
from zen_turbo.config import EngineConfig
from zen_turbo.engine.engine import Engine
from zen_turbo.engine.memory import peak_rss_bytes
from zen_turbo.engine.request import RequestOutput, SamplingParams
from zen_turbo.errors import ConfigurationError
from zen_turbo.llm import LLM
from zen_turbo.models.linear import linear_arithmetic
from zen_turbo.progress import prefill_bar

COLUMNS = (
    "length",
    "attention",
    "ttft_s",
    "linear_floor_s",
    "floor_ratio",
    "prompt_tokens_per_s",
    "linear_s",
    "attend_s",
    "select_s",
    "other_s",
    "gemm_attend_share",
    "density",
    "recall",
    "peak_rss_gib",
)
WARM_UP_TOKENS = 512
ONE_TOKEN = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)


def linear_flops(engine: Engine, num_tokens: int) -> int:
    """FLOP of every linear layer for a prompt: all tokens through the layers, one through the output head."""
    model = engine.model_config
    return engine.decoder.linear_flops_per_token * num_tokens + 2 * model.hidden_size * model.vocab_size


def attention_flops(engine: Engine, num_tokens: int, *, cached_tokens: int = 0) -> int:
    """Causal FLOP of dense attention in all layers for the tokens after ``cached_tokens``."""
    model = engine.model_config
    pairs = (num_tokens * (num_tokens + 1) - cached_tokens * (cached_tokens + 1)) // 2
    return 4 * model.head_dim * model.num_attention_heads * model.num_hidden_layers * pairs


def engine_facts(engine: Engine) -> dict[str, Any]:
    """What a record says about model and engine, and a preset's settings in full, because presets change; no folders."""
    return {
        "model": engine.model_name,
        "model_fingerprint": engine.model_fingerprint,
        "architecture": engine.model_config.architecture,
        "max_model_len": engine.max_model_len,
        "engine": engine.config.to_dict(),
        "linear_arithmetic": linear_arithmetic(engine.config),
        "policy": dataclasses.asdict(settings_of(engine.config.preset, engine.config.fidelity)) if engine.config.attention == "adaptive" else None,
    }


def preset_of(engine: Engine) -> str | None:
    """The preset of an adaptive engine; other policies have none."""
    return engine.config.preset if engine.config.attention == "adaptive" else None


def row_of(engine: Engine, outputs: Sequence[RequestOutput], rate: GemmRate, *, prompt_sha256: str) -> Row:
    """One row from the runs of one length: the run of median TTFT, whose parts then add up, with the others' TTFT beside it."""
    ordered = sorted(outputs, key=lambda output: output.metrics.ttft_s)
    output = ordered[(len(ordered) - 1) // 2]
    metrics, length = output.metrics, output.prompt_tokens
    floor_s = linear_flops(engine, length) / (rate.gflops * 1e9)
    accounted = metrics.linear_s + metrics.attend_s
    return {
        "length": length,
        "attention": engine.config.attention,
        "preset": preset_of(engine),
        "ttft_s": metrics.ttft_s,
        "linear_floor_s": floor_s,
        "floor_ratio": metrics.ttft_s / floor_s,
        "attend_s": metrics.attend_s,
        "linear_s": metrics.linear_s,
        "select_s": metrics.select_s,
        "other_s": metrics.ttft_s - accounted - metrics.select_s,
        "gemm_attend_share": accounted / metrics.ttft_s,
        "density": metrics.density,
        "recall": metrics.recall,
        "recall_p5": metrics.recall_p5,
        "peak_rss_gib": peak_rss_bytes() / GIB,
        "prompt_tokens_per_s": length / metrics.ttft_s,
        "cached_tokens": output.cached_tokens,
        "gemm_gflops": rate.gflops,
        "gemm_best_gflops": rate.best_gflops,
        "linear_gflops": linear_flops(engine, length) / metrics.linear_s / 1e9,
        "attend_gflops": attention_flops(engine, length) * metrics.density / metrics.attend_s / 1e9,
        "ttft_all_s": [run.metrics.ttft_s for run in outputs],
        "prompt_sha256": prompt_sha256,  # of the first run
    }


def run(
    *,
    model: str,
    lengths: Sequence[int],
    config: EngineConfig | None = None,
    repeats: int = 1,
    text: Path | None = None,
    output: Path | None = None,
) -> dict[str, Any]:
    """Measure every length, print the report, return the record.

    Raises ConfigurationError for impossible lengths, DocumentError where there is too little text, and the engine's own errors.
    """
    if not lengths or min(lengths) < 1:
        raise ConfigurationError("lengths must be positive.", param="lengths")
    if repeats < 1:
        raise ConfigurationError(f"repeats must be at least 1, not {repeats}.", param="repeats")
    settings = {"model": model, "lengths": list(lengths), "repeats": repeats, "text": text.name if text else "python standard library"}
    experiment = Experiment("bench", "prefill", settings=settings, output=output)
    llm = LLM(model, config=config)
    engine = llm.engine
    experiment.settings |= engine_facts(engine)
    # A later start for every run, so that no two prompts share their first tokens.
    starts = iter(range(1 + len(lengths) * repeats))
    tokens = read_tokens(engine.tokenizer, max(*lengths, WARM_UP_TOKENS) + len(lengths) * repeats, text)
    gemm = GemmBenchmark(shapes_of_model(engine.decoder.linear_shapes()))

    def prefill(length: int, label: str) -> RequestOutput:
        start = next(starts)
        with prefill_bar(label) as on_event:
            result = llm.generate(tokens[start : start + length], ONE_TOKEN, on_event=on_event)
        assert result.cached_tokens == 0, f"{result.cached_tokens} tokens of a cold run came from the cache"
        return result

    prefill(min(WARM_UP_TOKENS, max(lengths)), "warm-up")
    gemm.sample()
    rows: list[Row] = []
    for length in lengths:
        outputs = []
        for number in range(repeats):
            outputs.append(prefill(length, f"{length} tokens"))
            gemm.sample()
            experiment.log(f"{length} tokens, run {number + 1} of {repeats}: {outputs[-1].metrics.ttft_s:.2f} s")
        start = len(rows) * repeats + 1
        rows.append(row_of(engine, outputs, gemm.rate(), prompt_sha256=fingerprint(tokens[start : start + length])))
        gemm.reset()
        gemm.sample()
    return experiment.finish(rows, columns=COLUMNS, note="linear floor: linear layers alone at the bf16 GEMM rate of this run.")
