"""``zen-turbo eval passkey``: can the model find one sentence at any depth of a prompt of any length?

A necessary test, not a sufficient one: it fails loudly when positions, pages, spans or selection are wrong, and says little about reading.
Greedy, 16 new tokens, through the chat template; an answer is correct if its first run of digits is the key.

Order. Prompts of all lengths, depths and seeds begin with the same noise, and the engine keeps the last request's whole chunks. Two
prompts share what precedes the shallower of their keys, so within a (length, seed) any monotone order of depths reuses the most that is
possible: all but the deepest key's noise. Directions alternate between groups, so that one ends and the next begins with the deepest key
and shares that too. Reuse is exact (the grid of chunks is absolute), and every row says how many tokens came from it: ``ttft_s`` is what
was paid after it.

Every finished row goes to a journal (``journal.py``), so an interrupted run continues; the rows of a finished record that ``--output`` names are
taken over too if its settings are the same, so a grid can grow on another day. With ``--output FILE.json`` the heat map lies beside it, as
FILE.png and FILE.html.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from zen_turbo.bench.gemm import GemmBenchmark, shapes_of_model
from zen_turbo.bench.prefill import attention_flops, engine_facts, linear_flops, preset_of
from zen_turbo.bench.report import GIB, Experiment, Row, print_table, tidy
from zen_turbo.config import EngineConfig
from zen_turbo.engine.engine import Engine
from zen_turbo.engine.memory import peak_rss_bytes
from zen_turbo.engine.request import RequestOutput, SamplingParams
from zen_turbo.errors import ConfigurationError, ContextLengthExceededError, InsufficientMemoryError
from zen_turbo.evals import heatmap
from zen_turbo.evals.heatmap import read_record
from zen_turbo.evals.journal import Journal
from zen_turbo.evals.passkey_prompt import GENERATOR_VERSION, PasskeyPrompt, is_correct, make_prompt
from zen_turbo.llm import LLM
from zen_turbo.progress import prefill_bar

MAX_NEW_TOKENS = 16
GREEDY = SamplingParams(temperature=0.0, max_tokens=MAX_NEW_TOKENS)
COLUMNS = ("length", "prompt_tokens", "depth", "seed", "expected", "answer", "correct", "cached_tokens", "ttft_s", "density")


class Cell(NamedTuple):
    """One prompt of the grid: length in tokens, depth in percent."""

    length: int
    depth: float
    seed: int


def depths_of(wanted: int | Sequence[float]) -> list[float]:
    """So many depths evenly from 0 to 100 percent (one alone is the middle), or the ones given, ascending."""
    if not isinstance(wanted, int):
        if not wanted or not all(0 <= depth <= 100 for depth in wanted):
            raise ConfigurationError(f"depths are percentages from 0 to 100, not {', '.join(map(str, wanted))}.", param="depths")
        return sorted(set(wanted))
    count = wanted
    if count < 1:
        raise ConfigurationError(f"depths must be at least 1, not {count}.", param="depths")
    if count == 1:
        return [50.0]
    return [round(100 * index / (count - 1), 4) for index in range(count)]


def plan(lengths: Sequence[int], depths: int | Sequence[float], num_seeds: int) -> list[Cell]:
    """Every cell, in the order that reuses the most (see the module's docstring): lengths ascend, depths go up and down in turns."""
    if not lengths or min(lengths) < 1:
        raise ConfigurationError("lengths must be positive.", param="lengths")
    if num_seeds < 1:
        raise ConfigurationError(f"seeds must be at least 1, not {num_seeds}.", param="seeds")
    percent = depths_of(depths)
    cells: list[Cell] = []
    for group, (length, seed) in enumerate((length, seed) for length in sorted(set(lengths)) for seed in range(num_seeds)):
        cells += [Cell(length, depth, seed) for depth in (reversed(percent) if group % 2 else percent)]
    return cells


def shared_tokens(cells: Sequence[Cell], chunk_tokens: int) -> list[int]:
    """About how many tokens each cell finds in the pages of the one before it."""
    keys = [int(cell.length * cell.depth / 100) for cell in cells]
    shared = [0] + [min(before, own) for before, own in itertools.pairwise(keys)]
    return [tokens - tokens % chunk_tokens for tokens in shared]


class CostModel:
    """Predicts seconds per cell: FLOPs of the linear layers and of dense attention over the GEMM rate measured now, then corrected by what
    finished cells took. Sparse policies start out overestimated."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        gemm = GemmBenchmark(shapes_of_model(engine.decoder.linear_shapes(), rows=(512,)))
        gemm.sample()
        self._flops_per_s = gemm.rate().gflops * 1e9
        self._predicted_s = 0.0
        self._measured_s = 0.0

    def linear_floor_s(self, output: RequestOutput) -> float:
        """What the linear layers alone need for the tokens that were read, at the GEMM rate measured when this began."""
        return linear_flops(self._engine, output.prompt_tokens - output.cached_tokens) / self._flops_per_s

    def _raw_s(self, length: int, cached_tokens: int) -> float:
        linear = linear_flops(self._engine, length - cached_tokens)
        return (linear + attention_flops(self._engine, length, cached_tokens=cached_tokens)) / self._flops_per_s

    def learn(self, length: int, cached_tokens: int, seconds: float) -> None:
        self._predicted_s += self._raw_s(length, cached_tokens)
        self._measured_s += seconds

    def remaining_s(self, cells: Iterable[tuple[Cell, int]]) -> float:
        correction = self._measured_s / self._predicted_s if self._predicted_s else 1.2
        return correction * sum(self._raw_s(cell.length, cached) for cell, cached in cells)


def evaluate(
    cells: Sequence[Cell],
    make: Callable[[Cell], PasskeyPrompt],
    generate: Callable[[list[int]], RequestOutput],
    *,
    journal: Journal,
    facts: Callable[[RequestOutput], Row],
    on_row: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Answer every cell that the journal does not hold yet; rows of all cells in the order of the plan. ``facts`` joins every row. Errors of
    ``generate`` pass through, with everything finished by then in the journal."""
    rows = []
    for cell in cells:
        row = journal.get(tuple(cell))
        if row is None:
            prompt = make(cell)
            output = generate(prompt.token_ids)
            row = tidy(row_of(cell, prompt, output) | facts(output))
            journal.add(row)
            on_row(row)
        rows.append(row)
    return rows


def row_of(cell: Cell, prompt: PasskeyPrompt, output: RequestOutput) -> Row:
    metrics = output.metrics
    return {
        "length": cell.length,
        "prompt_tokens": output.prompt_tokens,
        "depth": cell.depth,
        "seed": cell.seed,
        "expected": prompt.key,
        "answer": output.text,
        "correct": is_correct(output.text, prompt.key),
        "needle_position": prompt.needle_position,
        "num_units": prompt.num_units,
        "units_before": prompt.units_before,
        "cached_tokens": output.cached_tokens,
        "ttft_s": metrics.ttft_s,
        "linear_s": metrics.linear_s,
        "attend_s": metrics.attend_s,
        "select_s": metrics.select_s,
        "decode_s": metrics.decode_s,
        "density": metrics.density,
        "recall": metrics.recall,
        "recall_p5": metrics.recall_p5,
        "finish_reason": output.finish_reason,
        "peak_rss_gib": peak_rss_bytes() / GIB,
    }


def grid(rows: Sequence[Row]) -> tuple[list[str], list[Row]]:
    """Columns and rows of the heat map as a table: one line per length, correct/total per depth."""
    depths = sorted({row["depth"] for row in rows})
    names = [f"{depth:g} %" for depth in depths]
    lines: list[Row] = []
    for length in sorted({row["length"] for row in rows}):
        line: Row = {"length": length}
        for depth, name in zip(depths, names, strict=True):
            found = [row["correct"] for row in rows if row["length"] == length and row["depth"] == depth]
            line[name] = f"{sum(found)}/{len(found)}"
        lines.append(line)
    return ["length", *names], lines


def check_fits(engine: Engine, longest: int) -> None:
    """Refuse before hours of work what the engine would refuse at the last length."""
    if longest + MAX_NEW_TOKENS > engine.max_model_len:
        raise ContextLengthExceededError(
            num_prompt_tokens=longest, max_tokens=MAX_NEW_TOKENS, max_model_len=engine.max_model_len, param="lengths"
        )
    need, have = engine.geometry.bytes_for(longest + MAX_NEW_TOKENS), engine.pool.num_slots * engine.geometry.slot_bytes
    if need > have:
        raise InsufficientMemoryError(f"A prompt of {longest} tokens", need_bytes=need, have_bytes=have)


def journal_path(output: Path | None, resume: Path | None) -> Path | None:
    """``--resume`` if given, else beside ``--output``, else none."""
    if resume is not None:
        return resume
    return output.with_name(output.name + ".rows.jsonl") if output is not None else None


def key_of(settings: Mapping[str, Any]) -> Row:
    """What decides an answer beside the cell, from a record's settings; knobs that it does not know yet have their defaults."""
    config = EngineConfig.from_dict({**EngineConfig().to_dict(), **settings["engine"]}).to_dict()
    names = ("generator_version", "model_fingerprint", "policy")
    return {"eval": "passkey", **{name: settings.get(name) for name in names}, **config}


def rows_of_record(path: Path, key: Row) -> tuple[list[Row], str | None]:
    """The rows of a finished record and their commit: none if it is of another model, other settings or other prompts."""
    try:
        record = read_record(path)
        if tidy(key_of(record["settings"])) != tidy(key):
            return [], None
        return record["rows"], (record.get("git") or {}).get("commit")
    except (ConfigurationError, KeyError, TypeError):
        return [], None


def run(
    *,
    model: str,
    lengths: Sequence[int],
    depths: int | Sequence[float] = 11,
    seeds: int = 1,
    config: EngineConfig | None = None,
    share_prefix: bool = True,
    resume: Path | None = None,
    output: Path | None = None,
) -> dict[str, Any]:
    """Run the grid, print the report, return the record. Raises ConfigurationError, ContextLengthExceededError or InsufficientMemoryError
    before any prompt is read, and the engine's own errors."""
    cells = plan(lengths, depths, seeds)
    settings = {"lengths": sorted(set(lengths)), "depths": depths_of(depths), "seeds": seeds, "share_prefix": share_prefix}
    experiment = Experiment("eval", "passkey", settings=settings, output=output)
    llm = LLM(model, config=config)
    engine = llm.engine
    check_fits(engine, max(lengths))
    facts = engine_facts(engine)
    experiment.settings |= {**facts, "max_new_tokens": MAX_NEW_TOKENS, "generator_version": GENERATOR_VERSION}
    key = key_of({**facts, "generator_version": GENERATOR_VERSION})
    with Journal(journal_path(output, resume), key, Cell._fields, commit=experiment.git["commit"] if experiment.git else None) as journal:
        if output is not None and output.exists():
            journal.adopt(*rows_of_record(output, key))
        found = sum(journal.get(tuple(cell)) is not None for cell in cells)
        rows = _run_cells(experiment, llm, cells, journal, share_prefix=share_prefix)
        resumed = {"rows": found, "commits": sorted(str(commit) for commit in journal.commits)}
    rows.sort(key=lambda row: (row["length"], row["seed"], row["depth"]))
    correct = sum(row["correct"] for row in rows)
    columns, lines = grid(rows)
    print_table("correct answers by length and depth of the key", lines, columns)
    summary = {"correct": correct, "total": len(rows), "accuracy": correct / len(rows), "resumed": resumed}
    record = experiment.finish(rows, columns=COLUMNS, summary=summary, note=f"{correct} of {len(rows)} correct.")
    if output is not None:
        heatmap.save(rows, title=title_of([record]), png=output.with_suffix(".png"), page=output.with_suffix(".html"))
    return record


def title_of(records: Sequence[Mapping[str, Any]]) -> str:
    """Says what a heat map of these records shows: model, policy, score."""
    settings = records[0]["settings"]
    correct, total = (sum(record[name] for record in records) for name in ("correct", "total"))
    return f"passkey, {settings['model']}, {settings['engine']['attention']} attention: {correct} of {total} found"


def _run_cells(experiment: Experiment, llm: LLM, cells: Sequence[Cell], journal: Journal, *, share_prefix: bool) -> list[Row]:
    engine = llm.engine
    todo = [cell for cell in cells if journal.get(tuple(cell)) is None]
    if not todo:
        experiment.log(f"passkey: all {len(cells)} prompts were answered before.")
        return [row for cell in cells if (row := journal.get(tuple(cell))) is not None]
    shared = shared_tokens(todo, engine.config.prefill_chunk_tokens) if share_prefix else [0] * len(todo)
    cost = CostModel(engine)
    tokens, reused = sum(cell.length for cell in todo), sum(shared)
    experiment.log(
        f"passkey: {len(todo)} prompts ({len(cells) - len(todo)} done before), {tokens:,} tokens, about {reused:,} of them reused; "
        f"roughly {duration(cost.remaining_s(zip(todo, shared, strict=True)))}."
    )
    done = 0
    started = time.perf_counter()

    def make(cell: Cell) -> PasskeyPrompt:
        return make_prompt(
            lambda text: engine.chat_template.encode([{"role": "user", "content": text}]),
            lambda ids: engine.tokenizer.decode(list(ids)),
            length=cell.length,
            depth=cell.depth,
            seed=cell.seed,
        )

    def generate(token_ids: list[int]) -> RequestOutput:
        nonlocal started
        if not share_prefix:
            engine.reset_prefix_cache()
        started = time.perf_counter()
        with prefill_bar(f"{done + 1}/{len(todo)} {len(token_ids)} tokens") as on_event:
            return llm.generate(token_ids, GREEDY, on_event=on_event)

    def on_row(row: Row) -> None:
        nonlocal done
        done += 1
        cost.learn(row["prompt_tokens"], row["cached_tokens"], time.perf_counter() - started)
        left = cost.remaining_s(zip(todo[done:], shared[done:], strict=True))
        verdict = "correct" if row["correct"] else f"WRONG: {row['answer']!r} is not {row['expected']}"
        experiment.log(
            f"[{done}/{len(todo)}] {row['prompt_tokens']} tokens, depth {row['depth']:g} %, seed {row['seed']}: {verdict}, "
            f"{row['ttft_s']:.1f} s ({row['cached_tokens']} tokens cached); {duration(left)} left"
        )

    def facts(output: RequestOutput) -> Row:
        return {"attention": engine.config.attention, "preset": preset_of(engine), "linear_floor_s": cost.linear_floor_s(output)}

    return evaluate(cells, make, generate, journal=journal, facts=facts, on_row=on_row)


def duration(seconds: float) -> str:
    """For people: "40 s", "12 min", "3 h 20 min"."""
    if seconds < 90:
        return f"{math.ceil(seconds)} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"
