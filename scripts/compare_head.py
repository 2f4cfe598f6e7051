"""What the output head's arithmetic costs: the same hidden rows of real texts through heads of several kinds, against float64.

    .venv/bin/python scripts/compare_head.py --output results/head.json

The head of bf16 engines has 8-bit weights and 16-bit activations (``models/linear.py``). A row says how far each kind is from exact arithmetic on the
checkpoint's weights, over the last 512 positions of 4,096 tokens, dense attention: mean KL, and in how many places the likeliest token is the same.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from zen_turbo import LLM, kernels
from zen_turbo.bench.corpora import NAMES, path_of
from zen_turbo.bench.fidelity import compare, last_logits
from zen_turbo.bench.report import Experiment
from zen_turbo.bench.text import read_tokens
from zen_turbo.models.catalogue import resolve_model
from zen_turbo.models.linear import KernelLinear, Linear, fitting_linear, head_linear, int8_linear
from zen_turbo.models.loader import load_checkpoint

LENGTH = 4096
EXACT = "exact"


class Heads:
    """In place of a model's head: what each kind makes of the rows that come by."""

    def __init__(self, model: str) -> None:
        checkpoint = load_checkpoint(resolve_model(model))
        name = "model.embed_tokens.weight" if checkpoint.config.tie_word_embeddings else "lm_head.weight"
        weight = checkpoint.tensor(name, torch.bfloat16)
        self._exact = checkpoint.tensor(name, torch.float32)  # [V, H]
        self._kinds: dict[str, Linear] = {
            "bf16": fitting_linear(weight),
            "8-bit weights, 16-bit activations": head_linear(weight),
            "8-bit weights, 8-bit activations": KernelLinear(weight, pack=kernels.pack_int8),
            "the same, inputs rotated": int8_linear(weight),
        }
        self._seen: dict[str, list[torch.Tensor]] = {}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        for kind, head in self._kinds.items():
            self._seen.setdefault(kind, []).append(head(x).float())
        exact = (x.double() @ self._exact.double().T).float()
        self._seen.setdefault(EXACT, []).append(exact)
        return exact

    def take(self) -> dict[str, torch.Tensor]:
        """Logits by kind, float32 [rows, V], since the last time."""
        seen, self._seen = self._seen, {}
        return {kind: torch.cat(parts) for kind, parts in seen.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default="qwen2.5-coder-0.5b-instruct,smollm2-135m-instruct")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    models = options.models.split(",")
    experiment = Experiment("compare", "head", settings={"models": models, "texts": list(NAMES), "length": LENGTH}, output=options.output)
    rows = []
    for model in models:
        engine = LLM(model, attention="dense", linear_dtype="full", kv_cache_bytes=1 << 30).engine
        engine.decoder._head = heads = Heads(model)  # type: ignore[assignment]
        for text in NAMES:
            last_logits(engine, read_tokens(engine.tokenizer, LENGTH, path_of(text)))
            logits = heads.take()
            exact = logits.pop(EXACT)
            for kind, found in logits.items():
                difference = compare(exact, found)
                rows.append({"model": model, "text": text, "head": kind, "kl": difference.kl, "top1_agreement": difference.top1_agreement})
            experiment.log(f"{model}, {text}: done")
        engine.close()
    experiment.finish(rows, columns=("model", "text", "head", "kl", "top1_agreement"))


if __name__ == "__main__":
    main()
