"""The command line as users run it: exit status, what goes to which stream, the last line, and mistakes. The model is a tiny random one."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import openai
import pytest
from made_documents import docx_of, epub_of, pdf_of, zip_of

from zen_turbo.cli import main
from zen_turbo.cli.serve import listen
from zen_turbo.config import EngineConfig
from zen_turbo.models.catalogue import CATALOGUE, cached_path

ROOM = ("--kv-cache-bytes", str(64 << 20), "--prefill-chunk-tokens", "128", "--max-model-len", "2048")
COMMAND = (sys.executable, "-m", "zen_turbo")


class Ran(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def record(self) -> dict[str, Any]:
        return json.loads(self.out.splitlines()[-1])


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.delenv("ZEN_TURBO_DEBUG", raising=False)

    def call(*arguments: str | Path) -> Ran:
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        code = caught.value.code
        return Ran(code if isinstance(code, int) else int(code is not None), *capfd.readouterr())

    return call


@pytest.fixture
def document(tmp_path: Path) -> Path:
    path = tmp_path / "notes.txt"
    path.write_text("The sky is blue. The sun is yellow.\n" * 5)
    return path


# ask


def test_the_answer_is_all_of_standard_output(run: Any, tiny_folder: Path, document: Path) -> None:
    first = run("ask", "What is blue?", document, "--model", tiny_folder, "--max-tokens", "8", *ROOM)
    again = run("ask", "What is blue?", document, "--model", tiny_folder, "--max-tokens", "8", *ROOM)
    assert first.status == 0
    assert first.out == again.out, "greedy"
    assert "document(s)" in first.err and "first token after" in first.err
    assert re.search(r"prompt [\d,]+ tokens.*answer \d+ tokens.*attention adaptive on \w+.*peak memory", first.err)
    assert "first token" not in first.out


def test_a_folder_is_read_and_what_was_left_out_is_said(run: Any, tiny_folder: Path, document: Path) -> None:
    (document.parent / "picture.bin").write_bytes(b"\x00\xff\xfe")
    ran = run("ask", "What is blue?", document.parent, "--model", tiny_folder, "--max-tokens", "2", *ROOM)
    assert ran.status == 0
    assert "1 files were left out" in ran.err and "picture.bin" in ran.err
    assert "1 document(s)" in ran.err


def test_every_format_can_be_asked_about(run: Any, tiny_folder: Path, tmp_path: Path) -> None:
    archive = zip_of({"e.txt": "!", "f.txt": "?"})
    files = {"a.pdf": pdf_of("The sky"), "b.docx": docx_of("is"), "c.epub": epub_of({"x.xhtml": "blue."}), "d.zip": archive}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    ran = run("ask", "What?", *(tmp_path / name for name in files), "--model", tiny_folder, "--max-tokens", "2", *ROOM)
    assert ran.status == 0 and "5 document(s)" in ran.err
    ran = run("ask", "What?", tmp_path, "--model", tiny_folder, "--max-tokens", "2", *ROOM)
    assert "3 document(s)" in ran.err and "d.zip is an archive inside a folder" in ran.err


def test_an_answer_cut_off_says_so(run: Any, tiny_folder: Path, document: Path) -> None:
    ran = run("ask", "What is blue?", document, "--model", tiny_folder, "--max-tokens", "1", *ROOM)
    assert "reached --max-tokens" in ran.err


def expect_mistake(ran: Ran, code: str, *words: str) -> None:
    assert ran.status == 1
    assert f"error [{code}]: " in ran.err
    for word in words:
        assert word in ran.err
    assert "Traceback" not in ran.err + ran.out
    assert ran.out.strip() == ""


def test_mistakes_are_one_line_with_a_code(run: Any, tiny_folder: Path, document: Path, tmp_path: Path) -> None:
    binary = tmp_path / "program"
    binary.write_bytes(b"\x7fELF\x02\x01\x01\x00" * 100)
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    ask = ("ask", "What is blue?")
    model = ("--model", tiny_folder)
    expect_mistake(run(*ask, tmp_path / "missing.txt", *model), "document_not_found", "missing.txt")
    expect_mistake(run(*ask, binary, *model), "binary_document", "program")
    expect_mistake(run(*ask, empty, *model), "unreadable_document", "empty.txt")
    expect_mistake(run("ask", "  ", document, *model), "empty_prompt")
    expect_mistake(run(*ask, document, "--model", "no-such-model"), "model_not_found", *CATALOGUE)
    expect_mistake(run(*ask, document, "--model", document), "corrupt_file", "notes.txt")
    expect_mistake(run(*ask, document, *model, "--temperature", "-1"), "invalid_request", "temperature")
    expect_mistake(run(*ask, document, *model, "--prefill-chunk-tokens", "100"), "invalid_configuration", "100")
    expect_mistake(run(*ask, document, *model, "--attention", "magic"), "invalid_configuration", "magic")


def test_a_document_that_is_too_long_is_refused_with_both_numbers(run: Any, tiny_folder: Path, document: Path) -> None:
    document.write_text("The sky is blue. " * 2000)
    ran = run("ask", "What is blue?", document, "--model", tiny_folder, *ROOM)
    expect_mistake(ran, "context_length_exceeded", "2048")
    assert re.search(r"resulted in \d{4,} tokens", ran.err)


def test_memory_that_does_not_suffice_is_refused_with_both_numbers(run: Any, tiny_folder: Path, document: Path) -> None:
    ran = run("ask", "What is blue?", document, "--model", tiny_folder, "--kv-cache-bytes", str(64 << 10))
    expect_mistake(ran, "insufficient_memory", "needs", "GiB can be used")


def test_an_unknown_flag_is_a_usage_error(run: Any, document: Path) -> None:
    assert run("ask", "What is blue?", document, "--no-such-flag").status == 2
    assert run("ask").status == 2


def test_a_traceback_is_shown_when_asked_for(run: Any, tmp_path: Path, tiny_folder: Path) -> None:
    ran = run("--debug", "ask", "What is blue?", tmp_path / "missing.txt", "--model", tiny_folder)
    assert ran.status == 1
    assert "Traceback" in ran.err and "error [document_not_found]" in ran.err
    os.environ.pop("ZEN_TURBO_DEBUG")


def test_every_knob_is_a_flag(run: Any) -> None:
    shown = run("ask", "--help").out
    for name in EngineConfig().to_dict():
        assert f"--{name.replace('_', '-')}" in shown


# doctor, pull


def test_doctor_says_what_was_found(run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ZEN_TURBO_CACHE", str(tmp_path))
    facts = run("doctor", "--json").record
    assert facts["kernels"]["isa"] in facts["kernels"]["available"]
    assert facts["cache_folder"] == str(tmp_path)
    assert [model["name"] for model in facts["models"]] == list(CATALOGUE)
    assert not any(model["present"] for model in facts["models"])
    text = run("doctor").out
    for word in ("CPU", "kernel", "linear layers", "threads", "memory", "cache", *CATALOGUE, "not here"):
        assert word in text


def test_pull_prints_the_path(run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ZEN_TURBO_CACHE", str(tmp_path))
    path = cached_path(CATALOGUE["smollm2-135m-instruct"])
    path.parent.mkdir(parents=True)
    path.write_bytes(b"as if pulled before")
    ran = run("pull", "smollm2-135m-instruct")
    assert (ran.status, ran.out.strip()) == (0, str(path))
    expect_mistake(run("pull", "no-such-model"), "model_not_found")


# bench, eval: the record is the last line, with the keys that others read


def expect_record(record: dict[str, Any]) -> None:
    assert record["machine"]["cpu"] and record["machine"]["kernel_isa"]
    assert record["git"] is None or re.fullmatch(r"[0-9a-f]{40}", record["git"]["commit"])
    assert record["settings"] and record["rows"]


def test_bench_attention(run: Any, tmp_path: Path) -> None:
    output = tmp_path / "attention.json"
    ran = run("bench", "attention", "--length", "256", "--heads", "4/2", "--head-dim", "64", "--repeats", "1", "--output", output)
    assert ran.status == 0
    assert ran.record["bench"] == "attention"
    assert ran.record == json.loads(output.read_text())
    (row,) = ran.record["rows"]
    keys = "length q_heads kv_heads head_dim dtype kernel_gflops sdpa_gflops gemm_gflops vs_sdpa vs_gemm max_abs_error"
    assert set(keys.split()) <= set(row)
    assert 0 < row["max_abs_error"] < 0.1
    expect_record(ran.record)


def test_bench_prefill(run: Any, tiny_folder: Path, document: Path) -> None:
    document.write_text("The sky is blue. The sun is yellow. There and back again.\n" * 200)
    ran = run("bench", "prefill", "--model", tiny_folder, "--lengths", "300,600", "--text", document, "--attention", "dense", *ROOM)
    assert ran.status == 0
    assert ran.record["bench"] == "prefill"
    assert [row["length"] for row in ran.record["rows"]] == [300, 600]
    keys = "length attention ttft_s linear_floor_s floor_ratio attend_s select_s density recall peak_rss_gib prompt_tokens_per_s"
    for row in ran.record["rows"]:
        assert set(keys.split()) <= set(row)
        assert row["attention"] == "dense" and row["density"] == 1
        assert row["cached_tokens"] == 0
    assert ran.record["settings"]["engine"]["prefill_chunk_tokens"] == 128
    expect_record(ran.record)


def test_bench_fidelity(run: Any, tiny_folder: Path, tmp_path: Path) -> None:
    arguments = ("bench", "fidelity", "--model", tiny_folder, "--lengths", "1000", "--texts", "code", *ROOM)
    sparse = (*arguments, "--attention", "adaptive", "--dense-tokens", "256", "--fidelity", "0.5", "--keep-dense", tmp_path)
    record = run(*sparse).record
    (row,) = record["rows"]
    assert record["bench"] == "fidelity"
    keys = "length text attention preset density recall_mean recall_p5 output_rel_error top1_agreement kl prefill_s dense_prefill_s"
    assert set(keys.split()) <= set(row)
    assert (row["text"], row["attention"], row["preset"]) == ("code", "adaptive", "balanced")
    assert 0 < row["density"] < 1 and 0 < row["recall_mean"] < 1 and row["kl"] > 0
    expect_record(record)
    assert len(list(tmp_path.glob("*.pt"))) == 1
    again = run(*sparse).record["rows"][0]
    assert {name: again[name] for name in row if name != "prefill_s"} == {name: row[name] for name in row if name != "prefill_s"}
    plain = (*arguments, "--attention", "dense")
    (quantised,) = run(*plain, "--kv-dtype", "int8", "--keep-dense", tmp_path).record["rows"]
    assert (quantised["attention"], quantised["kv_dtype"], quantised["density"]) == ("dense", "int8", 1)
    assert 0 < quantised["kl"] < row["kl"] and quantised["recall_mean"] is None
    assert len(list(tmp_path.glob("*.pt"))) == 1, "the dense pass over unquantised pages is the same one"
    fresh = run(*plain, "--kv-dtype", "int8").record["rows"][0]
    assert fresh["kl"] == quantised["kl"], "kept or read again"
    expect_mistake(run(*plain), "invalid_configuration", "dense")
    expect_mistake(run(*sparse[:5], "512", *sparse[6:]), "invalid_configuration", "512")
    expect_mistake(run(*sparse, "--texts", "music"), "invalid_configuration", "music")


def test_bench_marginal(run: Any, tiny_folder: Path) -> None:
    arguments = ("bench", "marginal", "--model", tiny_folder, "--attention", "adaptive", "--dense-tokens", "256", *ROOM)
    record = run(*arguments, "--positions", "512,1024,1280").record
    assert record["bench"] == "marginal"
    assert [row["length"] for row in record["rows"]] == [512, 1024, 1280]
    reads = [row["read_s"] for row in record["rows"]]
    assert reads == sorted(reads) and all(row["dense_chunk_s"] > 0 and row["density"] <= 1 for row in record["rows"])
    expect_record(record)
    assert all(row["measured"] for row in record["rows"])
    expect_mistake(run(*arguments, "--positions", "512,1024", "--also", "turbo"), "invalid_configuration", "8192")
    expect_mistake(run(*arguments, "--positions", "512"), "invalid_configuration", "two")
    expect_mistake(run(*arguments, "--positions", "500,1024"), "invalid_configuration", "128")


def test_bench_marginal_of_other_presets(run: Any, tiny_folder: Path) -> None:
    arguments = ("bench", "marginal", "--model", tiny_folder, "--attention", "adaptive", "--preset", "turbo", "--also", "turbo,faithful")
    room = ("--kv-cache-bytes", str(64 << 20), "--prefill-chunk-tokens", "2048", "--context-extension", "dca")
    rows = run(*arguments, "--positions", "8192,16384", *room).record["rows"]
    assert [(row["length"], row["preset"], row["measured"]) for row in rows] == [
        (length, preset, measured)
        for length in (8192, 16384)
        for preset, measured in (("turbo", True), ("turbo", False), ("faithful", False))
    ]
    reader, first, faithful = rows[3:]
    assert first["window_density"] == reader["density"], "it read the same windows, with the same that was known"
    assert (first["recall"], first["recall_p5"]) == (reader["recall"], reader["recall_p5"])
    assert faithful["window_density"] > first["window_density"]
    assert len({row["dense_chunk_s"] for row in rows[3:]}) == 1
    assert all(row["density"] <= 1 and row["read_s"] > 0 and row["speedup"] > 0 for row in rows)


def test_cache(run: Any, tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "store"
    expect_mistake(run("cache", "ls", "--store", folder), "invalid_configuration", "no store")
    document = tmp_path / "text.txt"
    document.write_text("abc def " * 200)
    assert run("ask", "What?", document, "--model", tiny_folder, "--max-tokens", "2", "--store", folder, *ROOM).status == 0
    facts = json.loads(run("cache", "stats", "--store", folder).out)
    assert facts["segments"] == facts["identities"] == 1 and facts["bytes"] > 0
    line = run("cache", "ls", "--store", folder).out
    assert "adaptive attention" in line and "1 segments" in line
    sound = run("cache", "verify", "--store", folder)
    assert sound.status == 0 and "0 damaged" in sound.out
    (records,) = folder.glob("*/*.pages")
    records.write_bytes(records.read_bytes()[:-1])
    damaged = run("cache", "verify", "--store", folder)
    assert damaged.status == 1 and "1 damaged" in damaged.out
    expect_mistake(run("cache", "rm", "--store", folder), "invalid_configuration", "--all")
    expect_mistake(run("cache", "rm", "zzz", "--store", folder), "invalid_configuration", "zzz")
    assert run("cache", "rm", line.split()[0], "--store", folder).status == 0
    assert json.loads(run("cache", "stats", "--store", folder).out)["segments"] == 0


def test_bench_decode(run: Any, tiny_folder: Path, tmp_path: Path) -> None:
    arguments = ("bench", "decode", "--model", tiny_folder, "--dense-tokens", "256", "--decode-dense-tokens", "256", "--decode-pages", "4", *ROOM)
    record = run(*arguments, "--contexts", "128,1024", "--tokens", "40").record
    assert record["bench"] == "decode"
    assert [(row["context"], row["attention"]) for row in record["rows"]] == [(c, a) for c in (128, 1024) for a in ("dense", "sparse")]
    assert all(row["tpot_ms"] > 0 for row in record["rows"])
    short, long = (row for row in record["rows"] if row["attention"] == "sparse")
    assert short["recall"] is None and short["top1_agreement"] == 1 and short["kl"] == 0, "a short context is read whole"
    assert 0 < long["recall"] < 1 and long["kl"] > 0
    assert (short["cached_tokens"], long["cached_tokens"]) == (0, 128), "the longer prompt begins with the shorter one"
    expect_record(record)
    again = ("--contexts", "1024", "--tokens", "40", "--store", tmp_path)
    cold, warm = (run(*arguments, *again).record["rows"][1] for _ in range(2))
    assert cold["cached_tokens"] == 0 and warm["cached_tokens"] >= 768, "the second time it comes from the store"
    assert all(row["kl"] == long["kl"] for row in (cold, warm)), "and nothing else is different"
    expect_mistake(run(*arguments, "--contexts", "100"), "invalid_configuration", "64")
    expect_mistake(run(*arguments, "--contexts", "128", "--attention", "fast"), "invalid_configuration", "dense, sparse, snapkv")


def test_bench_reuse(run: Any, tiny_folder: Path, tmp_path: Path) -> None:
    arguments = ("bench", "reuse", "--model", tiny_folder, *ROOM)
    record = run(*arguments, "--lengths", "1000").record
    assert record["bench"] == "reuse"
    cold, warm = record["rows"]
    assert (cold["case"], cold["cached_tokens"], cold["share"]) == ("cold", 0, 1)
    assert warm["case"] == "warm" and warm["cached_tokens"] >= 768 and warm["identical"]
    expect_record(record)
    stored = (*arguments, "--lengths", "500,1000", "--store", tmp_path)
    rows = run(*stored).record["rows"]
    assert [(row["length"], row["case"]) for row in rows] == [(length, case) for length in (500, 1000) for case in ("cold", "warm", "restart")]
    assert rows[3]["cached_tokens"] == 0, "a longer document begins with none of the shorter one's pages"
    assert rows[5]["cached_tokens"] >= 768 and rows[5]["identical"]
    assert rows[0]["tpot_ratio"] == 1 and rows[5]["tpot_ms"] > 0
    expect_mistake(run(*stored), "invalid_configuration", "empty folder")
    expect_mistake(run(*arguments, "--lengths", "50"), "invalid_configuration", "96")


def test_eval_passkey(run: Any, tiny_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "passkey.json"
    arguments = ("eval", "passkey", "--model", tiny_folder, "--lengths", "400", "--depths", "2", "--seeds", "1", "--output", output, *ROOM)
    ran = run(*arguments)
    assert ran.status == 0
    record = ran.record
    assert (record["eval"], record["total"]) == ("passkey", 2)
    assert record["correct"] == sum(row["correct"] for row in record["rows"])
    for row in record["rows"]:
        assert set("length prompt_tokens depth seed expected answer correct".split()) <= set(row)
        assert 300 < row["prompt_tokens"] <= 400
    expect_record(record)
    alone = run("eval", "passkey", "--model", tiny_folder, "--lengths", "400", "--depths", "2", "--seeds", "1", "--no-share-prefix", *ROOM)
    assert [row["cached_tokens"] for row in alone.record["rows"]] == [0, 0]
    assert [row["answer"] for row in alone.record["rows"]] == [row["answer"] for row in record["rows"]], "cached is cold"
    resumed = run(*arguments)
    assert resumed.record["resumed"]["rows"] == 2
    assert resumed.record["rows"] == record["rows"]
    # On another day: the journal is gone, the record is there; the grid grows, and other settings share nothing.
    output.with_name(output.name + ".rows.jsonl").unlink()
    grown = run(*(str(argument).replace("2", "3") if argument == "2" else argument for argument in arguments)).record
    assert (grown["resumed"]["rows"], grown["total"]) == (2, 3)
    output.with_name(output.name + ".rows.jsonl").unlink()
    assert run(*arguments, "--attention", "dense").record["resumed"]["rows"] == 0
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "0/1" in output.with_suffix(".html").read_text()
    assert run("eval", "heat-map", output, output, "--html", tmp_path / "both.html").status == 0
    assert "0/2" in (tmp_path / "both.html").read_text()
    (tmp_path / "other.json").write_text('{"rows": [{"length": 3}]}')
    expect_mistake(run("eval", "heat-map", tmp_path / "other.json", "--html", tmp_path / "x.html"), "invalid_configuration", "other.json")
    expect_mistake(run("eval", "heat-map", output), "invalid_configuration", "--png")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("bench", "attention", "--heads", "14"), "14"),
        (("bench", "attention", "--heads", "5/2"), "5"),
        (("bench", "attention", "--length", "8x"), "8x"),
        (("bench", "prefill", "--lengths", "0"), "lengths"),
        (("eval", "passkey", "--depths", "0"), "depths"),
        (("eval", "passkey", "--depths", "many"), "many"),
        (("eval", "passkey", "--depths", "0,200"), "200"),
    ],
)
def test_impossible_measurements(run: Any, tiny_folder: Path, arguments: tuple[str, ...], word: str) -> None:
    model = () if arguments[1] == "attention" else ("--model", tiny_folder)
    expect_mistake(run(*arguments, *model), "invalid_configuration", word)


def test_an_output_that_cannot_be_written_is_refused_before_the_work(run: Any, tmp_path: Path) -> None:
    output = tmp_path / "no" / "such" / "folder.json"
    expect_mistake(run("bench", "attention", "--output", output), "invalid_configuration", "folder.json")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--max-requests-per-key", "2"), "keys"),
        (("--api-key", ""), "empty"),
        (("--api-key-file", "/nowhere/keys"), "/nowhere/keys"),
        (("--max-queue", "0"), "max_queue"),
        (("--max-body-bytes", "-1"), "max_body_bytes"),
        (("--allow-origin", "chat.example"), "chat.example"),
        (("--log-format", "xml"), "xml"),
        (("--drain-s", "-1"), "drain_s"),
    ],
)
def test_a_server_that_makes_no_sense_is_not_started(run: Any, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], word: str) -> None:
    monkeypatch.delenv("ZEN_TURBO_API_KEY", raising=False)
    expect_mistake(run("serve", "--port", "0", *arguments), "invalid_configuration", word)


# As processes


def start(arguments: Sequence[str | Path], **values: Any) -> subprocess.Popen[str]:
    return subprocess.Popen([*COMMAND, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **values)


def test_serve_answers_and_ends_when_told(tiny_folder: Path) -> None:
    process = start(["serve", "--model", tiny_folder, "--port", "0", "--served-model-name", "tiny", *ROOM])
    try:
        assert process.stderr is not None
        address = ""
        for line in process.stderr:
            if match := re.search(r"listening on (http://127\.0\.0\.1:\d+)", line):
                address = match[1]
                break
        assert address
        deadline = time.monotonic() + 60
        while httpx.get(f"{address}/health").status_code != 200:
            assert time.monotonic() < deadline, "the model was never loaded"
            time.sleep(0.1)
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            messages: Any = [{"role": "user", "content": "The grass is green."}]
            answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=4, temperature=0)
        assert answer.usage is not None and answer.usage.completion_tokens == 4
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
        assert process.returncode in (0, 130, -signal.SIGINT)
    finally:
        process.kill()
        process.communicate()


def test_serve_refuses_a_folder_that_it_cannot_use(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    process = start(["serve", "--port", "0", "--files-dir", tmp_path / "file"])
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "error [invalid_configuration]" in err and "Traceback" not in err


def test_tokens_are_sent_at_once() -> None:
    with closing(listen("127.0.0.1", 0)) as listener, closing(socket.create_connection(listener.getsockname())):
        connection, _ = listener.accept()
        with closing(connection):
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_serve_says_why_it_ends(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + b"\xff" * 60)
    process = start(["serve", "--model", broken, "--port", "0"])
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "error [" in err and "Traceback" not in err


def test_an_interrupt_ends_with_130(tiny_folder: Path, document: Path) -> None:
    document.write_text("The sky is blue. " * 30)
    process = start(["ask", "Why?", document, "--model", tiny_folder, "--max-tokens", "100000", "--max-model-len", "1048576"])
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if "document(s)" in line:
                break
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130
        assert "Traceback" not in err
    finally:
        process.kill()
        process.communicate()
