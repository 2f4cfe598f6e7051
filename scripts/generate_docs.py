"""Writes what is derived: from code docs/cli.md, docs/configuration.md, docs/errors.md and docs/rooms.md, from results/
docs/results.md and a table in README.md.

    .venv/bin/python scripts/generate_docs.py

A test compares what this gives with what lies there, so the pages cannot drift.
"""

from __future__ import annotations

import ast
import dataclasses
import typing
from collections.abc import Iterator
from pathlib import Path
from types import UnionType

import click
import typer

from zen_turbo import errors
from zen_turbo.cli import DEBUG_ENVIRONMENT, app
from zen_turbo.config import PRESETS, EngineConfig, flag_of
from zen_turbo.evals.heatmap import length_text, read_json
from zen_turbo.evals.retrieval import answers_of, summarise
from zen_turbo.models.catalogue import CACHE_ENVIRONMENT
from zen_turbo.native import ISA_ENVIRONMENT, ISAS
from zen_turbo.server.keys import KEY_ENVIRONMENT

ROOT = Path(__file__).resolve().parent.parent
HEAD = "<!-- Written by scripts/generate_docs.py from the code; change that, not this. -->\n\n"
Option = typing.Any  # typer brings its own copies of click's classes, which differ by version


def pages() -> dict[str, str]:
    """Path below the root -> text."""
    return {
        "docs/cli.md": HEAD + cli_page(),
        "docs/configuration.md": HEAD + configuration_page(),
        "docs/errors.md": HEAD + errors_page(),
        "docs/rooms.md": HEAD + rooms_page(),
        "docs/results.md": HEAD.replace("the code", "results/*.json") + results_page(),
        "README.md": readme_page(),
    }


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines) + "\n"


def default_text(value: object) -> str:
    if value is None or value is False or value == ():
        return ""
    return "yes" if value is True else f"`{value}`"


# Commands


def commands(command: Option, path: str = "zen-turbo") -> Iterator[tuple[str, Option]]:
    children = getattr(command, "commands", None)
    if not children:
        yield path, command
        return
    for name, child in children.items():
        yield from commands(child, f"{path} {name}")


def cli_page() -> str:
    knobs = {knob.name for knob in dataclasses.fields(EngineConfig)}
    text = "# Commands\n\nAnswers, tables and records go to standard output, everything else to standard error. "
    text += "Exit status: 0, 1 for a mistake (`error [code]: message`, see [errors](errors.md)), 2 for a wrong flag, 130 for an interrupt.\n"
    text += "\n`zen-turbo --debug COMMAND` shows tracebacks, `zen-turbo --version` the version.\n"
    for path, command in commands(typer.main.get_command(app)):
        arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
        options = [parameter for parameter in command.params if parameter.param_type_name == "option"]
        usage = " ".join([path, *(argument_text(argument) for argument in arguments), "[OPTIONS]"])
        text += f"\n## `{path}`\n\n{click.formatting.wrap_text(command.help or '', 120)}\n\n```\n{usage}\n```\n"
        rows = []
        for option in options:
            names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
            if option.name not in knobs and "--help" not in option.opts:
                rows.append((names, default_text(option.default), option.help or ""))
        if rows:
            text += "\n" + table(("option", "default", "what"), rows)
        if any(option.name in knobs for option in options):
            text += "\nAnd every [engine setting](configuration.md) as a flag.\n"
    return text


def argument_text(argument: Option) -> str:
    name = argument.metavar or argument.name.upper()
    return name if argument.required else f"[{name}]"


# Settings


