"""``zen-turbo bench ...`` and ``zen-turbo eval ...``: a table and, as the last line of standard output, one JSON record."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated

import typer

from zen_turbo.cli.ask import DEFAULT_MODEL, MODEL_HELP
from zen_turbo.cli.engine_flags import engine_options
from zen_turbo.config import EngineConfig
from zen_turbo.errors import ConfigurationError

bench_app = typer.Typer(help="Measure speed.", no_args_is_help=True)
eval_app = typer.Typer(help="Measure answers.", no_args_is_help=True)

Model = Annotated[str, typer.Option("--model", "-m", help=MODEL_HELP)]
Output = Annotated[Path | None, typer.Option(help="Also keep the record in this file.")]


def integers(text: str, param: str) -> list[int]:
    """'4096,32768' or '4K,32K' -> [4096, 32768]. Raises ConfigurationError."""
    values = []
    for part in text.split(","):
        digits = part.strip().upper()
        unit = {"K": 1024, "M": 1024 * 1024}.get(digits[-1:], 1)
        digits = digits[:-1] if unit > 1 else digits
        if not digits.isdecimal() or int(digits) == 0:
            raise ConfigurationError(f"{param} must be positive integers separated by commas, not {text!r}.", param=param)
        values.append(int(digits) * unit)
    return values


def depths_from(text: str) -> int | list[float]:
    """'11' -> 11, '0,25,90' -> [0, 25, 90], '25%' -> [25]. Raises ConfigurationError."""
    try:
        return [float(part.strip().removesuffix("%")) for part in text.split(",")] if "," in text or "%" in text else int(text)
    except ValueError:
        raise ConfigurationError(f"depths must be a number of depths or percentages separated by commas, not {text!r}.", param="depths") from None


@bench_app.command("attention")
def bench_attention(
    length: Annotated[str, typer.Option(help="Prompt lengths in tokens, separated by commas; 8K is 8192.")] = "8192",
    heads: Annotated[str, typer.Option(help="Query and key/value heads as Q/KV, separated by commas.")] = "14/2",
    head_dim: Annotated[str, typer.Option(help="Head dimensions, separated by commas: one for all heads or one each.")] = "64",
    repeats: Annotated[int, typer.Option(help="Turns of kernel, SDPA and GEMM; the figures are medians.")] = 5,
    num_threads: Annotated[int | None, typer.Option(help="Compute threads. Default: the CPUs this process may use.")] = None,
    output: Output = None,
) -> None:
    """The prefill attention kernel against torch's SDPA and the bf16 GEMM peak."""
    from zen_turbo.bench import attention

    attention.run(
        lengths=integers(length, "length"),
        heads=heads.split(","),
        head_dims=integers(head_dim, "head_dim"),
        repeats=repeats,
        num_threads=num_threads,
        output=output,
    )


@bench_app.command("prefill")
@engine_options
def bench_prefill(
    model: Model = DEFAULT_MODEL,
    lengths: Annotated[str, typer.Option(help="Prompt lengths in tokens, separated by commas; 8K is 8192.")] = "4096,16384",
    repeats: Annotated[int, typer.Option(help="Runs of each length; the figures are the median run's.")] = 1,
    text: Annotated[Path | None, typer.Option(help="File or folder to read. Default: the Python standard library.")] = None,
    output: Output = None,
    *,
    config: EngineConfig,
) -> None:
    """Time to first token of real text, and where it goes."""
    from zen_turbo.bench import prefill

    prefill.run(model=model, lengths=integers(lengths, "lengths"), config=config, repeats=repeats, text=text, output=output)


@bench_app.command("fidelity")
@engine_options
def bench_fidelity(
    model: Model = DEFAULT_MODEL,
    lengths: Annotated[str, typer.Option(help="Prompt lengths in tokens, separated by commas; 8K is 8192.")] = "32768",
    texts: Annotated[str, typer.Option(help="Kinds of text, separated by commas: code, novel, qa.")] = "code,novel,qa",
    keep_dense: Annotated[Path | None, typer.Option(help="Folder in which the dense pass is kept for the next measurement.")] = None,
    output: Output = None,
    *,
    config: EngineConfig,
) -> None:
    """What a sparse policy changes in the next-token distributions, against dense attention."""
    from zen_turbo.bench import fidelity

    fidelity.run(
        model=model, lengths=integers(lengths, "lengths"), texts=texts.split(","), config=config, keep_dense=keep_dense, output=output
    )


@bench_app.command("marginal")
@engine_options
def bench_marginal(
    model: Model = DEFAULT_MODEL,
    positions: Annotated[str, typer.Option(help="Ends of chunks at which to time a dense chunk too, separated by commas.")] = "16384,32768",
    text: Annotated[str, typer.Option(help="What to read: code, novel, qa.")] = "code",
    also: Annotated[str | None, typer.Option(help="Other presets whose chunks to time at these positions too, separated by commas.")] = None,
    output: Output = None,
    *,
    config: EngineConfig,
) -> None:
    """What one more chunk costs at a position, sparse and dense, and what a dense read would have cost."""
    from zen_turbo.bench import marginal

    others = also.split(",") if also else []
    marginal.run(model=model, positions=integers(positions, "positions"), text=text, config=config, also=others, output=output)


