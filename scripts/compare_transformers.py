"""Greedy continuations of real GGUF models, ours against ``transformers``, token by token.

    .venv/bin/python scripts/compare_transformers.py --output results/transformers.json

The reference shares nothing with our loader: ``transformers`` reads the GGUF metadata, dequantises with the ``gguf`` package, undoes the
row permutation of the llama architecture itself, and runs its own modelling code with eager attention, in fp32 and in bf16. Prompt token
ids are the same for all. Four comparisons per prompt:

    ours float32   with reference fp32      the strictest: same numbers up to summation order
    ours bfloat16  with reference bf16      two roundings of the same weights
    ours bfloat16  with reference fp32      what a user loses against full precision
    reference bf16 with reference fp32      the yardstick: how far bf16 alone moves the reference

A row says for how many tokens the two agree. Where they part, it shows both tokens' logits and the margin under both runtimes. The
difference is a near tie if the margin under the second runtime is at most four times the noise: noise is the standard deviation, over the
vocabulary, of what bf16 alone does to the reference's logits at that position (times the square root of two where both runtimes are bf16),
or 0.001 between two fp32 runtimes. The exit status is 1 if one of ours differs by more than a near tie.
"""

from __future__ import annotations

import argparse
import itertools
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from zen_turbo.attention.answer import Answer
from zen_turbo.bench.report import Experiment, Row
from zen_turbo.config import EngineConfig
from zen_turbo.engine.engine import Engine
from zen_turbo.engine.request import SamplingParams
from zen_turbo.kv.sequence import SequenceCache
from zen_turbo.llm import LLM
from zen_turbo.models.catalogue import CATALOGUE, resolve_model
from zen_turbo.models.decoder import TokenRow

FP32_NOISE = 1e-3
NEAR_TIE_NOISES = 4
KV_CACHE_BYTES = 512 << 20
COLUMNS = (
    "model",
    "prompt",
    "prompt_tokens",
    "first",
    "second",
    "identical_tokens",
    "verdict",
    "margin",
    "noise",
    "max_abs_logit_difference",
)

# name, text, whether it goes through the chat template
PROMPTS: tuple[tuple[str, str, bool], ...] = (
    ("fact", "What is the boiling point of water at sea level, and why is it lower on a mountain?", True),
    ("code", "Write a Python function that returns the longest palindrome in a string, with a short docstring.", True),
    ("sql", "Given tables orders(id, customer, total) and customers(id, name), list the five customers who spent most.", True),
    ("german", "Erkläre in drei Sätzen, wie ein Regenbogen entsteht.", True),
    ("chinese", "请用两句话介绍一下长城的历史。", True),
    ("arithmetic", "A train leaves at 9:40 and arrives at 13:05. How long is the journey? Show the steps.", True),
    ("story", "The lighthouse keeper had not spoken to anyone for eleven days when the letter came.", False),
    ("completion", "def merge_sorted(left, right):\n    result = []\n    while left and right:\n", False),
    ("json", '[{"city": "Oslo", "country": "Norway"}, {"city": "Lima", "country": "Peru"}, {"city": "Cairo", "country":', False),
    (
        "long",
        "\n".join(f"Row {n}: station {n * 37 % 101}, level {n * n % 977} mm, valve {'open' if n % 3 else 'closed'}." for n in range(90))
        + "\n\nWhich of these rows have a closed valve? Name the first five and their levels.",
        True,
    ),
)


class Continuation(NamedTuple):
    """tokens: what was generated, greedily; logits: f32 [len(tokens), V], row i chose token i."""

    tokens: list[int]
    logits: torch.Tensor


# The reference