def configuration_page() -> str:
    text = "# Settings of the engine\n\nOne list for all faces: a flag of every command that runs a model, a keyword of `zen_turbo.LLM`, "
    text += "a field of `zen_turbo.EngineConfig`, a key in the record of every measurement. An unknown one is an error.\n\n"
    hints = typing.get_type_hints(EngineConfig)
    rows = []
    for knob in dataclasses.fields(EngineConfig):
        flag = flag_of(knob.name)
        if hints[knob.name] is bool:
            flag = f"{flag}/--no-{flag[2:]}"
        kind = ", ".join(f"`{choice}`" for choice in knob.metadata["choices"] or ()) or type_text(hints[knob.name])
        rows.append((f"`{knob.name}`", f"`{flag}`", kind, default_text(knob.default), knob.metadata["help"]))
    text += table(("field", "flag", "values", "default", "what"), rows)
    text += "\n# Environment variables\n\nRead once, at start.\n\n"
    return text + table(
        ("variable", "default", "what"),
        [
            (f"`{ISA_ENVIRONMENT}`", "the best of this CPU", f"Instruction set of the kernels: {', '.join(ISAS)}. An error where it is missing."),
            (f"`{CACHE_ENVIRONMENT}`", "`zen-turbo` in the user's cache folder", "Where downloaded models are kept."),
            (f"`{KEY_ENVIRONMENT}`", "", "An API key that the server asks for, beside those of its options."),
            (f"`{DEBUG_ENVIRONMENT}`", "", "Anything: show tracebacks, as `--debug`."),
        ],
    )


def type_text(hint: object) -> str:
    kinds = typing.get_args(hint) if isinstance(hint, UnionType) else (hint,)
    names = {int: "integer", str: "text", bool: "yes or no", float: "number"}
    return " or ".join(names[kind] for kind in kinds if kind in names)


# Errors


def errors_page() -> str:
    text = "# Errors\n\nEvery error that a user can cause has a code that does not change. The command line prints `error [code]: message` and "
    text += "exits with 1; the server answers with the status and `{\"error\": {\"code\": ...}}`; Python raises the class.\n\n"
    rows = []
    for kind in [errors.ZenTurboError, *below(errors.ZenTurboError)]:
        also = [base.__name__ for base in kind.__mro__ if base.__module__ == "builtins" and base not in (Exception, BaseException, object)]
        rows.append((f"`{kind.code}`", str(kind.http_status), f"`{kind.__name__}`", ", ".join(f"`{name}`" for name in also)))
    return text + table(("code", "HTTP status", "class", "is also"), rows)


def below(kind: type[errors.ZenTurboError]) -> Iterator[type[errors.ZenTurboError]]:
    for child in kind.__subclasses__():
        if child.__module__ == errors.__name__:
            yield child
            yield from below(child)


# Rooms


def rooms_page() -> str:
    text = "# Where things are\n\nOne room per idea, one line per file: the first of its own description.\n"
    rooms: dict[str, list[tuple[str, str]]] = {}
    package = ROOT / "src" / "zen_turbo"
    for path in sorted(package.rglob("*.py")):
        line = first_line(ast.get_docstring(ast.parse(path.read_text())) or "")
        if line:
            relative = path.relative_to(package)
            room = str(relative.parent) if relative.parent != Path(".") else "."
            rooms.setdefault(room, []).append((relative.name, line))
    for path in sorted((package / "server" / "page").iterdir()):
        line = first_line(comment_of(path.read_text()))
        if line:
            rooms.setdefault("server/page", []).append((path.name, line))
    for path in sorted((ROOT / "csrc").iterdir()):
        rooms.setdefault("csrc", []).append((path.name, first_line(comment_of(path.read_text()))))
    for room, files in sorted(rooms.items(), key=lambda item: (item[0] == "csrc", item[0])):
        title = {".": "src/zen_turbo", "csrc": "csrc"}.get(room, f"src/zen_turbo/{room}")
        text += f"\n## `{title}`\n\n" + table(("file", "what"), [(f"`{name}`", line) for name, line in files])
    return text


def first_line(docstring: str) -> str:
    """The first sentence, or the first paragraph where there is none, on one line."""
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    head, dot, _ = paragraph.partition(". ")
    return head + dot.strip()


def comment_of(source: str) -> str:
    lines = []
    for line in source.splitlines():
        if not line.startswith(("//", "/*", " *")):
            break
        lines.append(line.strip().removeprefix("/*").removeprefix("//").removeprefix("*").removesuffix("*/").strip())
    return "\n".join(lines)


# Results


def readme_page() -> str:
    text = (ROOT / "README.md").read_text()
    begin, end = "<!-- results: written by scripts/generate_docs.py from results/*.json -->\n", "<!-- /results -->"
    before, rest = text.split(begin)
    return before + begin + results_table({key: line for key, line in claims().items() if key in HEADLINES}) + end + rest.split(end)[1]