@bench_app.command("decode")
@functools.partial(engine_options, without=("attention", "decode_attention"))
def bench_decode(
    model: Model = DEFAULT_MODEL,
    contexts: Annotated[str, typer.Option(help="Context lengths in tokens, multiples of 64, separated by commas; 8K is 8192.")] = "4096,16384",
    modes: Annotated[str, typer.Option("--attention", help="How tokens read, separated by commas: dense, sparse, snapkv.")] = "dense,sparse",
    prefill: Annotated[str, typer.Option(help="Attention policy with which the context is read.")] = "adaptive",
    num_tokens: Annotated[int, typer.Option("--tokens", help="Tokens to time at each context.")] = 64,
    text: Annotated[str, typer.Option(help="What to read: code, novel, qa.")] = "code",
    output: Output = None,
    *,
    config: EngineConfig,
) -> None:
    """Time per output token against context length, every page read or the pages that matter."""
    from zen_turbo.bench import decode

    decode.run(
        model=model,
        contexts=integers(contexts, "contexts"),
        modes=modes.split(","),
        prefill=prefill,
        num_tokens=num_tokens,
        text=text,
        config=config,
        output=output,
    )


@bench_app.command("reuse")
@engine_options
def bench_reuse(
    model: Model = DEFAULT_MODEL,
    lengths: Annotated[str, typer.Option(help="Document lengths in tokens, separated by commas; 8K is 8192.")] = "8192",
    text: Annotated[str, typer.Option(help="What to ask about: code, novel, qa.")] = "code",
    output: Output = None,
    *,
    config: EngineConfig,
) -> None:
    """What the second question about a document costs."""
    from zen_turbo.bench import reuse

    reuse.run(model=model, lengths=integers(lengths, "lengths"), text=text, config=config, output=output)


@bench_app.command("serve")
@engine_options
def bench_serve(
    model: Model = DEFAULT_MODEL,
    cases: Annotated[str, typer.Option(help="Cases, separated by commas: overhead, short_during_long, load.")] = "overhead,short_during_long,load",
    long_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the long prompt of short_during_long.")] = 131072,
    short_every_s: Annotated[float, typer.Option(help="Seconds between the short requests of short_during_long.")] = 15.0,
    clients: Annotated[int, typer.Option(min=1, help="Concurrent clients of load.")] = 64,
    minutes: Annotated[float, typer.Option(help="Minutes of load.")] = 10.0,
    output: Output = None,
    *,
    config: EngineConfig,
) -> None:
    """The server under people: what it costs, short requests beside a long one, and load."""
    from zen_turbo.bench import serve

    serve.run(
        model=model,
        cases=cases.split(","),
        long_tokens=long_tokens,
        short_every_s=short_every_s,
        clients=clients,
        minutes=minutes,
        config=config,
        output=output,
    )


@eval_app.command("passkey")
@engine_options
def eval_passkey(
    model: Model = DEFAULT_MODEL,
    lengths: Annotated[str, typer.Option(help="Prompt lengths in tokens, separated by commas; 8K is 8192.")] = "8192,16384",
    depths: Annotated[str, typer.Option(help="How many depths, evenly from 0 to 100 percent; or which, as in 0,25,90 or 25%.")] = "11",
    seeds: Annotated[int, typer.Option(help="Prompts per length and depth.")] = 1,
    share_prefix: Annotated[bool, typer.Option(help="Reuse the pages of what prompts have in common.")] = True,
    resume: Annotated[Path | None, typer.Option(help="Journal of finished rows. Default: beside --output.")] = None,
    output: Output = None,
    *,
    config: EngineConfig,
) -> None:
    """Find one sentence at any depth of a long prompt."""
    from zen_turbo.evals import passkey

    passkey.run(
        model=model,
        lengths=integers(lengths, "lengths"),
        depths=depths_from(depths),
        seeds=seeds,
        config=config,
        share_prefix=share_prefix,
        resume=resume,
        output=output,
    )


@eval_app.command("retrieval")
@functools.partial(engine_options, without=("attention",))
def eval_retrieval(
    model: Model = DEFAULT_MODEL,
    lengths: Annotated[str, typer.Option(help="Prompt lengths in tokens, separated by commas; 8K is 8192.")] = "32768",
    policies: Annotated[
        str, typer.Option("--attention", help="Attention policies to compare, separated by commas; adaptive:PRESET is one too.")
    ] = "dense,adaptive",
    tasks: Annotated[str, typer.Option(help="Tasks, separated by commas: multikey, multivalue, kv.")] = "multikey,multivalue,kv",
    questions: Annotated[int, typer.Option(help="Questions per length, dealt out to the tasks.")] = 200,
    text: Annotated[str, typer.Option(help="Text to hide facts in: code, novel, qa.")] = "code",
    seed: Annotated[int, typer.Option(help="Another one hides other facts in other places.")] = 0,
    output: Output = None,
    *,
    config: EngineConfig,
) -> None:
    """Facts among look-alike facts: many questions about one context, the same for every policy."""
    from zen_turbo.evals import retrieval

    retrieval.run(
        model=model,
        lengths=integers(lengths, "lengths"),
        tasks=tasks.split(","),
        policies=policies.split(","),
        num_questions=questions,
        text=text,
        seed=seed,
        config=config,
        output=output,
    )


@eval_app.command("heat-map")
def eval_heat_map(
    records: Annotated[list[Path], typer.Argument(metavar="RECORD...", help="Files that eval passkey --output wrote; their rows are joined.")],
    png: Annotated[Path | None, typer.Option(help="Picture to write.")] = None,
    page: Annotated[Path | None, typer.Option("--html", help="Page to write.")] = None,
) -> None:
    """Draw the rows of one or several records as one heat map."""
    from zen_turbo.evals import heatmap, passkey

    if png is None and page is None:
        raise ConfigurationError("Say what to write: --png, --html or both.", param="png")
    read = [heatmap.read_record(path) for path in records]
    heatmap.save([row for record in read for row in record["rows"]], title=passkey.title_of(read), png=png, page=page)
