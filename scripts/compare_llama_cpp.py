"""Time to first token of llama.cpp and of zen-turbo, in turns, on the same file, the same token ids and the same number of threads.

    ./scripts/compare_llama_cpp --model qwen2.5-coder-0.5b-instruct --lengths 4096,16384 --output results/llama_cpp.json

Each runtime lives in a process of its own and answers one prompt at a time; loading and a short warm-up are not measured. A time is from
the token ids to the first sampled token: the whole prompt evaluated, one greedy token chosen. Every repeat has another prompt (real text,
starting one token later), the same for both, and who goes first alternates. Medians.

llama.cpp runs at its best setting, which depends on machine and length: flash attention on and off times n_batch = n_ubatch of 512, 1024
and 2048, f16 KV cache. All six are tried once at the shortest length (``--sweep full``: at every length). The faster batch of each
flash-attention setting is then measured in every turn, and the better median of the two counts. All times are in the record.

This file is run by two interpreters: the worker for llama.cpp imports nothing of ours.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

WARM_UP_TOKENS = 128
BATCHES = (512, 1024, 2048)
COLUMNS = (
    "peer",
    "version",
    "length",
    "ttft_s",
    "zen_turbo_ttft_s",
    "ratio",
    "flash_attn",
    "n_ubatch",
    "first_token",
    "zen_turbo_first_token",
)


class Setting(NamedTuple):
    """Of llama.cpp."""

    flash_attn: bool
    n_ubatch: int


# Workers: read {"ids": [...]} lines, answer {"ttft_s", "token", "peak_rss_gib"} lines.


def serve(first_token: Callable[[list[int]], int], about: dict[str, Any]) -> None:
    """Answer prompts until standard input ends. ``first_token`` evaluates a whole prompt from nothing."""
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever a runtime prints must not mix with the answers

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    answer(about)
    for line in sys.stdin:
        ids = json.loads(line)["ids"]
        start = time.perf_counter()
        token = first_token(ids)
        seconds = time.perf_counter() - start
        answer({"ttft_s": seconds, "token": token, "peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20})


def llama_worker(settings: dict[str, Any]) -> None:
    import llama_cpp

    batch = settings["n_ubatch"]
    llama = llama_cpp.Llama(
        model_path=settings["model"],
        n_ctx=settings["n_ctx"],
        n_batch=batch,
        n_ubatch=batch,
        n_threads=settings["threads"],
        n_threads_batch=settings["threads"],
        flash_attn=settings["flash_attn"],
        verbose=False,
    )

    def first_token(ids: list[int]) -> int:
        llama.reset()
        llama.eval(ids)
        return llama.sample(temp=0.0)

    serve(first_token, {"version": llama_cpp.__version__, "system": llama_cpp.llama_print_system_info().decode().strip()})


def zen_turbo_worker(settings: dict[str, Any]) -> None:
    from zen_turbo import LLM, EngineConfig, SamplingParams, __version__

    llm = LLM(settings["model"], config=EngineConfig(attention="dense", num_threads=settings["threads"]))
    one_token = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)

    def first_token(ids: list[int]) -> int:
        llm.engine.reset_prefix_cache()  # a longer prompt begins with the shorter one
        output = llm.generate(ids, one_token)
        assert output.cached_tokens == 0, "the prompt was not read from its beginning"
        return output.token_ids[0]

    serve(first_token, {"version": __version__, "engine": llm.engine.config.to_dict(), "model_fingerprint": llm.engine.model_fingerprint})


# The comparison


class Worker:
    """A runtime in its own process. ``about`` is what it says of itself."""

    def __init__(self, python: str, kind: str, settings: dict[str, Any]) -> None:
        command = [python, __file__, "--worker", kind, "--settings", json.dumps(settings)]
        self._name = kind
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.about = self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"The {self._name} worker ended with status {self._process.wait()}; its messages are above.")
        return json.loads(line)

    def measure(self, ids: Sequence[int]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"ids": list(ids)}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.terminate()
        self._process.wait()


@contextmanager
def running(python: str, kind: str, settings: dict[str, Any], warm_up: Sequence[int]) -> Iterator[Worker]:
    worker = Worker(python, kind, settings)
    try:
        worker.measure(warm_up)
        yield worker
    finally:
        worker.close()


def finalists(tried: dict[Setting, float]) -> list[Setting]:
    """The fastest setting without and with flash attention; one trial each, so the choice between the two is left to the medians."""
    return [min((s for s in tried if s.flash_attn is flash), key=lambda s: tried[s]) for flash in (False, True)]


def row_of(length: int, runs: dict[Setting | None, list[dict[str, Any]]], tried: dict[Setting, float]) -> dict[str, Any]:
    """runs: answers by setting of llama.cpp, None for ours."""
    median = {setting: statistics.median(run["ttft_s"] for run in answers) for setting, answers in runs.items()}
    best = min((setting for setting in runs if setting is not None), key=lambda setting: median[setting])
    return {
        "peer": "llama.cpp",
        "length": length,
        "ttft_s": median[best],
        "zen_turbo_ttft_s": median[None],
        "ratio": median[best] / median[None],
        **best._asdict(),
        "ttft_all_s": [run["ttft_s"] for run in runs[best]],
        "zen_turbo_ttft_all_s": [run["ttft_s"] for run in runs[None]],
        "finalists": [{**setting._asdict(), "ttft_s": median[setting]} for setting in runs if setting is not None],
        "settings_tried": [{**setting._asdict(), "ttft_s": seconds} for setting, seconds in tried.items()],
        "peak_rss_gib": runs[best][-1]["peak_rss_gib"],
        "zen_turbo_peak_rss_gib": runs[None][-1]["peak_rss_gib"],
        "first_token": runs[best][0]["token"],
        "zen_turbo_first_token": runs[None][0]["token"],
    }


def compare(options: argparse.Namespace) -> None:
    from zen_turbo.bench.report import Experiment
    from zen_turbo.bench.text import fingerprint, read_tokens
    from zen_turbo.models.catalogue import resolve_model
    from zen_turbo.models.loader import load_checkpoint
    from zen_turbo.native import usable_cpus
    from zen_turbo.text.tokenizer import load_tokenizer

    path = resolve_model(options.model)
    threads = options.threads or usable_cpus()
    lengths = sorted({int(length) for length in options.lengths.split(",")})
    settings = {"model": path.stem, "threads": threads, "lengths": lengths, "repeats": options.repeats, "sweep": options.sweep}
    experiment = Experiment("bench", "peers", settings=settings | {"kv_cache": "f16"}, output=options.output)
    checkpoint = load_checkpoint(path)
    tokens = read_tokens(load_tokenizer(checkpoint.tokenizer_source), lengths[-1] + options.repeats)
    checkpoint.close()
    warm_up = tokens[-WARM_UP_TOKENS:]

    def llama(length: int, setting: Setting) -> dict[str, Any]:
        n_ctx = -(-(length + 1) // 256) * 256
        return {"model": str(path), "threads": threads, "n_ctx": n_ctx, **setting._asdict()}

    rows: list[dict[str, Any]] = []
    tried: dict[Setting, float] = {}
    tried_length = lengths[0]
    with running(sys.executable, "zen-turbo", {"model": str(path), "threads": threads}, warm_up) as ours:
        experiment.settings |= {"zen_turbo": ours.about}
        for length in lengths:
            if not tried or options.sweep == "full":
                tried_length = length
                for setting in (Setting(flash, batch) for flash in (False, True) for batch in BATCHES):
                    with running(options.llama_python, "llama.cpp", llama(length, setting), warm_up) as theirs:
                        tried[setting] = theirs.measure(tokens[:length])["ttft_s"]
                    experiment.log(f"{length} tokens, llama.cpp {setting._asdict()}: {tried[setting]:.2f} s")
            with ExitStack() as stack:
                peers: dict[Setting | None, Worker] = {None: ours}  # None: zen-turbo
                for setting in finalists(tried):
                    peers[setting] = stack.enter_context(running(options.llama_python, "llama.cpp", llama(length, setting), warm_up))
                    experiment.settings |= {"llama_cpp": peers[setting].about}
                runs: dict[Setting | None, list[dict[str, Any]]] = {setting: [] for setting in peers}
                for number in range(options.repeats):
                    for setting in list(peers) if number % 2 == 0 else reversed(peers):
                        run = peers[setting].measure(tokens[number : number + length])
                        runs[setting].append(run)
                        name = f"llama.cpp {setting._asdict()}" if setting else "zen-turbo"
                        experiment.log(f"{length} tokens, turn {number + 1} of {options.repeats}, {name}: {run['ttft_s']:.2f} s")
                version = experiment.settings["llama_cpp"]["version"]
            row = row_of(length, runs, tried) | {"settings_tried_length": tried_length}
            rows.append(row | {"version": f"llama-cpp-python {version}", "prompt_sha256": fingerprint(tokens[:length])})
    experiment.finish(rows, columns=COLUMNS, note="Medians; ratio: how many times as long llama.cpp takes.")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="qwen2.5-coder-0.5b-instruct", help="catalogue name or path of a GGUF file")
    parser.add_argument("--lengths", default="4096,16384", help="prompt tokens, comma-separated (default: 4096,16384)")
    parser.add_argument("--repeats", type=int, default=3, help="measured runs per length and runtime (default: 3)")
    parser.add_argument("--threads", type=int, help="threads of both (default: the CPUs this process may use)")
    parser.add_argument("--sweep", choices=("quick", "full"), default="quick", help="which llama.cpp settings are tried at longer lengths")
    parser.add_argument("--output", type=Path, help="file for the JSON record")
    parser.add_argument("--llama-python", default=".venv-llama/bin/python", help="interpreter that has llama-cpp-python")
    parser.add_argument("--worker", choices=("llama.cpp", "zen-turbo"), help=argparse.SUPPRESS)
    parser.add_argument("--settings", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker == "llama.cpp":
        llama_worker(options.settings)
    elif options.worker == "zen-turbo":
        zen_turbo_worker(options.settings)
    else:
        compare(options)


if __name__ == "__main__":
    main()