def results_page() -> str:
    """Everything that README's table is a part of, and what each preset keeps."""
    return (
        "# Results\n\nEvery number is computed from the record that its line names"
        + " ([how they are made](benchmarks.md), [what was tried](LOG.md)).\n\n"
        + results_table(claims(), of_presets=True)
        + "\n## Presets at 32K tokens\n\n"
        + presets_table()
        + "\n## Presets at 128K tokens\n\n"
        + far_table()
        + "\n## Facts among facts that look alike\n\n"
        + retrieval_table()
    )


Answer = dict[str, typing.Any]


def rows(name: str) -> list[dict[str, typing.Any]]:
    """Of a record. Raises where it is missing: no number without one."""
    return read_json(ROOT / "results" / name)["rows"]


def prefill_at(name: str, length: int) -> dict[str, typing.Any]:
    """The row of one length of a record of ``bench prefill``."""
    return next(row for row in rows(f"prefill_{name}.json") if row["length"] == length)


def fidelity_of(preset: str, length: int) -> list[dict[str, typing.Any]]:
    """The row of ``bench fidelity`` on code, encyclopedic text and a novel."""
    return [row for text in ("code", "qa", "novel") for row in rows(f"fidelity_{length // 1024}k_{text}_{preset}.json")]


def preset_cells(preset: str, length: int, seconds: float, dense_seconds: float, last: str = "kl") -> tuple[str, ...]:
    """Of a line of a table of presets: its name, what it takes, and what its records of ``bench fidelity`` have up to the column ``last``."""
    kept = fidelity_of(preset, length)
    columns = {"density": ".0%", "top1_agreement": ".1%", "kl": ".4f", "end_kl": ".4f"}
    shown = list(columns)[: list(columns).index(last) + 1]
    return (
        f"`--preset {preset}`" + (" (default)" if preset == EngineConfig().preset else ""),
        f"{seconds:.0f} s",
        f"{dense_seconds / seconds:{'.2f' if length < 65536 else '.1f'}}x",
        *(", ".join(format(row[column], columns[column]) for row in kept) for column in shown),
    )


PRESET_HEADER = ("", "first token", "faster", "block pairs read", "same next token as dense", "KL to dense")


def presets_table(length: int = 32768) -> str:
    """What each preset takes and keeps, from its records at one length."""
    dense, *times = (prefill_at(name, length)["ttft_s"] for name in ("dense", *PRESETS))
    lines = [("`--attention dense`", f"{dense:.0f} s", "1", "100 %", "100 %", "0", "`prefill_dense.json`")]
    lines += [(*preset_cells(preset, length, took, dense), f"`*_{preset}.json`") for preset, took in zip(PRESETS, times, strict=True)]
    caption = (
        f"\n{length:,} tokens. Times on code, the rest on code, encyclopedic text and a novel: the last 512 positions against dense attention."
        " `turbo` has 8-bit linear layers, too; `balanced` has them beyond 32K tokens.\n"
    )
    return table((*PRESET_HEADER, "records"), lines) + caption


def far_table(length: int = 131072) -> str:
    """The same at a length where dense attention takes a quarter of an hour, from the records of ``bench fidelity`` alone."""
    lines = []
    for preset in PRESETS:
        (code,) = rows(f"fidelity_{length // 1024}k_code_{preset}.json")
        cells = preset_cells(preset, length, code["prefill_s"], code["dense_prefill_s"], last="end_kl")
        lines.append((*cells, f"`fidelity_{length // 1024}k_*_{preset}.json`"))
    caption = f"\n{length:,} tokens, the same way. A prompt's end, where an answer begins, reads more than other rows.\n"
    return table((*PRESET_HEADER, "KL as a prompt's end", "records"), lines) + caption


