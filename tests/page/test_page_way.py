"""A person's way through the page."""

from __future__ import annotations

import re
from pathlib import Path

import httpx
import pytest
from browsing import LIMIT, Page, add, answers_with, ask, asked, done, expect, fact, needs_browser, stored, stream
from serving import Slowly, wait_until

from zen_turbo.engine.engine import Engine


@needs_browser
def test_documents_are_counted_read_and_answered_from(page: Page, url: str, engine: Engine) -> None:
    requests = asked(page)
    texts = {"grass": "The grass is green. " * 60, "sky": "The sky is blue. " * 50}
    add(page, **texts)
    tokens = {name: file["zen_turbo"]["tokens"] for name, file in stored(url).items()}
    assert set(tokens) == {"grass.txt", "sky.txt"} and min(tokens.values()) > 300
    for name, number in tokens.items():
        expect(page.locator(".document", has_text=name).locator(".meta")).to_have_text(f"{number:,} tokens")
    total = sum(tokens.values())
    expect(page.locator("#documents-sum")).to_contain_text(f"2 documents, {total:,} tokens, {round(100 * total / LIMIT)} % of the context")
    page.get_by_label("Question").fill("What is green?")
    about = page.locator("#total")
    alone = len(engine.chat_template.encode([{"role": "user", "content": "What is green?"}]))
    expect(about).to_contain_text(f"About {total + alone:,} tokens")

    with Slowly(engine, 0.1):
        page.get_by_role("button", name="Ask", exact=True).click()
        turn = page.locator(".turn").last
        line = turn.locator(".reading")
        expect(line).to_have_text(re.compile(r"^Reading: [\d,]+ of [\d,]+ tokens \(\d+\s%\), (about|a few)\s.* left"))
        expect(page).to_have_title(re.compile(r"^\d+\s% read · zen-turbo$"))
        expect(turn.get_by_role("progressbar")).to_have_attribute("aria-valuetext", re.compile("^Reading: "))
        expect(page.get_by_role("button", name="Stop")).to_be_visible()
    done(turn)
    (request,) = requests
    parts = request["messages"][0]["content"]
    assert [part["type"] for part in parts] == ["file", "file", "text"] and parts[2]["text"] == "What is green?"
    expected = httpx.post(f"{url}/v1/chat/completions", json={**request, "stream": False, "return_progress": False}, timeout=60).json()
    drawn = turn.locator(".answer").inner_text()
    assert re.sub(r"\W", "", drawn) == re.sub(r"\W", "", expected["choices"][0]["message"]["content"])
    assert fact(turn, "Prompt") == f"{expected['usage']['prompt_tokens']:,} tokens" and fact(turn, "Cached") == "0 (0 %)"
    assert fact(turn, "Density") == "100.0 %" and fact(turn, "Recall") == "all was read"
    assert re.fullmatch(r"[\d.]+ (s|min .*)", fact(turn, "TTFT"))
    expect(line).to_be_hidden()
    expect(page).to_have_title("zen-turbo")
    expect(page.get_by_label("Question")).to_be_focused()


