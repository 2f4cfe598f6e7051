"""Benchmarks: the record (last line of standard output, file, facts), inputs, and the arithmetic of rows. No time is asserted."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import subprocess
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from zen_turbo.bench import attention, fidelity, gemm, marginal, prefill, report, serve, text
from zen_turbo.cli import app
from zen_turbo.config import EngineConfig
from zen_turbo.engine.request import RequestMetrics, RequestOutput
from zen_turbo.errors import ConfigurationError, DocumentError, DocumentNotFoundError

# Fidelity


def test_distributions_are_compared_row_by_row() -> None:
    dense = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]])
    same = fidelity.compare(dense, dense + torch.tensor([[5.0], [-2.0]]))  # a constant in a row changes no distribution
    assert same.top1_agreement == 1
    assert same.kl == pytest.approx(0, abs=1e-12) and same.output_rel_error == pytest.approx(0, abs=1e-12)
    other = torch.tensor([[0.0, 3.0, 2.0], [3.0, 0.0, 0.0]])
    found = fidelity.compare(dense, other)
    p, q = dense.double().softmax(dim=1), other.double().softmax(dim=1)
    assert found.top1_agreement == 0.5
    assert found.kl == pytest.approx(float((p * (p / q).log()).sum() / 2))
    centred, moved = dense - dense.mean(dim=1, keepdim=True), other - other.mean(dim=1, keepdim=True)
    assert found.output_rel_error == pytest.approx(float((centred - moved).norm() / centred.norm()))


# Marginal costs


def test_a_dense_read_is_added_up_from_its_chunks() -> None:
    """Chunks whose time is linear in the position: 1 s and 0.01 s for each 100 tokens before."""

    def chunk(end: int) -> marginal.ChunkTime:
        return marginal.ChunkTime(end, 1 + end / 10_000)

    exact = sum(chunk(end).seconds for end in range(100, 5001, 100))
    measured = [chunk(end) for end in (1000, 3000, 4000)]
    assert marginal.read_s(measured, 5000, 100) == pytest.approx(exact)
    bent = [marginal.ChunkTime(100, 1.0), marginal.ChunkTime(200, 2.0), marginal.ChunkTime(400, 2.0)]
    assert marginal.read_s(bent, 400, 100) == pytest.approx(1 + 2 + 2 + 2)


# The report


def test_last_line_and_file_are_the_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "result.json"
    experiment = report.Experiment("bench", "demo", settings={"length": 8}, output=output)
    experiment.log("half way")
    rows = [{"length": 8, "ttft_s": 1.23456789, "recall": None, "ok": True}]
    experiment.finish(rows, columns=("length", "ttft_s", "recall", "ok"), summary={"total": 1})
    captured = capsys.readouterr()
    line = captured.out.splitlines()[-1]
    record = json.loads(line)
    assert output.read_text() == line + "\n"
    assert captured.err == "half way\n"
    assert record["bench"] == "demo" and record["total"] == 1 and record["settings"] == {"length": 8}
    assert record["rows"] == [{"length": 8, "ttft_s": 1.23457, "recall": None, "ok": True}]
    assert record["started"] <= record["finished"]
    assert {"cpu", "cores", "threads", "memory_gib", "kernel_isa", "torch", "python"} <= record["machine"].keys()
    for shown in ("length", "ttft_s", "1.235", "yes"):
        assert shown in captured.out.rsplit("\n", 2)[0]


def test_record_names_no_folders(capsys: pytest.CaptureFixture[str]) -> None:
    report.Experiment("bench", "demo", settings={}).finish([], columns=("length",))
    line = capsys.readouterr().out.splitlines()[-1]
    assert str(Path(__file__).resolve().parent.parent) not in line
    assert str(Path.home()) + "/" not in line


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (math.nan, None),
        (-math.inf, None),
        (True, True),
        (1234567.0, 1234570.0),
        (12345678, 12345678),
        ({"a": (1, 2.0)}, {"a": [1, 2.0]}),
        (Path("x"), "x"),
    ],
)
def test_tidy(value: object, expected: object) -> None:
    assert report.tidy(value) == expected
    assert type(report.tidy(value)) is type(expected)


def test_unwritable_output_is_refused_before_the_run(tmp_path: Path) -> None:
    for output in (tmp_path, tmp_path / "missing" / "result.json"):
        with pytest.raises(ConfigurationError) as caught:
            report.Experiment("bench", "demo", settings={}, output=output)
        assert caught.value.param == "output"


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "result.json"
    report.write_atomic(path, "old\n")

    def full(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        report.write_atomic(path, "new\n")
    assert path.read_text() == "old\n"
    assert os.listdir(tmp_path) == ["result.json"]


def test_git_facts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("GIT_")]:  # git sets these where tests run inside a hook
        monkeypatch.delenv(name)

    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false")
        return subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    source = tmp_path / "src" / "file.py"
    source.parent.mkdir()
    source.write_text("a = 1\n")
    git("init", "--quiet")
    assert report.git_facts(source) is None  # in a repository that does not know it
    git("add", "--", "src")
    git("commit", "--quiet", "-m", "first")
    commit = git("rev-parse", "HEAD")
    assert report.git_facts(source) == {"commit": commit, "dirty": False}
    (tmp_path / "results.json").write_text("{}")  # what cannot change a measurement does not count
    assert report.git_facts(source) == {"commit": commit, "dirty": False}
    (source.parent / "new.py").write_text("")
    assert report.git_facts(source) == {"commit": commit, "dirty": True}


def test_git_facts_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert report.git_facts() is None


# Attention


def test_shapes_pair_up() -> None:
    shapes = attention.parse_shapes([64, 128], ["14/2", "32/8"], [64, 128])
    assert [(s.length, s.q_heads, s.kv_heads, s.head_dim) for s in shapes] == [
        (64, 14, 2, 64),
        (64, 32, 8, 128),
        (128, 14, 2, 64),
        (128, 32, 8, 128),
    ]
    assert [s.head_dim for s in attention.parse_shapes([64], ["14/2", "4/4"], [80])] == [80, 80]
    assert [s.head_dim for s in attention.parse_shapes([64], ["14/2"], [64, 128])] == [64, 128]


@pytest.mark.parametrize(
    ("lengths", "heads", "head_dims", "param"),
    [
        ([64], ["14"], [64], "heads"),
        ([64], ["14/x"], [64], "heads"),
        ([64], ["14/4"], [64], "heads"),
        ([64], ["14/0"], [64], "heads"),
        ([0], ["14/2"], [64], "length"),
        ([64], ["14/2"], [72], "head_dim"),
        ([64], ["14/2", "4/4", "8/8"], [64, 128], "head_dim"),
    ],
)
def test_impossible_shapes_are_refused(lengths: list[int], heads: list[str], head_dims: list[int], param: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        attention.parse_shapes(lengths, heads, head_dims)
    assert caught.value.param == param


def test_causal_flops_count_every_pair_once() -> None:
    shape = attention.AttentionShape(length=5, q_heads=6, kv_heads=2, head_dim=64)
    pairs = sum(1 for query in range(5) for key in range(5) if key <= query)
    assert shape.flops == pairs * 6 * (2 * 64 + 2 * 64)


def test_reference_errors_see_a_wrong_head() -> None:
    shape = attention.AttentionShape(length=96, q_heads=6, kv_heads=2, head_dim=64)
    inputs = attention.make_inputs(shape)
    q, k, v = (t.float().transpose(0, 1) for t in inputs)
    scores = q @ k.repeat_interleave(3, 0).transpose(1, 2) / 8
    scores = scores.masked_fill(torch.ones(96, 96).triu(1).bool(), -math.inf)
    exact = (scores.softmax(-1) @ v.repeat_interleave(3, 0)).transpose(0, 1)
    wrong = exact.clone()
    wrong[7, 5, 3] += 0.5  # the last head is always among those checked
    (right_error, _), (wrong_error, wrong_mean) = attention.reference_errors(shape, inputs, [exact, wrong])
    assert right_error < 1e-4
    assert wrong_error == pytest.approx(0.5, abs=1e-4)
    assert 0 < wrong_mean < 0.01


def test_attention_bench_end_to_end(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "GENERAL_SHAPES", ((64, 64, 64), (32, 64, 128)))
    attention.run(lengths=[200], heads=["4/2"], head_dims=[64], repeats=2)
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["bench"] == "attention"
    (row,) = record["rows"]
    assert (row["length"], row["q_heads"], row["kv_heads"], row["head_dim"], row["dtype"]) == (200, 4, 2, 64, "bfloat16")
    assert row["vs_sdpa"] == pytest.approx(row["kernel_gflops"] / row["sdpa_gflops"], rel=1e-4)
    assert row["vs_gemm"] == pytest.approx(row["kernel_gflops"] / row["gemm_gflops"], rel=1e-4)
    assert row["gemm_shape"] in ([64, 64, 64], [32, 64, 128])
    # Rounding the probabilities and the output to bf16 costs at most 2^-8 of the largest output each.
    assert 0 < row["max_abs_error"] < 2**-7 * max(row["max_abs_output"], 1)


# GEMM


def test_gemm_rate_is_the_best_median(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = gemm.GemmBenchmark([(32, 64, 64), (64, 64, 64)])
    small, large = 2 * 32 * 64 * 64, 2 * 64 * 64 * 64
    routes = 2
    rounds = iter([t for small_s, large_s in ((1.0, 1.0), (0.5, 1.0), (1.0, 4.0)) for t in [small_s] * routes + [large_s] * routes])
    monkeypatch.setattr(gemm, "timed", lambda work: next(rounds))
    for _ in range(3):
        bench.sample()
    rate = bench.rate()
    assert rate.gflops == pytest.approx(large / 1e9)  # medians 1 s and 1 s
    assert rate.shape == (64, 64, 64)
    assert rate.best_gflops == pytest.approx(max(small / 0.5, large / 1.0) / 1e9)


def test_shapes_of_a_model() -> None:
    assert gemm.shapes_of_model([(8, 16), (16, 8), (8, 16)], rows=(1, 2)) == [(1, 8, 16), (2, 8, 16), (1, 16, 8), (2, 16, 8)]


# Prefill


def engine(**model: int) -> SimpleNamespace:
    shape = {"hidden_size": 8, "vocab_size": 100, "head_dim": 4, "num_attention_heads": 2, "num_hidden_layers": 3} | model
    return SimpleNamespace(
        model_config=SimpleNamespace(**shape), decoder=SimpleNamespace(linear_flops_per_token=1000), config=EngineConfig()
    )


def output(ttft_s: float, **metrics: float) -> RequestOutput:
    return RequestOutput(
        request_id="r",
        text="",
        token_ids=(1,),
        prompt_tokens=64,
        cached_tokens=0,
        finish_reason="length",
        metrics=RequestMetrics(ttft_s=ttft_s, **metrics),
    )


def test_prefill_row_adds_up() -> None:
    outputs = [
        output(9.0, linear_s=1.0, attend_s=1.0),
        output(4.0, linear_s=2.0, attend_s=1.0, select_s=0.5, density=0.25, recall=0.99),
        output(3.0, linear_s=1.0, attend_s=1.0),
    ]
    row = prefill.row_of(engine(), outputs, gemm.GemmRate(1e-6, 2e-6, (1, 1, 1), "mm"), prompt_sha256="x")
    assert row["ttft_s"] == 4.0 and row["ttft_all_s"] == [9.0, 4.0, 3.0]
    assert row["ttft_s"] == pytest.approx(row["linear_s"] + row["attend_s"] + row["select_s"] + row["other_s"])
    assert row["linear_floor_s"] == pytest.approx((64 * 1000 + 2 * 8 * 100) / 1e3)
    assert row["floor_ratio"] == pytest.approx(4.0 / 65.6)
    assert row["gemm_attend_share"] == pytest.approx(0.75)
    assert row["prompt_tokens_per_s"] == pytest.approx(16.0)
    assert (row["density"], row["recall"], row["attention"], row["length"]) == (0.25, 0.99, "adaptive", 64)
    assert row["attend_gflops"] == pytest.approx(0.25 * 3 * 2 * 4 * 4 * (64 * 65 // 2) / 1e9)


def test_attention_flops_after_a_cached_prefix() -> None:
    whole, prefix = prefill.attention_flops(engine(), 100), prefill.attention_flops(engine(), 40)
    assert prefill.attention_flops(engine(), 100, cached_tokens=40) == whole - prefix


@pytest.mark.parametrize(("lengths", "repeats", "param"), [([], 1, "lengths"), ([0], 1, "lengths"), ([8], 0, "repeats")])
def test_impossible_prefill_is_refused_before_loading(lengths: list[int], repeats: int, param: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        prefill.run(model="no such model", lengths=lengths, repeats=repeats)
    assert caught.value.param == param


# Scripts


def test_long_measurements_are_commands_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    """Parsed, not run: a flag that went away shows here and not after an hour."""
    found = load_script("measure.py").measurements()
    assert len(found) > 30
    for name, measurement in found.items():
        with pytest.raises(SystemExit) as caught:
            app(args=[*measurement.command, "--output", f"{name}.json", "--help"], prog_name="zen-turbo")
        assert caught.value.code == 0, (name, capsys.readouterr().err)


def load_script(name: str) -> ModuleType:
    path = Path(__file__).parent.parent / "scripts" / name
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_peer_row_takes_the_peer_at_its_best() -> None:
    script = load_script("compare_llama_cpp.py")
    tried = {script.Setting(flash, batch): float(batch * (3 if flash else 2)) for flash in (False, True) for batch in script.BATCHES}
    tried[script.Setting(True, 1024)] = 0.5
    off, on = script.finalists(tried)
    assert (off, on) == ((False, 512), (True, 1024))

    def answers(*seconds: float) -> list[dict[str, object]]:
        return [{"ttft_s": value, "token": 7, "peak_rss_gib": 1.0} for value in seconds]

    row = script.row_of(64, {None: answers(2.0, 9.0, 1.0), off: answers(8.0, 6.0, 7.0), on: answers(5.0, 90.0, 90.0)}, tried)
    assert (row["flash_attn"], row["n_ubatch"]) == (False, 512)
    assert (row["ttft_s"], row["zen_turbo_ttft_s"], row["ratio"]) == (7.0, 2.0, 3.5)
    assert len(row["settings_tried"]) == 6 and len(row["finalists"]) == 2


# Text


class Words:
    def encode(self, text: str) -> list[int]:
        return [len(word) for word in re.findall(r"\w+|[^\w\s]", text)]


def test_standard_library_text_is_exact_and_nested() -> None:
    long = text.read_tokens(Words(), 20_000)
    assert len(long) == 20_000
    assert text.read_tokens(Words(), 1_500) == long[:1_500]
    first = text.standard_library_files()[0].read_text("utf-8")
    assert Words().encode(first)[:200] == long[:200]


def test_text_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("three four\n")
    (tmp_path / "a.txt").write_text("one two\n")
    assert text.read_tokens(Words(), 4, tmp_path) == [3, 3, 5, 4]
    with pytest.raises(DocumentError, match="has only 4 tokens; 5 are needed"):
        text.read_tokens(Words(), 5, tmp_path)
    with pytest.raises(DocumentNotFoundError):
        text.read_tokens(Words(), 1, tmp_path / "missing")


def test_prompt_fingerprint_tells_prompts_apart() -> None:
    assert text.fingerprint([1, 23]) != text.fingerprint([12, 3])
    assert text.fingerprint([1, 2]) == text.fingerprint((1, 2))


# The server


def test_the_server_is_measured_from_outside(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "OVERHEAD_ROUNDS", 1)
    monkeypatch.setattr(serve, "SETTLE_S", 0.1)
    config = EngineConfig(prefill_chunk_tokens=128, kv_cache_bytes=10 << 20, max_model_len=4096, dtype="float32")
    record = serve.run(
        model=str(tiny_folder), cases=serve.CASES, long_tokens=3000, short_every_s=0.02, clients=4, minutes=0.03, config=config
    )
    overhead, mixed, load = record["rows"]
    assert [row["case"] for row in record["rows"]] == list(serve.CASES)
    assert overhead["offline_s"] > 0 and overhead["vs_offline"] == pytest.approx(overhead["served_s"] / overhead["offline_s"] - 1, rel=1e-3)
    assert mixed["short_requests"] >= 1 and 0 < mixed["ttft_p50_s"] <= mixed["ttft_p95_s"] <= mixed["ttft_max_s"]
    assert load["requests"] == load["finished"] + load["cancelled"] + load["errors"] + load["lost"] > 0
    assert (load["lost"], load["errors"], load["mixed_up"]) == (0, 0, 0), (load["lost_why"], load["error_codes"])
    for values in ({"cases": ["nothing"]}, {"clients": 0}, {"minutes": 0}):
        settings = {"model": str(tiny_folder), "cases": ["load"], "long_tokens": 1, "short_every_s": 1, "clients": 1, "minutes": 1, **values}
        with pytest.raises(ConfigurationError):
            serve.run(**settings, config=config)


def test_settings_become_flags() -> None:
    assert serve.flags_of(EngineConfig()) == []
    flags = serve.flags_of(EngineConfig(attention="dense", attention_temperature=False, kv_cache_bytes=5))
    assert flags == ["--attention", "dense", "--kv-cache-bytes", "5", "--no-attention-temperature"]