def retrieval_table(lengths: tuple[int, ...] = (32768, 131072)) -> str:
    """Points of every preset and of dense attention on the same questions, of all seeds that both have records of, and probabilities of the right
    answer from those records that have them."""

    def cell(answers: list[tuple[Answer, ...]], kind: str) -> str:
        key, prefix = ("score", "") if kind == "score" else ("log_probability", "probability_")
        pairs = [pair for pair in answers if all(row[key] is not None for row in pair)]
        if not pairs:
            return ""
        mine, dense = zip(*pairs, strict=True)
        found = summarise(mine, dense)
        difference, error = (found[f"{prefix}{name}"] for name in ("versus_dense", "standard_error"))
        return f"{found[kind]:.1f}, {summarise(dense, None)[kind]:.1f}; {difference:+.1f} ± {error:.1f} ({len(pairs)})"

    lines = []
    asked = [*((f"`--preset {preset}`", "", preset) for preset in PRESETS), ("`--attention dense --kv-dtype int8`", "int8_", "dense")]
    for what, prefix, name in asked:
        pairs: dict[int, list[tuple[Answer, ...]]] = {length: [] for length in lengths}
        for length in lengths:
            for path in sorted((ROOT / "results").glob(f"retrieval_{length // 1024}k*_dense.json")):
                other = path.with_name(path.name.replace("retrieval_", f"retrieval_{prefix}").replace("_dense.json", f"_{name}.json"))
                if other.exists():
                    sides = (answers_of(read_json(each), length) for each in (other, path))
                    pairs[length] += zip(*([row for rows in side.values() for row in rows] for side in sides), strict=True)
        lines.append((what, *(cell(pairs[length], "score") for length in lengths), cell(pairs[lengths[0]], "probability")))
    header = (
        "",
        *(f"{length_text(length)}: points of 100, of dense attention; difference ± its standard error (questions)" for length in lengths),
        f"{length_text(lengths[0])}: probability of the right answer, where there is one, times 100",
    )
    caption = (
        "\nFacts that are hidden in code among a hundred that look alike (`retrieval_*.json`), of which this model itself finds few. Right or wrong"
        " is coarse: what is right at a probability of 4 % is wrong at the next change of a bit. So the probabilities say more.\n"
    )
    return table(header, lines) + caption


class Claim(typing.NamedTuple):
    """record: file names below results/, parted by commas; * stands for several."""

    what: str
    result: str
    record: str


# What README has of ``claims``.
HEADLINES = ("million", "million questions", "million against dense", "default questions", "default", "passkeys", "llama.cpp", "transformers")