def load_reference(path: Path, dtype: torch.dtype) -> torch.nn.Module:
    """The model as transformers understands the file. Built in its dtype rather than cast to it, because a cast would round the rotation's
    frequencies, which transformers keeps in fp32."""
    config = AutoConfig.for_model(**load_gguf_checkpoint(str(path), return_tensors=False)["config"])
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=skeleton)["tensors"]
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
    state = {name: torch.as_tensor(tensor) for name, tensor in tensors.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or set(missing) - ({"lm_head.weight"} if config.tie_word_embeddings else set()):
        raise SystemExit(f"transformers does not load {path.name} completely: missing {missing}, unexpected {unexpected}.")
    model.tie_weights()
    return model.eval()


@torch.inference_mode()
def continue_reference(model: torch.nn.Module, prompt: list[int], num_tokens: int) -> Continuation:
    tokens: list[int] = []
    rows = []
    step, cache = torch.tensor([prompt]), None
    for _ in range(num_tokens):
        output = model(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        rows.append(output.logits[0, -1].float())
        tokens.append(int(rows[-1].argmax()))
        step = torch.tensor([[tokens[-1]]])
    return Continuation(tokens, torch.stack(rows))


@torch.inference_mode()
def forced_reference(model: torch.nn.Module, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """Logits f32 [len(tokens), V] of the same positions, given another runtime's tokens."""
    ids = torch.tensor([prompt + tokens[:-1]])
    return model(input_ids=ids, use_cache=False, logits_to_keep=len(tokens)).logits[0].float()


# Ours


def continue_ours(llm: LLM, prompt: list[int], num_tokens: int) -> Continuation:
    """Tokens from the engine as users run it; logits from a second pass over the same calls of the decoder."""
    sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    tokens = list(llm.generate(prompt, sampling).token_ids)
    logits = replay(llm.engine, prompt, tokens)
    chosen = logits.argmax(dim=1).tolist()
    if chosen != tokens:
        first = next(index for index, (a, b) in enumerate(zip(chosen, tokens, strict=True)) if a != b)
        raise SystemExit(f"The decoder called directly chooses {chosen[first]} where the engine chose {tokens[first]} (token {first}).")
    return Continuation(tokens, logits)


def replay(engine: Engine, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """Prefill on the engine's chunk grid, then one token at a time as the engine decodes them: logits f32 [len(tokens), V]."""
    cache, size = SequenceCache(engine.pool), len(prompt)
    bounds = [*range(0, size, engine.config.prefill_chunk_tokens), size]
    rows = []
    try:
        cache.reserve(size + len(tokens))
        for start, end in itertools.pairwise(bounds):
            last = slice(end - start - 1, end - start) if end == size else None
            logits, _ = engine.decoder.forward(
                torch.tensor(prompt[start:end]), cache.pages, first_position=start, logits_rows=last, rope_seq_len=size
            )
            cache.commit(end)
            if logits is not None:
                rows.append(logits[0].clone())
        answer = Answer(cache.pages, rope_seq_len=size)
        for position, token in enumerate(tokens[:-1], size):
            (row,) = engine.decoder.decode_tokens([TokenRow(token, position, answer)])
            cache.commit(position + 1)
            rows.append(row.clone())
    finally:
        cache.release()
    return torch.stack(rows)


# Comparing


def compare(first: Continuation, second: Continuation, noise: torch.Tensor) -> Row:
    """noise: f32 [num_tokens], standard deviation of the change of logits that numerics alone explain, by position."""
    total = len(second.tokens)
    same = next((i for i, (a, b) in enumerate(zip(first.tokens, second.tokens, strict=True)) if a != b), total)
    common = min(same + 1, total)  # the logits at the first difference still have the same context
    row: Row = {
        "identical_tokens": same,
        "total_tokens": total,
        "max_abs_logit_difference": float((first.logits[:common] - second.logits[:common]).abs().max()),
        "verdict": "identical",
        "margin": None,
        "noise": None,
    }
    if same < total:
        ours, theirs = first.tokens[same], second.tokens[same]
        margin = float(second.logits[same, theirs] - second.logits[same, ours])
        row |= {
            "verdict": "near tie" if margin <= NEAR_TIE_NOISES * float(noise[same]) else "DIFFERENT",
            "margin": margin,
            "noise": float(noise[same]),
            "first_difference": {
                "position": same,
                "first_token": ours,
                "second_token": theirs,
                "under_first": {"first_token": float(first.logits[same, ours]), "second_token": float(first.logits[same, theirs])},
                "under_second": {"first_token": float(second.logits[same, ours]), "second_token": float(second.logits[same, theirs])},
                "margin_under_first": float(first.logits[same, ours] - first.logits[same, theirs]),
                "margin_under_second": margin,
            },
        }
    return row


def compare_model(experiment: Experiment, name: str, path: Path, prompts: tuple[tuple[str, str, bool], ...], num_tokens: int) -> list[Row]:
    ours: dict[str, list[Continuation]] = {}
    ids: list[list[int]] = []
    texts: list[str] = []
    for dtype in ("float32", "bfloat16"):
        llm = LLM(path, config=EngineConfig(dtype=dtype, kv_cache_bytes=KV_CACHE_BYTES))
        engine = llm.engine
        ids = [
            engine.chat_template.encode([{"role": "user", "content": text}]) if chat else engine.tokenizer.encode(text)
            for _, text, chat in prompts
        ]
        ours[dtype] = []
        for (prompt_name, _, _), prompt in zip(prompts, ids, strict=True):
            experiment.log(f"{name}: ours {dtype}, {prompt_name} ({len(prompt)} tokens)")
            ours[dtype].append(continue_ours(llm, prompt, num_tokens))
        texts = [engine.tokenizer.decode(continuation.tokens) for continuation in ours[dtype]]
        experiment.settings.setdefault("model_fingerprints", {})[name] = engine.model_fingerprint
        engine.close()
    reference: dict[str, list[Continuation]] = {}
    noise: list[torch.Tensor] = []
    for label, torch_dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        model = load_reference(path, torch_dtype)
        reference[label] = []
        for index, prompt in enumerate(ids):
            experiment.log(f"{name}: transformers {label}, {prompts[index][0]}")
            reference[label].append(continue_reference(model, prompt, num_tokens))
            if label == "bf16":
                exact = reference["fp32"][index]
                noise.append((forced_reference(model, prompt, exact.tokens) - exact.logits).std(dim=1))
        del model
    rows: list[Row] = []
    for index, (prompt_name, _, _) in enumerate(prompts):
        fp32_noise = torch.full((num_tokens,), FP32_NOISE)
        for first, second, continuations, bound in (
            ("ours float32", "fp32", ours["float32"], fp32_noise),
            ("ours bfloat16", "bf16", ours["bfloat16"], noise[index] * math.sqrt(2)),
            ("ours bfloat16", "fp32", ours["bfloat16"], noise[index]),
            ("reference bf16", "fp32", reference["bf16"], noise[index]),
        ):
            row = compare(continuations[index], reference[second][index], bound)
            labels = {
                "model": name,
                "prompt": prompt_name,
                "prompt_tokens": len(ids[index]),
                "first": first,
                "second": f"reference {second}",
            }
            rows.append({**labels, **row, "text": texts[index]})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", action="append", help="catalogue name or path of a GGUF file; repeatable (default: the whole catalogue)")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens per prompt (default: 64)")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help=f"how many of the {len(PROMPTS)} prompts (default: all)")
    parser.add_argument("--output", type=Path, help="file for the JSON record")
    options = parser.parse_args()
    settings = {
        "tokens": options.tokens,
        "prompts": options.prompts,
        "transformers": transformers.__version__,
        "fp32_noise": FP32_NOISE,
        "near_tie_noises": NEAR_TIE_NOISES,
    }
    experiment = Experiment("compare", "transformers", settings=settings, output=options.output)
    rows: list[Row] = []
    for name in options.model or list(CATALOGUE):
        path = resolve_model(name)
        rows += compare_model(experiment, name if name in CATALOGUE else path.stem, path, PROMPTS[: options.prompts], options.tokens)
    summary: dict[str, Any] = {}
    for row in rows:
        counts = summary.setdefault(f"{row['first']} / {row['second']}", {"identical": 0, "near tie": 0, "DIFFERENT": 0})
        counts[row["verdict"]] += 1
    note = "; ".join(f"{pair}: " + ", ".join(f"{count} {verdict}" for verdict, count in counts.items()) for pair, counts in summary.items())
    experiment.finish(rows, columns=COLUMNS, summary={"verdicts": summary}, note=note)
    if any(row["verdict"] == "DIFFERENT" and row["first"].startswith("ours") for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