@needs_browser
def test_the_next_question_starts_after_what_is_known(page: Page) -> None:
    requests = asked(page)
    add(page, story="There and back again. Here we go. " * 30)
    answers_with(page, body=stream("The first answer."))
    done(ask(page, "First?"))
    page.unroute_all()
    turn = done(ask(page, "Second?"))
    messages = requests[-1]["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert [part["type"] for part in messages[0]["content"]] == ["file", "text"]
    assert (messages[1]["content"], messages[2]["content"]) == ("The first answer.", "Second?")
    turn = done(ask(page, "Third?"))
    cached = int(fact(turn, "Cached").split()[0].replace(",", ""))
    assert cached > 300
    page.locator(".document input").uncheck()
    done(ask(page, "Without the document?"))
    assert all(isinstance(message["content"], str) for message in requests[-1]["messages"])


@needs_browser
@pytest.mark.parametrize("way", ["button", "escape"])
def test_stop_ends_the_engines_request(page: Page, engine: Engine, way: str) -> None:
    add(page, long=f"Something new {way}. " * 150)
    with Slowly(engine, 0.2):
        turn = ask(page, "What?")
        expect(turn.locator(".reading strong")).to_have_text(re.compile("^[1-9]"))  # a chunk is read
        assert engine.has_work()
        if way == "button":
            page.get_by_role("button", name="Stop").click()
            expect(page.get_by_label("Question")).to_be_focused()
        else:
            page.keyboard.press("Escape")
        expect(turn.locator(".note")).to_have_text("Stopped. What was read is kept, so asking again goes on from there.")
        wait_until(lambda: not engine.has_work())
    turn.get_by_role("button", name="Ask again").press("Enter")
    expect(page.locator(".turn")).to_have_count(1)
    turn = done(page.locator(".turn"))
    expect(page.get_by_label("Question")).to_be_focused()
    assert int(fact(turn, "Cached").split()[0].replace(",", "")) >= 128  # a whole chunk was read before


@needs_browser
def test_an_answer_can_be_stopped_and_the_half_is_kept(page: Page, engine: Engine) -> None:
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Longest answer, tokens").fill("2000")
    with Slowly(engine, 0.03):
        turn = ask(page, "Tell a long story, with all the details there are.")
        expect(turn).to_have_attribute("data-state", "writing")
        page.keyboard.press("Escape")
        expect(turn.locator(".note")).to_have_text("Stopped.")
        wait_until(lambda: not engine.has_work())
    expect(turn.locator(".answer")).not_to_be_empty()


@needs_browser
def test_a_document_is_deleted_when_that_is_confirmed(page: Page, url: str) -> None:
    add(page, one="Here we go.", two="The sun is yellow.")
    page.get_by_role("button", name="Delete one.txt").click()
    page.get_by_role("dialog").get_by_role("button", name="Keep").click()
    expect(page.locator(".document")).to_have_count(2)
    page.get_by_role("button", name="Delete one.txt").click()
    expect(page.get_by_role("dialog")).to_contain_text("Delete one.txt from the server?")
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(page.locator(".document")).to_have_count(1)
    assert list(stored(url)) == ["two.txt"]


@needs_browser
def test_a_document_that_somebody_else_deleted(page: Page, url: str) -> None:
    add(page, stays="Here we go.", goes="There and back again.")
    httpx.delete(f"{url}/v1/files/{stored(url)['goes.txt']['id']}")
    turn = ask(page, "What?")
    expect(turn.get_by_role("alert")).to_contain_text("A document is gone")
    expect(page.locator(".document")).to_have_count(1)
    turn.get_by_role("button", name="Ask again").click()
    done(page.locator(".turn").last)


@needs_browser
def test_a_dropped_folder_is_walked(page: Page, url: str, tmp_path: Path) -> None:
    for name, content in {
        "project/src/main.py": b"def add(a, b):\n    return a + b\n",
        "project/src/deep/er/notes.md": b"# Notes\n",
        "project/README": b"Here we go.",
        "project/.git/config": b"[core]",
        "project/.env": b"SECRET=1",
        "project/node_modules/left/pad.js": b"module.exports = 1",
        "project/logo.png": b"\x89PNG\r\n\x1a\n\0\0\0",
        "project/empty.txt": b"",
        "project/latin.txt": b"caf\xe9",
        "alone.txt": b"The sky is blue.",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    session = page.context.new_cdp_session(page)
    data = {"items": [], "files": [str(tmp_path / "project"), str(tmp_path / "alone.txt")], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver"):
        session.send("Input.dispatchDragEvent", {"type": kind, "x": 600, "y": 300, "data": data})
    expect(page.get_by_text("Drop files or a folder", exact=True)).to_be_visible()
    session.send("Input.dispatchDragEvent", {"type": "drop", "x": 600, "y": 300, "data": data})
    expect(page.get_by_text("Drop files or a folder", exact=True)).to_be_hidden()
    # Only the server sees that one of them is not UTF-8, and its refusal is shown.
    expect(page.locator(".document.folder .meta").first).to_contain_text("4 files")
    expect(page.locator(".document.folder .meta").first).to_contain_text("1 failed")
    expect(page.locator("#documents-sum")).to_contain_text("4 documents")
    assert sorted(stored(url)) == ["alone.txt", "project/README", "project/src/deep/er/notes.md", "project/src/main.py"]
    page.locator("#skipped summary").click()
    skipped = page.locator("#skipped")
    expect(skipped.locator("summary")).to_have_text("5 left out: 2 hidden, 1 empty, 1 not text, 1 installed packages")
    expect(skipped.locator("li")).to_have_text(
        [
            "project/.env: hidden",
            "project/.git: hidden",
            "project/empty.txt: empty",
            "project/logo.png: not text",
            "project/node_modules: installed packages",
        ]
    )
    page.get_by_role("button", name="Show files").click()
    expect(page.locator(".inside .document")).to_have_count(4)
    expect(page.locator(".inside .document", has_text="latin.txt")).to_contain_text("latin.txt is not text")
    page.get_by_role("checkbox", name="README").uncheck()
    expect(page.locator("#documents-sum")).to_contain_text("3 of 4 documents")
    assert page.locator(".document.folder > label input").evaluate("box => box.indeterminate")
    page.get_by_role("button", name="Delete folder project").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(page.locator(".document")).to_have_count(1)
    assert list(stored(url)) == ["alone.txt"]


@needs_browser
def test_a_chosen_folder_is_filtered_the_same_way(page: Page, url: str, tmp_path: Path) -> None:
    for name in ("a.txt", ".hidden/b.txt", "node_modules/c.js"):
        (tmp_path / ".notes" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / ".notes" / name).write_text("Here we go.")
    page.locator("#folder").set_input_files(tmp_path / ".notes")
    expect(page.locator("#documents-sum")).to_contain_text("1 document,")
    assert list(stored(url)) == [".notes/a.txt"]
    expect(page.locator("#skipped summary")).to_contain_text("2 left out")


@needs_browser
def test_what_survives_a_reload(page: Page) -> None:
    add(page, one="Here we go.", two="The sun is yellow.")
    page.get_by_role("checkbox", name="two.txt").uncheck()
    answers_with(page, body=stream("Kept **well**."))
    done(ask(page, "Is it kept?"))
    page.get_by_label("Question").fill("half a thought")
    page.reload()
    expect(page.locator(".turn h2")).to_have_text("Is it kept?")
    expect(page.locator(".turn .answer strong")).to_have_text("well")
    expect(page.get_by_role("checkbox", name="one.txt")).to_be_checked()
    expect(page.get_by_role("checkbox", name="two.txt")).not_to_be_checked()
    expect(page.get_by_label("Question")).to_have_value("half a thought")
    page.get_by_role("button", name="New conversation").click()
    page.get_by_role("dialog").get_by_role("button", name="Start anew").click()
    expect(page.locator(".turn")).to_have_count(0)
    page.reload()
    expect(page.locator("#documents-sum")).to_contain_text("1 of 2 documents")
    expect(page.locator(".turn")).to_have_count(0)


@needs_browser
def test_a_page_left_while_reading_says_so_afterwards(page: Page, engine: Engine) -> None:
    add(page, long="Not read to its end. " * 120)
    with Slowly(engine, 0.2):
        expect(ask(page, "What?")).to_have_attribute("data-state", "reading")
        page.reload()
        expect(page.locator(".turn .note")).to_have_text("The page was left while this was under way.")
        expect(page.get_by_role("button", name="Ask again")).to_be_visible()
        wait_until(lambda: not engine.has_work())