def claims() -> dict[str, Claim]:
    """What the records say, a line each."""

    def joined(values: list[str]) -> str:
        return ", ".join([*values[:-2], " and ".join(values[-2:])])

    def questions(name: str, length: int) -> str:
        cold, warm, restart = (row["ttft_s"] for row in rows(name) if row["length"] == length)
        return f"{cold / 60:.1f} min, {warm:.1f} s, {restart:.1f} s"

    kernel, peers = rows("attention.json"), rows("llama_cpp.json")
    passkey = [row for path in sorted((ROOT / "results").glob("passkey_dense*.json")) for row in read_json(path)["rows"]]
    found = sum(row["correct"] for row in passkey)
    longest = length_text(max(row["length"] for row in passkey))
    greedy = [row for row in rows("transformers.json") if (row["first"], row["second"]) == ("ours float32", "reference fp32")]
    identical = sum(row["verdict"] == "identical" for row in greedy)
    narrow = {name: rows(f"prefill_{name}_avx2.json")[-1] for name in ("dense", "turbo", "balanced")}
    at_8k = prefill_at("dense", 8192)
    longest_records = [f"passkey_turbo_1m_{part}.json" for part in ("25", "lower_half", "0")]
    millions = sorted((row for name in longest_records for row in rows(name)), key=lambda row: row["depth"])
    million = next(row for row in rows(longest_records[0]) if not row["cached_tokens"])
    serve = {row["case"]: row for row in rows("serve.json")}
    while_reading = serve["short_during_long"]
    (load,) = rows("serve_load.json")
    page = {row["case"]: row for row in rows("page_novel.json")}
    megabytes = read_json(ROOT / "results" / "page_novel.json")["settings"]["bytes"] / 1e6
    near = [*rows("passkey_turbo.json"), *rows("passkey_turbo_128k.json")]
    farther, faithful = [*rows("passkey_turbo_256k.json"), *rows("passkey_turbo_512k.json")], rows("passkey_faithful.json")
    balanced = [*rows("passkey_balanced.json"), *rows("passkey_balanced_128k.json")]
    far = rows("marginal_128k_turbo.json")[-1]
    marginal = rows("marginal_1m_turbo.json")
    whole = [row for row in marginal if row["length"] == marginal[-1]["length"]]
    depths = joined([f"{row['depth']:g}" for row in millions])
    tokens = {way: [row for row in rows("decode_1m_code_turbo.json") if row["attention"] == way] for way in ("sparse", "dense")}
    preset = EngineConfig().preset
    default = [row for row in rows(f"decode_1000_code_{preset}.json") if row["attention"] == "sparse"]
    contexts = joined([f"{row['context']:,}" for row in default])
    first, dense_first = (prefill_at(name, 32768) for name in (preset, "dense"))
    kept = fidelity_of(preset, 32768)
    return {
        "million": Claim(
            f"Passkey at {depths} % of {million['length']:,} tokens (sparse prefill, preset turbo, 8-bit KV pages): minutes to the first token,"
            " over the linear layers alone, block pairs read, peak memory",
            f"{sum(row['correct'] for row in millions)} of {len(millions)} found: {million['ttft_s'] / 60:.0f} min,"
            f" {million['ttft_s'] / million['linear_floor_s']:.2f}x, {million['density']:.2%}, {million['peak_rss_gib']:.1f} GiB",
            ", ".join(longest_records),
        ),
        "million questions": Claim(
            "1,000,000 tokens of code with the same settings: first question, another one, the first one after a restart",
            questions("reuse_1m.json", 1000000),
            "reuse_1m.json",
        ),
        "default questions": Claim(
            "131,072 tokens of code with the default preset: the same three",
            questions("reuse_128k_balanced.json", 131072),
            "reuse_128k_balanced.json",
        ),
        "default": Claim(
            f"{first['length']:,} tokens of code with the default preset: first token, against dense attention; the same next token as dense"
            " attention in code, encyclopedic text and a novel",
            f"{first['ttft_s']:.0f} s, {dense_first['ttft_s'] / first['ttft_s']:.2f}x;"
            f" {joined([format(row['top1_agreement'], '.1%') for row in kept])}",
            f"prefill_dense.json, prefill_{preset}.json, fidelity_32k_*_{preset}.json",
        ),
        "turbo": Claim(
            f"{far['length']:,} tokens of code read with the preset turbo: against dense attention, and over the bf16 linear layers alone",
            f"{far['read_s']:.0f} s, {far['speedup']:.1f}x, {far['floor_ratio']:.2f}x",
            "marginal_128k_turbo.json",
        ),
        "million against dense": Claim(
            f"{whole[0]['length']:,} tokens of code with 8-bit KV pages, presets {joined([row['preset'] for row in whole])}: against dense attention,"
            " minutes, over the linear layers alone, block pairs read (dense attention and the last two presets added up from measured"
            " chunks)",
            "; ".join(
                f"{row['speedup']:.0f}x, {row['read_s'] / 60:.0f} min, {row['floor_ratio']:.2f}x, {row['density']:.1%}" for row in whole
            ),
            "marginal_1m_turbo.json",
        ),
        "tokens": Claim(
            "A token of an answer after 4,096, 131,072 and 1,000,000 tokens of code, with the settings of the first line; every page read",
            ", ".join(f"{row['tpot_ms']:.0f}" for row in tokens["sparse"])
            + " ms; "
            + ", ".join(f"{row['tpot_ms']:.0f}" for row in tokens["dense"])
            + " ms",
            "decode_1m_code_turbo.json",
        ),
        "default tokens": Claim(
            f"The same with the default preset and 8-bit KV pages after {contexts} tokens; places of 1,000 in which the"
            " next token is that of reading every page",
            ", ".join(f"{row['tpot_ms']:.0f}" for row in default) + f" ms; {default[-1]['top1_agreement']:.1%}",
            f"decode_1000_code_{preset}.json",
        ),
        "reading": Claim(
            f"A short question while {while_reading['long_tokens']:,} tokens are being read: first token, 95th percentile",
            f"{while_reading['ttft_p95_s']:.1f} s",
            "serve.json",
        ),
        "page": Claim(
            f"A novel of {megabytes:.0f} MB on the web page, {page['first']['prompt_tokens']:,} tokens: first words of an answer, of the next one",
            f"{page['first']['first_words_s'] / 60:.0f} min, {page['follow_up']['first_words_s']:.1f} s",
            "page_novel.json",
        ),
        "load": Claim(
            f"{load['clients']} clients at once for {load['minutes']:g} minutes, some of whom leave: "
            "requests; lost, failed, mixed up; memory afterwards",
            f"{load['requests']}; {load['lost']}, {load['errors']}, {load['mixed_up']}; {load['rss_growth_mib']:+.0f} MiB",
            "serve_load.json",
        ),
        "passkeys": Claim(
            f"Passkey found with the preset turbo in prompts of 4K to {length_text(near[-1]['length'])} tokens, eleven depths, and of"
            f" {joined([length_text(length) for length in sorted({row['length'] for row in farther})])}, five each",
            f"{sum(row['correct'] for row in [*near, *farther])} of {len(near) + len(farther)}",
            "passkey_turbo.json, passkey_turbo_128k.json, passkey_turbo_256k.json, passkey_turbo_512k.json",
        ),
        "dense passkeys": Claim(
            f"The same with dense attention, 4K to {longest} tokens (the model was trained on 32K)",
            f"{found} of {len(passkey)}",
            "passkey_dense*.json",
        ),
        "other passkeys": Claim(
            f"And with each of the presets balanced and faithful, 4K to {length_text(faithful[-1]['length'])} tokens, and balanced at"
            f" {length_text(balanced[-1]['length'])}, five depths",
            f"{sum(row['correct'] for row in [*balanced, *faithful])} of {len(balanced) + len(faithful)}",
            "passkey_balanced.json, passkey_balanced_128k.json, passkey_faithful.json",
        ),
        "llama.cpp": Claim(
            f"Time to first token against llama.cpp's best setting, {joined([length_text(row['length']) for row in peers])} tokens",
            joined([f"{row['ratio']:.1f}x" for row in peers]) + " faster",
            "llama_cpp.json",
        ),
        "avx2": Claim(
            f"A CPU with AVX2 alone: first token after {narrow['dense']['length']:,} tokens of code with dense attention, the presets"
            f" {joined([*narrow][1:])}",
            joined([f"{row['ttft_s'] / 60:.1f}" for row in narrow.values()])
            + f" min; {joined([format(narrow['dense']['ttft_s'] / row['ttft_s'], '.1f') + 'x' for name, row in narrow.items() if name != 'dense'])}",
            ", ".join(f"prefill_{name}_avx2.json" for name in narrow),
        ),
        "kernel": Claim(
            f"Attention kernel, share of the machine's bf16 GEMM peak, head_dim {joined([str(row['head_dim']) for row in kernel])}",
            joined([f"{row['vs_gemm']:.0%}" for row in kernel]),
            "attention.json",
        ),
        "sdpa": Claim(
            f"The same against torch's scaled_dot_product_attention ({joined([format(r['gemm_gflops'] / r['sdpa_gflops'], '.1f') for r in kernel])}x"
            " would be the GEMM peak)",
            joined([f"{row['vs_sdpa']:.1f}x" for row in kernel]),
            "attention.json",
        ),
        "share": Claim(
            "Share of an 8K prefill that is spent in GEMM and the attention kernel",
            f"{at_8k['gemm_attend_share']:.0%}",
            "prefill_dense.json",
        ),
        "transformers": Claim(
            "Greedy continuations of 64 tokens identical to transformers on the same weights (fp32, two models)",
            f"{identical} of {len(greedy)}",
            "transformers.json",
        ),
    }


def results_table(lines: dict[str, Claim], *, of_presets: bool = False) -> str:
    """Claims, and the machines that made their records; with ``of_presets`` those of the tables of presets, too."""
    records = [name for claim in lines.values() for name in claim.record.split(", ") if "*" not in name]
    if of_presets:
        records += [f"prefill_{name}.json" for name in ("dense", *PRESETS)] + [f"fidelity_128k_code_{preset}.json" for preset in PRESETS]
    machines: dict[str, list[str]] = {}
    for name in dict.fromkeys(records):
        machine = read_json(ROOT / "results" / name)["machine"]
        machines.setdefault(f"{machine['cores']} cores of an {machine['cpu']}", []).append(f"`{name}`")
    on = "; ".join(f"on {machine}: {', '.join(names)}" for machine, names in machines.items())
    caption = f"\nMeasured without a GPU, with the default model (0.5B), {on}.\n"
    cells = [(claim.what, claim.result, f"`{claim.record.replace(', ', '`, `')}`") for claim in lines.values()]
    return table(("what", "result", "record"), cells) + caption


if __name__ == "__main__":
    for name, content in pages().items():
        (ROOT / name).write_text(content)
