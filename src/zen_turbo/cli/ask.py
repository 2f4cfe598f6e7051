"""``zen-turbo ask``: the main job, a question about documents. The answer is all that goes to standard output."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from zen_turbo.cli.engine_flags import engine_options
from zen_turbo.config import EngineConfig

if TYPE_CHECKING:
    from zen_turbo.engine.request import RequestMetrics, RequestOutput
    from zen_turbo.llm import LLM

DEFAULT_MODEL = "qwen2.5-coder-0.5b-instruct"
MODEL_HELP = "Catalogue name, path of a GGUF file or checkpoint folder, or hub name."
_SHOWN_SKIPPED_FILES = 10


@engine_options
def ask(
    question: Annotated[str, typer.Argument(help="What you want to know.")],
    documents: Annotated[
        list[Path],
        typer.Argument(metavar="FILE|FOLDER...", help="Text, source code, Markdown, HTML, PDF, EPUB, DOCX, ZIP archives of these, or folders."),
    ],
    model: Annotated[str, typer.Option("--model", "-m", help=MODEL_HELP)] = DEFAULT_MODEL,
    max_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the smallest set of tokens with this probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Sample from this many tokens at most; 0 is no limit.")] = 0,
    min_p: Annotated[float, typer.Option(help="Least probability, relative to the likeliest token's.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the answer; may be given several times.")] = None,
    *,
    config: EngineConfig,
) -> None:
    """Ask a question about documents and get the answer.

    Documents are text, source code, Markdown, HTML, PDF (text layer), EPUB and DOCX files, ZIP archives of these, and folders, which are read
    recursively.
    """
    from zen_turbo.engine.request import Event, SamplingParams, TokenDelta
    from zen_turbo.errors import EmptyPromptError
    from zen_turbo.progress import prefill_bar
    from zen_turbo.text.documents import build_messages, read_documents

    if not question.strip():
        raise EmptyPromptError("The question is empty.", param="question")
    sampling = SamplingParams(
        temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed, max_tokens=max_tokens, stop=tuple(stop or ())
    )
    reading = read_documents(documents)
    if reading.skipped:
        print(f"{len(reading.skipped)} files were left out:", file=sys.stderr)
        for label, reason in reading.skipped[:_SHOWN_SKIPPED_FILES]:
            print(f"  {label}: {reason}", file=sys.stderr)
        if len(reading.skipped) > _SHOWN_SKIPPED_FILES:
            print(f"  and {len(reading.skipped) - _SHOWN_SKIPPED_FILES} more", file=sys.stderr)
    llm = load_llm(model, config)
    prompt = llm.engine.chat_template.encode(build_messages(reading.documents, question))
    print(f"{len(reading.documents)} document(s), {len(prompt):,} tokens", file=sys.stderr)
    with prefill_bar("reading") as display:

        def on_event(event: Event) -> None:
            display(event)
            if isinstance(event, TokenDelta) and event.text:
                print(event.text, end="", flush=True)

        try:
            output = llm.generate(prompt, sampling, on_event=on_event)
        finally:
            print(flush=True)
    print(figures(llm, output), file=sys.stderr)
    llm.engine.close()


def load_llm(model: str, config: EngineConfig) -> LLM:
    """Download the model if need be and load it, with bars on standard error."""
    from zen_turbo.llm import LLM
    from zen_turbo.models.catalogue import resolve_model
    from zen_turbo.progress import download_bar, layer_bar

    with download_bar() as progress:
        resolve_model(model, progress=progress)
    with layer_bar("loading") as on_layer:
        return LLM(model, config=config, on_layer=on_layer)


def figures(llm: LLM, output: RequestOutput) -> str:
    """One line: what was read, how fast, how long the answer took, with what."""
    from zen_turbo import native
    from zen_turbo.engine.memory import peak_rss_bytes

    metrics = output.metrics
    read = output.prompt_tokens - output.cached_tokens
    written = len(output.token_ids)
    parts = [
        f"prompt {output.prompt_tokens:,} tokens" + (f" ({output.cached_tokens:,} cached)" if output.cached_tokens else ""),
        f"first token after {metrics.ttft_s:.1f} s ({read / max(metrics.prefill_s, 1e-9):,.0f} tokens/s)",
        f"answer {written} tokens" + (f" ({(written - 1) / metrics.decode_s:.1f} tokens/s)" if written > 1 and metrics.decode_s else ""),
        f"attention {llm.engine.config.attention} on {native.selected_isa()}" + kept_text(metrics),
        f"peak memory {peak_rss_bytes() / 2**30:.1f} GiB",
    ]
    if output.finish_reason == "length":
        parts.append("the answer reached --max-tokens")
    return ", ".join(parts)


def kept_text(metrics: RequestMetrics) -> str:
    """What a sparse prefill kept; nothing for a dense one."""
    if metrics.recall is None:
        return ""
    return f" (read {metrics.density:.1%} of the block pairs and kept {metrics.recall:.1%} of the attention where it was sampled)"
