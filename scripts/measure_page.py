"""Measures what a person waits for at the web page: the first megabyte of a novel is dropped on it, a question asked, then another one.

    .venv/bin/python scripts/measure_page.py --output results/page_novel.json

A server process with the default model (or one that runs already: --url), headless Chromium in front of it, the clock in the browser: from the
key that sends a question until the first words of its answer are drawn. Screenshots of the reading and of the end go beside the record. Needs
Chromium.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import shutil
import time
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

from zen_turbo.bench import corpora
from zen_turbo.bench.report import Experiment, Row, check_output
from zen_turbo.bench.serve import Server
from zen_turbo.cli.ask import DEFAULT_MODEL
from zen_turbo.config import EngineConfig

QUESTIONS = ("Who is the captain of the ship, and what does he want?", "Which animal is hunted in this story, and what is its name?")
COLUMNS = ("case", "prompt_tokens", "cached_tokens", "first_words_s", "whole_s", "density", "recall")
HOURS_MS = 3 * 3600e3
# Resolves with the seconds from now until the next turn's answer has words, or ended without any; the key is pressed after it began to look.
WATCH = """() => {
  const began = performance.now(), turns = document.querySelectorAll('.turn').length;
  window.firstWords = new Promise(found => {
    const look = () => {
      const all = document.querySelectorAll('.turn');
      const turn = all.length > turns && all[all.length - 1];
      if (turn && (turn.querySelector('.answer')?.textContent.trim() || turn.dataset.state === 'done')) found((performance.now() - began) / 1000);
      else requestAnimationFrame(look);
    };
    look();
  });
}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", default="turbo")
    parser.add_argument("--bytes", type=int, default=1_000_000)
    parser.add_argument("--url", help="of a server that runs already, with that preset")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    check_output(options.output)
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        raise SystemExit("The page is measured in Chromium: sudo apt-get install chromium (Fedora: dnf).")
    path = corpora.path_of("novel")
    assert path is not None
    novel = path.read_bytes()[: options.bytes].decode(errors="ignore").encode()
    settings = {"model": DEFAULT_MODEL, "preset": options.preset, "bytes": len(novel), "questions": list(QUESTIONS)}
    experiment = Experiment("bench", "page", settings=settings, output=options.output)
    config = EngineConfig.from_dict({"attention": "adaptive", "preset": options.preset})
    complaints: list[str] = []
    with contextlib.ExitStack() as stack:
        url = options.url or stack.enter_context(Server(DEFAULT_MODEL, config)).url
        playwright = stack.enter_context(sync_playwright())
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 800})
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None)
        page.goto(url)
        began = time.perf_counter()
        page.locator("#files").set_input_files([{"name": "novel.txt", "mimeType": "text/plain", "buffer": novel}])
        expect(page.locator('.document[data-state="ready"]')).to_have_count(1, timeout=600e3)
        experiment.log(f"uploaded and counted in {time.perf_counter() - began:.1f} s")
        rows: list[Row] = [{"case": "upload", "whole_s": time.perf_counter() - began}]
        for case, question in zip(("first", "follow_up"), QUESTIONS, strict=True):
            shot = options.output.with_name(f"{options.output.stem}_reading.png") if options.output and case == "first" else None
            rows.append({"case": case, **asked(page, question, shot)})
            experiment.log(f"{case}: {rows[-1]['first_words_s']:.2f} s to the first words: {rows[-1]['answer'][:200]}")
        if options.output:
            page.screenshot(path=options.output.with_suffix(".png"))
        browser.close()
    note = "Seconds from the key that sends a question to the first words of the answer on the page, and to its end."
    experiment.finish(rows, columns=COLUMNS, summary={"complaints": complaints}, note=note)


def asked(page: Page, question: str, shot: Path | None) -> Row:
    """One question, to the end of its answer, and what the page says about it."""
    page.get_by_label("Question").fill(question)
    page.evaluate(WATCH)
    began = time.perf_counter()
    page.get_by_label("Question").press("Enter")
    turn = page.locator(".turn").last
    if shot is not None:
        page.wait_for_timeout(30e3)  # there is something to see by then
        page.screenshot(path=shot)
    page.set_default_timeout(HOURS_MS)
    first_words = page.evaluate("() => window.firstWords")
    expect(turn).to_have_attribute("data-state", "done", timeout=HOURS_MS)
    whole = time.perf_counter() - began
    facts = dict(turn.locator(".facts").evaluate("all => [...all.children].map(one => [...one.children].map(cell => cell.textContent))"))
    counts = {name: int(re.sub(r"\D", "", facts[term].split("(")[0])) for name, term in (("prompt_tokens", "Prompt"), ("cached_tokens", "Cached"))}
    shares = {term.lower(): float(found[0]) / 100 for term in ("Density", "Recall") if (found := re.match(r"[\d.]+", facts.get(term, "")))}
    return {**counts, "first_words_s": first_words, "whole_s": whole, **shares, "facts": facts, "answer": turn.locator(".answer").inner_text()}


if __name__ == "__main__":
    main()
