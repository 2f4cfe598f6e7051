"""Makes the records in results/ that take long: says what is there and what is missing, and runs what is missing, one thing at a time.

    .venv/bin/python scripts/measure.py                     what there is, what is missing, about how long it takes
    .venv/bin/python scripts/measure.py --run passkey_turbo fidelity_32k_*   run these, if their records are not there

A record is the last line of its command. Evaluations keep finished rows beside their record, so an interrupted one goes on where it was. Run it
on a machine that does nothing else, from a clean checkout: a record carries the commit, and says when the tree was dirty. Minutes are those
of a 2-core Zen 4; a Zen 5 takes about half.
"""

from __future__ import annotations

import argparse
import fnmatch
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from zen_turbo.bench.corpora import NAMES
from zen_turbo.config import PRESETS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"


class Measurement(NamedTuple):
    """minutes: about how long it takes; command: without --output."""

    minutes: int
    command: list[str]


def preset_of(name: str) -> list[str]:
    return ["--attention", "adaptive", "--preset", name]


def measurements() -> dict[str, Measurement]:
    found: dict[str, Measurement] = {}

    def add(name: str, minutes: int, *command: str) -> None:
        found[name] = Measurement(minutes, list(command))

    short, grid = "4096,8192,16384,32768,65536", ["--depths", "5"]
    add("passkey_turbo", 45, "eval", "passkey", "--lengths", short, "--depths", "11", "--seeds", "2", *preset_of("turbo"))
    add("passkey_turbo_128k", 35, "eval", "passkey", "--lengths", "131072", "--depths", "11", *preset_of("turbo"))
    parts = (("1m_0", 1000000, "0%", 55), ("1m_25", 1000000, "25%", 55), ("1m_lower_half", 1000000, "50,75,100", 110))
    for label, length, depths, minutes in (("256k", 262144, "5", 40), ("512k", 524288, "5", 90), *parts):
        options = ["--lengths", str(length), "--depths", depths, *preset_of("turbo"), "--kv-dtype", "int8"]
        add(f"passkey_turbo_{label}", minutes, "eval", "passkey", *options)
    add("passkey_balanced", 25, "eval", "passkey", "--lengths", short, *grid, *preset_of("balanced"))
    add("passkey_balanced_128k", 26, "eval", "passkey", "--lengths", "131072", *grid, *preset_of("balanced"))
    add("passkey_faithful", 25, "eval", "passkey", "--lengths", short, *grid, *preset_of("faithful"))
    # One record for each policy: the questions of a seed are the same, so their scores can be compared pair by pair.
    asked = [("32k", 32768, 200, 0, 60), ("128k", 131072, 100, 0, 150), *((f"32k_seed{seed}", 32768, 150, seed, 45) for seed in (1, 2))]
    for label, length, questions, seed, minutes in asked:
        options = ["--lengths", str(length), "--questions", str(questions), *(["--seed", str(seed)] if seed else [])]
        for name, policy, share in (("dense", "dense", 3), *((preset, f"adaptive:{preset}", 2) for preset in PRESETS)):
            add(f"retrieval_{label}_{name}", minutes * share // 4, "eval", "retrieval", "--attention", policy, *options)
            if seed or name not in ("dense", "balanced"):
                continue
            add(f"retrieval_int8_{label}_{name}", minutes * share // 4, "eval", "retrieval", "--attention", policy, "--kv-dtype", "int8", *options)
    for label, length in (("32k", 32768), ("128k", 131072)):
        for text in NAMES:
            keep = ["--lengths", str(length), "--texts", text, "--keep-dense", "logs/dense"]
            for preset in PRESETS:
                cost = (4 if label == "32k" else 20) if preset == "turbo" else (2 if label == "32k" else 9)
                add(f"fidelity_{label}_{text}_{preset}", cost, "bench", "fidelity", *preset_of(preset), *keep)
            for what, flags in (("int8", ["--kv-dtype", "int8"]), ("linear_int8", ["--linear-dtype", "int8"])):
                add(f"fidelity_{label}_{text}_{what}", 4 if label == "32k" else 38, "bench", "fidelity", "--attention", "dense", *flags, *keep)
            full = [*preset_of("turbo"), "--linear-dtype", "full"]
            add(f"fidelity_{label}_{text}_turbo_linear_full", 2 if label == "32k" else 9, "bench", "fidelity", *full, *keep)
    # One context, read once for both: the second run finds it in the store.
    for name in ("sparse", "dense"):
        options = ["--lengths", "131072", "--questions", "34", "--tasks", "multikey,kv", "--store", "logs/store_retrieval"]
        decoding = ["--attention", "adaptive:turbo", "--decode-attention", name]
        add(f"retrieval_decode_128k_{name}", 8 if name == "sparse" else 4, "eval", "retrieval", *decoding, *options)
    # With a preset's own linear layers these would be in bf16 up to 32K tokens only.
    rivals = {f"uniform_{mass}": ["--attention", "adaptive", "--fidelity", f"0.{mass}", "--linear-dtype", "full"] for mass in (80, 90, 95, 98)}
    selecting_in_torch = ("minference", "flexprefill", "xattention")  # these take longest
    rivals |= {name: ["--attention", name] for name in (*selecting_in_torch, "tri_shape")}
    for label, length, minutes, slow_minutes in (("32k", 32768, 2, 4), ("128k", 131072, 12, 32)):
        for text in NAMES:
            for name, policy in rivals.items():
                options = ["--lengths", str(length), "--texts", text, "--keep-dense", "logs/dense"]
                cost = slow_minutes if name in selecting_in_torch else minutes
                add(f"frontier/{name}_{label}_{text}", cost, "bench", "fidelity", *policy, *options)
    # These read a prompt's last chunk anew for each question, twice; 51 questions are those of the first of the four contexts of 200.
    for name, policy in rivals.items():
        questions, cost = ("51", 12) if name in selecting_in_torch else ("200", 24 if name == "tri_shape" else 9)
        add(f"frontier/retrieval_{name}_32k", cost, "eval", "retrieval", *policy, "--lengths", "32768", "--questions", questions)
    for preset, minutes in (("turbo", 9), ("balanced", 11), ("faithful", 16)):
        add(f"marginal_128k_{preset}", minutes, "bench", "marginal", *preset_of(preset), "--positions", "8192,32768,65536,131072")
        add(f"prefill_{preset}", 3, "bench", "prefill", *preset_of(preset), "--lengths", "4096,8192,16384,32768")
    add("prefill_dense", 5, "bench", "prefill", "--attention", "dense", "--lengths", "4096,8192,16384,32768")
    full = ["--linear-dtype", "full"]
    add("prefill_turbo_linear_full", 3, "bench", "prefill", *preset_of("turbo"), *full, "--lengths", "4096,8192,16384,32768")
    ends = ["--positions", "8192,32768,131072,262144,524288,999424", "--also", "balanced,faithful"]
    add("marginal_1m_turbo", 90, "bench", "marginal", *preset_of("turbo"), *ends, "--kv-dtype", "int8")
    decode = ["bench", "decode", "--contexts", "4096,32768,131072", "--tokens", "200"]
    for preset, minutes in (("turbo", 10), ("balanced", 15)):
        for text in NAMES:
            add(f"decode_{text}_{preset}", minutes, *decode, "--preset", preset, "--text", text)
            add(f"decode_int8_{text}_{preset}", minutes, *decode, "--preset", preset, "--text", text, "--kv-dtype", "int8")
    thousand = ["bench", "decode", "--contexts", "4096,131072", "--tokens", "1000"]
    code = ["--text", "code", "--kv-dtype", "int8", "--preset"]
    # The second finds in the store what the first has read.
    stored = [*code, "turbo", "--store", "logs/store_decode_1m"]
    add("decode_1m_code_turbo", 55, "bench", "decode", "--contexts", "4096,131072,1000000", "--tokens", "200", *stored)
    add("decode_1000_code_turbo", 10, *thousand, *stored)
    add("decode_1000_code_balanced", 18, *thousand, *code, "balanced")
    add("serve", 45, "bench", "serve", *preset_of("turbo"))
    add("serve_load", 20, "bench", "serve", "--cases", "load", *preset_of("turbo"))
    store = [*preset_of("turbo"), "--store"]
    add("reuse_128k", 10, "bench", "reuse", "--lengths", "4096,131072", *store, "logs/store_128k")
    default = [*preset_of("balanced"), "--store"]
    add("reuse_128k_balanced", 13, "bench", "reuse", "--lengths", "4096,131072", *default, "logs/store_128k_balanced")
    add("reuse_1m", 55, "bench", "reuse", "--lengths", "4096,1000000", "--kv-dtype", "int8", *store, "logs/store_1m")
    return found


def run(name: str, measurement: Measurement) -> None:
    output = RESULTS / f"{name}.json"
    command = [sys.executable, "-m", "zen_turbo", *measurement.command, "--output", str(output)]
    print(f"{name}: {' '.join(command[2:])}", flush=True)
    output.parent.mkdir(exist_ok=True)
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", nargs="+", metavar="PATTERN", help="names to run, with * and ? as in a shell")
    options = parser.parse_args()
    every = measurements()
    if options.run is None:
        for name, measurement in every.items():
            state = "there" if (RESULTS / f"{name}.json").exists() else f"about {measurement.minutes} min"
            print(f"{name:<40}{state:<16}zen-turbo {' '.join(measurement.command)}")
        return
    chosen = [name for name in every if any(fnmatch.fnmatch(name, pattern) for pattern in options.run)]
    if not chosen:
        raise SystemExit(f"No measurement has such a name: {', '.join(options.run)}.")
    for name in chosen:
        if not (RESULTS / f"{name}.json").exists():
            run(name, every[name])


if __name__ == "__main__":
    main()
