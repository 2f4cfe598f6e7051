"""nvidia-long-context-eval (RULER) against a server: python nvidia_client.py BASE_URL MODEL TOKENIZER_FOLDER. Two tasks are made, asked through
the chat route and through the completions route, and scored; exits with an error if an answer is missing or the scorer does not read it."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

TASKS = ("niah_single_1", "fwe")  # vt never ends with a tokenizer of little more than letters: its example has to fit into 500 tokens
SAMPLES = 3
LENGTH = 2048
TIMEOUT_S = 280


def main(base_url: str, name: str, tokenizer: str) -> None:
    programs = Path(sys.executable).parent
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "nltk", "tokenizers", "punkt").mkdir(parents=True)  # the scorer would fetch it otherwise, and does not use it
        environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1", "NLTK_DATA": str(Path(folder, "nltk"))}
        out = Path(folder, name, "synthetic", str(LENGTH), "pred")
        for mode, path in (("chat", "chat/completions"), ("completion", "completions")):
            command = [
                str(programs / "long_context_eval"), "--url", f"{base_url}/{path}", "--mode", mode, "--model", name,
                "--tokenizer_type", "hf", "--tokenizer_path", tokenizer, "--tasks", ",".join(TASKS), "--max_seq_length", str(LENGTH),
                "--num_samples", str(SAMPLES), "--threads", "2", "--timeout", "60", "--result_dir", folder,
            ]
            run(command, environment)
            check(out)
            shutil.rmtree(out)  # else the other mode would find it done; what was made to be asked stays


def run(command: list[str], environment: dict[str, str]) -> None:
    """It asks again for ever where a request fails, in a process of its own: the whole group ends with the time."""
    process = subprocess.Popen(
        command, env=environment, start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        output, _ = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"it did not end:\n{output[-4000:]}") from None
    assert process.returncode == 0, output[-4000:]


def check(predictions: Path) -> None:
    for task in TASKS:
        rows = [json.loads(line) for line in (predictions / f"{task}.jsonl").read_text().splitlines()]
        assert sorted(row["index"] for row in rows) == list(range(SAMPLES)), rows
        assert all(row["pred"] for row in rows), rows
    scores = json.loads((predictions / "per_sample_scores.json").read_text())
    assert {task: len(scores[task]) for task in TASKS} == dict.fromkeys(TASKS, SAMPLES), scores
    summary = {row[0]: row[1:] for row in csv.reader((predictions / "summary.csv").read_text().splitlines())}
    assert summary["Tasks"] == list(TASKS) and all(0 <= float(score) <= 100 for score in summary["Score"]), summary
    assert summary["Nulls"] == [f"0/{SAMPLES}"] * len(TASKS), summary


if __name__ == "__main__":
    main(*sys.argv[1:4])
    print("ok")
