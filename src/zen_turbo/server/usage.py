"""What an answer cost, in the bodies of every route: OpenAI's counts, llama-server's progress, and our own measurements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from zen_turbo.engine.request import PrefillProgress, RequestOutput


def usage(outputs: Sequence[RequestOutput], *, reasoning_tokens: int = 0, prompts: int = 1) -> dict[str, Any]:
    """outputs: ``prompts`` times as many answers to one prompt each; a prompt counts once."""
    first = outputs[:: max(1, len(outputs) // prompts)]
    read, written = sum(output.prompt_tokens for output in first), sum(len(output.token_ids) for output in outputs)
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
        "prompt_tokens_details": {"cached_tokens": sum(output.cached_tokens for output in first)},
        "completion_tokens_details": {"reasoning_tokens": reasoning_tokens},
    }


def progress_facts(event: PrefillProgress) -> dict[str, int]:
    """llama-server's shape; processed includes cache."""
    return {
        "total": event.total_tokens,
        "cache": event.cached_tokens,
        "processed": event.processed_tokens,
        "time_ms": round(1000 * event.elapsed_s),
    }


def extras(output: RequestOutput) -> dict[str, Any]:
    """Ours, under one key; seconds."""
    metrics = output.metrics
    names = ("queue_s", "ttft_s", "prefill_s", "decode_s", "attend_s", "linear_s", "select_s", "density", "recall", "recall_p5", "decode_recall")
    return {"zen_turbo": {name: getattr(metrics, name) for name in names}}
