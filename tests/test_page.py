"""The web page in a real browser, in front of the real server with a tiny random model."""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import Slowly, serving, wait_until

from zen_turbo import LLM
from zen_turbo.engine.engine import Engine
from zen_turbo.server import page as page_module
from zen_turbo.server.app import create_app
from zen_turbo.server.keys import KeyRing
from zen_turbo.server.settings import ServerSettings

sync_api = pytest.importorskip("playwright.sync_api")
expect = sync_api.expect
expect.set_options(timeout=20_000)  # a busy machine is no failure
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="the page is tested in Chromium: sudo apt-get install chromium (Fedora: dnf)")
NAME = "tiny"
LIMIT = 4096
Page = Any  # playwright's, which may be missing


@pytest.fixture(scope="module")
def engine(tiny_folder: Path) -> Engine:
    return LLM(tiny_folder, prefill_chunk_tokens=128, kv_cache_bytes=64 << 20, max_model_len=LIMIT).engine


@pytest.fixture(scope="module")
def url(engine: Engine) -> Iterator[str]:
    with serving(create_app(lambda: engine, model_name=NAME, keep_alive_s=0.2, default_max_tokens=24)) as base:
        wait_until(lambda: httpx.get(f"{base}/health").status_code == 200)
        yield base


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Page]]:
    """Opens pages of their own storage. Afterwards none of them may have complained; an answer with a bad status is no complaint."""
    contexts, complaints = [], []

    def open_page(address: str, **options: Any) -> Page:
        context = browser.new_context(**{"viewport": {"width": 1200, "height": 800}, "permissions": ["clipboard-read", "clipboard-write"], **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: message.type in ("error", "warning") and complaints.append(message.text))
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert [each for each in complaints if not each.startswith("Failed to load resource")] == []


def stored(url: str) -> dict[str, dict[str, Any]]:
    """What the server keeps, by file name."""
    return {file["filename"]: file for file in httpx.get(f"{url}/v1/files").json()["data"]}


@pytest.fixture
def no_files(url: str) -> None:
    for file in stored(url).values():
        httpx.delete(f"{url}/v1/files/{file['id']}")


@pytest.fixture
def page(open_page: Callable[..., Page], url: str, no_files: None) -> Page:
    page = open_page(url)
    expect(page.locator("#context")).to_have_text(f"{LIMIT:,} tokens")
    return page


def add(page: Page, **texts: str) -> None:
    """Adds documents NAME.txt, and waits until they are counted."""
    before = page.locator("#document-list .document").count()
    payload = [{"name": f"{name}.txt", "mimeType": "text/plain", "buffer": text.encode()} for name, text in texts.items()]
    page.locator("#files").set_input_files(payload)
    expect(page.locator('.document[data-state="ready"]')).to_have_count(before + len(texts))


def ask(page: Page, question: str) -> Any:
    """Asks, and gives the turn."""
    turns = page.locator(".turn").count()
    page.get_by_label("Question").fill(question)
    page.get_by_label("Question").press("Enter")
    expect(page.locator(".turn")).to_have_count(turns + 1)
    return page.locator(".turn").last


def done(turn: Any) -> Any:
    expect(turn).to_have_attribute("data-state", "done")
    return turn


def fact(turn: Any, term: str) -> str:
    text = turn.locator(".facts div", has=turn.page.locator(f"dt:text-is('{term}')")).locator("dd").inner_text()
    return text.replace("\u00a0", " ")


def asked(page: Page) -> list[dict[str, Any]]:
    """Bodies of the chat requests from now on."""
    bodies: list[dict[str, Any]] = []
    page.on("request", lambda request: request.url.endswith("/v1/chat/completions") and bodies.append(request.post_data_json))
    return bodies


def answers_with(page: Page, status: int = 200, body: str = "", **headers: str) -> None:
    """From now on the server's answer to a chat request is this."""
    page.unroute_all()
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=status, body=body, headers=headers))


def stream(text: str, *, whole: bool = True) -> str:
    chunks: list[Any] = [{"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}]
    chunks += [{"choices": [{"index": 0, "delta": {"content": text[at : at + 7]}, "finish_reason": None}]} for at in range(0, len(text), 7)]
    ending = [{"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}] if whole else []
    events = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks + ending]
    return "".join(events) + ("data: [DONE]\n\n" if whole else "")


def error(code: str, message: str = "It did not work", **details: Any) -> str:
    return json.dumps({"error": {"message": message, "type": "server_error", "param": None, "code": code, **details}})


# Delivery: no browser needed


def test_the_files_of_the_page_are_served(url: str) -> None:
    with httpx.Client(base_url=url) as http:
        for path in sorted(page_module.paths()):
            response = http.get(path)
            assert response.status_code == 200
            assert response.headers["cache-control"] == "no-cache" and response.headers["x-content-type-options"] == "nosniff"
            again = http.get(path, headers={"If-None-Match": f'"other", W/{response.headers["etag"]}'})
            assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", response.headers["etag"])
            assert http.get(path, headers={"If-None-Match": '"other"'}).status_code == 200
            head = http.head(path)
            assert (head.status_code, head.content, head.headers["content-type"]) == (200, b"", response.headers["content-type"])
        for path in ("/page", "/page/", "/page/nothing.js", "/page/../page.py", "/page/%2e%2e/app.py"):
            assert http.get(path).status_code == 404


def test_the_policy_lets_nothing_else_run(url: str) -> None:
    policy = dict(part.split(" ", 1) for part in httpx.get(url).headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert {policy[name] for name in ("script-src", "style-src", "connect-src", "img-src")} == {"'self'"}
    assert policy["require-trusted-types-for"] == "'script'" and policy["frame-ancestors"] == "'none'"


def test_the_page_names_no_other_host_and_only_what_exists(url: str) -> None:
    paths = page_module.paths()
    text = {path: httpx.get(url + path).text for path in paths}
    named = {match for path in paths for match in re.findall(r'(?:src|href)="([^"#]+)"|from "\./([^"]+)"', text[path])}
    targets = {f"/{target}" if target else f"/page/{module}" for target, module in named}
    assert targets | {"/"} == paths  # nothing missing, nothing left over
    outside = {match for path in paths for match in re.findall(r"https?://[\w.]+", text[path])}
    assert outside <= {"http://www.w3.org"}  # the namespace of SVG
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", "".join(text.values()))
    assert not re.search(r"\son\w+=|<script>|<style|\sstyle=", text["/"])


# A person's way through


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


# When something is wrong


@needs_browser
def test_too_long_is_said_before_and_after_asking(page: Page, engine: Engine) -> None:
    add(page, long="x y z " * 3000)
    expect(page.locator("#total")).to_contain_text(f"more than the {LIMIT:,} this model takes")
    turn = ask(page, "What?")
    alert = turn.get_by_role("alert")
    expect(alert).to_contain_text("Too long for this model.")
    expect(alert).to_have_text(re.compile(rf"are [\d,]+ tokens; with the answer, the model takes {LIMIT:,}\. Take out a document"))
    said = int(re.search(r"are ([\d,]+) tokens", alert.inner_text())[1].replace(",", ""))  # type: ignore[index]
    assert said > len(engine.tokenizer.encode("x y z " * 3000))


ERRORS = [
    (429, error("insufficient_memory", need_bytes=3 << 30, have_bytes=1 << 30), "This needs 3.00 GiB and the server can use 1.00 GiB."),
    (413, "<html>413</html>", "Too large to send. The server, or a proxy in front of it, takes no request of this size."),
    (413, error("request_too_large", num_bytes=3 << 20, max_bytes=1 << 20), "This is 3.00 MiB and the server takes 1.00 MiB."),
    (503, error("loading"), "The model is being loaded."),
    (500, error("internal_error"), "Its log says which one."),
    (400, error("invalid_request", "temperature must be between 0 and 10, not 11.0"), "temperature must be between 0 and 10, not 11.0."),
    (200, stream("Half of", whole=False), "Check that the server is running"),
    (200, "data: " + error("internal_error") + "\n\ndata: [DONE]\n\n", "The server made a mistake."),
    (0, "", "Check that the server is running"),
]


@needs_browser
def test_an_error_is_a_sentence_and_loses_nothing(page: Page) -> None:
    ask(page, "What?")
    done(page.locator(".turn"))
    for status, body, sentence in ERRORS:
        page.unroute_all()
        if status:
            answers_with(page, status, body)
        else:
            page.route("**/v1/chat/completions", lambda route: route.abort())
        turn = ask(page, "And?")
        expect(turn.get_by_role("alert")).to_contain_text(sentence)
        answers_with(page, body=stream("All is well."))
        turn.get_by_role("button", name="Ask again").click()
        expect(done(page.locator(".turn").last).locator(".answer")).to_have_text("All is well.")
    expect(page.locator(".turn")).to_have_count(1 + len(ERRORS))


@needs_browser
def test_a_setting_out_of_range_is_named(page: Page) -> None:
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Temperature").fill("11")
    expect(ask(page, "What?").get_by_role("alert")).to_contain_text("temperature must be between 0 and 10, not 11.0.")


@needs_browser
def test_a_busy_server_is_asked_again_when_it_says(page: Page) -> None:
    answers_with(page, 429, error("rate_limit_exceeded"), **{"Retry-After": "2"})
    turn = ask(page, "What?")
    expect(turn.get_by_role("alert")).to_contain_text("The server is busy. Nothing is lost: try again in 2 seconds.")
    button = turn.get_by_role("button", name="Ask again")
    expect(button).to_be_disabled()
    answers_with(page, body=stream("Now."))
    expect(button).to_be_enabled()
    button.click()
    expect(done(page.locator(".turn")).locator(".answer")).to_have_text("Now.")


@needs_browser
def test_a_failed_upload_can_be_tried_again(page: Page, url: str) -> None:
    page.route("**/v1/files", lambda route: route.fulfill(status=413, body="<html>"))
    page.locator("#files").set_input_files({"name": "big.txt", "mimeType": "text/plain", "buffer": b"Here we go."})
    expect(page.locator(".document .meta")).to_contain_text("Too large to send")
    page.unroute_all()
    page.get_by_role("button", name="Try again").click()
    expect(page.locator("#documents-sum")).to_contain_text("1 document,")
    assert list(stored(url)) == ["big.txt"]


@needs_browser
def test_a_question_waits_for_the_documents_that_are_being_sent(page: Page, url: str) -> None:
    held: list[Any] = []
    bodies = asked(page)
    page.route("**/v1/files", lambda route: held.append(route) if route.request.method == "POST" else route.continue_())
    payload = {"name": "late.txt", "mimeType": "text/plain", "buffer": b"Here we go."}

    def ask_while_sending() -> Any:
        page.locator("#files").set_input_files(payload)
        expect(page.locator('.document[data-state="sending"]')).to_be_visible()
        turn = ask(page, "What?")
        expect(turn.locator(".reading")).to_have_text("Waiting until the documents are sent")
        return turn

    turn = ask_while_sending()
    held.pop().fulfill(status=400, body=error("binary_document"))
    expect(turn.locator(".note")).to_have_text("Not asked: late.txt could not be added. Look at the documents, then ask again.")
    page.get_by_role("button", name="Delete late.txt").click()
    turn = ask_while_sending()
    page.keyboard.press("Escape")
    expect(turn).to_have_attribute("data-state", "stopped")
    turn.get_by_role("button", name="Ask again").click()
    assert bodies == []
    held.pop().continue_()
    done(page.locator(".turn").last)
    (body,) = bodies
    assert body["messages"][0]["content"][0] == {"type": "file", "file": {"file_id": stored(url)["late.txt"]["id"]}}


@needs_browser
def test_a_key_is_asked_for_and_kept_in_the_tab(open_page: Callable[..., Page], engine: Engine) -> None:
    keys = KeyRing(["right"])
    app = create_app(lambda: engine, model_name=NAME, default_max_tokens=4, settings=ServerSettings(keys=keys))
    with serving(app) as base:
        wait_until(lambda: httpx.get(f"{base}/health").status_code == 200)
        page = open_page(base)
        field = page.get_by_label("API key")
        expect(field).to_be_focused()
        page.keyboard.type("wrong")
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_have_text("The server did not accept that key.")
        field.fill("right")
        page.keyboard.press("Enter")
        expect(field).to_be_hidden()
        expect(page.locator("#model")).to_have_text(NAME)
        add(page, one="Here we go.")
        done(ask(page, "What?"))
        assert page.evaluate("Object.values(localStorage).join().includes('right')") is False
        page.reload()
        expect(page.locator(".document")).to_have_count(1)
        keys._known = KeyRing(["new"])._known  # as after a restart with another key
        page.get_by_label("Question").fill("And now?")
        page.get_by_label("Question").press("Enter")
        expect(field).to_be_visible()
        expect(page.locator(".turn")).to_have_count(1)
        expect(page.get_by_label("Question")).to_have_value("And now?")
        field.fill("new")
        page.keyboard.press("Enter")
        expect(page.get_by_label("Question")).to_be_focused()
        page.keyboard.press("Enter")
        done(page.locator(".turn").nth(1))
        page.get_by_role("button", name="Forget key").click()
        expect(field).to_be_visible()
        assert page.evaluate("sessionStorage.getItem('zen-turbo.key')") is None


@needs_browser
def test_the_page_waits_for_the_model(open_page: Callable[..., Page], engine: Engine) -> None:
    gate = threading.Event()

    def load() -> Engine:
        gate.wait(20)
        return engine

    with serving(create_app(load, model_name=NAME)) as base:
        page = open_page(base)
        expect(page.locator("#model")).to_have_text("The model is being loaded. This page will be ready when it is.")
        expect(page.get_by_role("button", name="Ask", exact=True)).to_be_disabled()
        gate.set()
        expect(page.locator("#model")).to_have_text(NAME)
        expect(page.get_by_role("button", name="Ask", exact=True)).to_be_enabled()


@needs_browser
def test_a_server_without_files_still_answers(open_page: Callable[..., Page], engine: Engine) -> None:
    with serving(create_app(lambda: engine, model_name=NAME, default_max_tokens=4)) as base:
        wait_until(lambda: httpx.get(f"{base}/health").status_code == 200)
        page = open_page(base)
        page.route("**/v1/files*", lambda route: route.fulfill(status=404, body=error("not_found")))
        page.reload()
        expect(page.locator("#no-files")).to_be_visible()
        expect(page.get_by_role("button", name="Add files")).to_be_disabled()
        done(ask(page, "What?"))


# Strangers' text

HOSTILE = """<script>window.broken = 1</script><img src=x onerror="window.broken = 1">

[click](javascript:window.broken=1) [data](data:text/html,<script>window.broken=1</script>) [rel](/v1/models) <javascript:window.broken=1>
![picture](https://example.invalid/x.png "title") [good](https://example.invalid/a?b="onmouseover="window.broken=1)

```html"><script>window.broken = 1</script>
</code></pre><script>window.broken = 1</script>
```

| <b>a</b> | b |
|---|---|
| <svg onload="window.broken=1"> | `x` |
"""


@needs_browser
def test_what_strangers_write_is_text(page: Page) -> None:
    name = '"><img src=x onerror="window.broken=1">'
    add(page, **{name: "Here we go."})
    expect(page.locator(".document .name")).to_have_text(f"{name}.txt")
    answers_with(page, body=stream(HOSTILE))
    turn = done(ask(page, "<img src=x onerror=window.broken=1>"))
    expect(turn.locator("h2")).to_have_text("<img src=x onerror=window.broken=1>")
    answer = turn.locator(".answer")
    expect(answer).to_contain_text("<script>window.broken = 1</script>")
    made = answer.locator("*").evaluate_all("nodes => nodes.map(node => node.localName)")
    assert set(made) <= {"p", "a", "span", "figure", "figcaption", "button", "pre", "code", "div", "table", "thead", "tbody", "tr", "th", "td", "br"}
    attributes = answer.locator("*").evaluate_all("nodes => nodes.flatMap(node => node.getAttributeNames())")
    assert set(attributes) <= {"href", "target", "rel", "class", "tabindex", "role", "aria-label", "type"}
    links = answer.locator("a").evaluate_all("nodes => nodes.map(node => [node.protocol, node.host, node.rel, node.target])")
    assert links == [["https:", "example.invalid", "noopener noreferrer", "_blank"]] * 2
    page.reload()
    expect(page.locator(".turn .answer")).to_contain_text("<script>")
    assert page.evaluate("window.broken") is None


MARKDOWN = [
    ("one\ntwo\n\nthree", "<p>one<br>two</p><p>three</p>"),
    ("# A `b` #\n#### c", "<h3>A <code>b</code></h3><h6>c</h6>"),
    ("#no heading", "<p>#no heading</p>"),
    ("**b** *i* ***bi***", "<p><strong>b</strong> <em>i</em> <strong><em>bi</em></strong></p>"),
    ("~~s~~ __b__ _i_", "<p><del>s</del> <strong>b</strong> <em>i</em></p>"),
    ("*a **b** c* **d *e***", "<p><em>a <strong>b</strong> c</em> <strong>d <em>e</em></strong></p>"),
    ("snake_case_name 2 * 3 * 4 **open", "<p>snake_case_name 2 * 3 * 4 **open</p>"),
    (r"\*not\* `` a`b `` `<i>`", "<p>*not* <code>a`b</code> <code>&lt;i&gt;</code></p>"),
    ("- a\n- b\n  - c\n\t- d\n- e", "<ul><li>a</li><li>b<ul><li>c</li><li>d</li></ul></li><li>e</li></ul>"),
    ("3. a\n4. b\n\n   more", '<ol start="3"><li><p>a</p></li><li><p>b</p><p>more</p></li></ol>'),
    ("text\n- a\n\nafter", "<p>text</p><ul><li>a</li></ul><p>after</p>"),
    ("1. a\n   ```\n   x\n     y\n   ```\n2. b", "<ol><li>a<pre>x\n  y</pre></li><li>b</li></ol>"),
    ("```py\nif a:\n\tb\n```\nafter", "<pre>if a:\n\tb</pre><p>after</p>"),
    ("~~~\nopen ``` still", "<pre>open ``` still</pre>"),
    ("> a\n> > b\n\nc", "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote><p>c</p>"),
    ("a\n***\nb\n- - -", "<p>a</p><hr><p>b</p><hr>"),
    ("a | b\n-|:-:\n1 | `x|y`\n2", "<table>a,b;1,x|y</table><p>2</p>"),
    ("see https://example.invalid/a_(b). ok", '<p>see <a href="https://example.invalid/a_(b)">https://example.invalid/a_(b)</a>. ok</p>'),
    ("[a *b*](http://example.invalid)", '<p><a href="http://example.invalid/">a *b*</a></p>'),
    ("[a](ftp://x) [ ](", "<p>a (ftp://x) [ ](</p>"),
    ("> " * 40 + "deep", None),
]

# Draws a text and gives its markup, short: code is its text, a table its cells.
DRAW = """async ([text, step]) => {
  const { MarkdownView } = await import("/page/markdown.js");
  const root = document.createElement("div"), view = new MarkdownView(root);
  for (let end = step; end < text.length; end += step) view.update(text.slice(0, end));
  view.update(text);
  for (const figure of root.querySelectorAll("figure")) {
    const pre = document.createElement("pre");
    pre.textContent = figure.querySelector("code").textContent;
    figure.replaceWith(pre);
  }
  for (const scrolled of root.querySelectorAll(".scrolled")) {
    const table = document.createElement("table");
    table.textContent = [...scrolled.querySelectorAll("tr")].map(row => [...row.cells].map(cell => cell.textContent).join()).join(";");
    scrolled.replaceWith(table);
  }
  for (const a of root.querySelectorAll("a")) { a.removeAttribute("rel"); a.removeAttribute("target"); }
  for (const span of root.querySelectorAll("span")) span.replaceWith(...span.childNodes);
  return root.innerHTML;
}"""


@needs_browser
def test_markdown(page: Page) -> None:
    for text, expected in MARKDOWN:
        whole = page.evaluate(DRAW, [text, 10**6])
        assert expected is None or whole == expected, text
        assert page.evaluate(DRAW, [text, 1]) == whole, f"drawn letter by letter: {text}"


@needs_browser
def test_no_text_takes_long_to_draw(page: Page) -> None:
    """A quadratic search over any of these would take minutes; the page's own timeout is what fails it."""
    for unit in ("*a ", "**a *b ", "[a](", "![[", "`a ``b ", "> ", "- ", "<http", "_a", "| a ", "https://a", "\\", "# #", "a\n", "a\n\n"):
        page.evaluate(DRAW, [unit * (100_000 // len(unit)), 10**6])


@needs_browser
def test_code_can_be_copied(page: Page) -> None:
    answers_with(page, body=stream("Look:\n\n```c\nint\ta = 1 < 2;\n```\n"))
    turn = done(ask(page, "Code?"))
    turn.locator("figure").get_by_role("button", name="Copy").click()
    expect(turn.locator("figure").get_by_role("button")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == "int\ta = 1 < 2;"


# How it looks and is reached


@needs_browser
def test_time_left(page: Page) -> None:
    """The clock of the test: ten chunks of 1,000 tokens, each 10 s, then a minute's wait for the next."""
    said = page.evaluate("""async () => {
      const { Reading } = await import("/page/reading.js");
      let now = 0;
      const reading = new Reading(() => now), said = [];
      const progress = (processed) => ({ total: 1_000_000, cache: 180_000, processed, time_ms: (processed - 180_000) * 10 });
      reading.add(progress(180_000));
      said.push(reading.secondsLeft());
      for (let i = 1; i <= 10; i += 1) { now += 10_000; reading.add(progress(180_000 + 1000 * i)); }
      said.push(reading.secondsLeft());
      now += 60_000;
      said.push(reading.secondsLeft());
      reading.add(progress(412_000));
      const { lead, number, rest } = reading.sentence();
      said.push(lead + number + rest);
      return said;
    }""")
    assert said[:3] == [None, pytest.approx(8100), pytest.approx(8040)]
    assert said[3].replace("\u00a0", " ") == "Reading: 412,000 of 1,000,000 tokens (41 %), about 1 h 40 min left, 180,000 were known already"
    words = page.evaluate("""async () => {
      const w = await import("/page/words.js");
      return [[3, 22, 58, 61, 700, 3550, 5400].map(w.timeLeft), [0.05, 3.21, 75, 4000].map(w.duration),
              [[0, 5], [1, 5000], [3, 100], [999, 1000], [5, 5], [3, 2]].map(([a, b]) => w.percent(a, b)), [12, 2048, 3 * 2 ** 30].map(w.bytes)];
    }""")
    left, *others = [[each.replace("\u00a0", " ") for each in row] for row in words]
    assert left == ["a few seconds left", *(f"about {span} left" for span in ("25 s", "1 min", "1 min", "12 min", "59 min", "1 h 30 min"))]
    assert others == [
        ["0.05 s", "3.2 s", "1 min 15 s", "1 h 6 min"],
        ["0 %", "under 0.1 %", "3 %", "99 %", "100 %", "150 %"],
        ["12 bytes", "2.00 KiB", "3.00 GiB"],
    ]


# Contrast of every text that is shown, against the nearest painted background, by WCAG's formula.
CONTRAST = """() => {
  const context = Object.assign(document.createElement("canvas"), { width: 1, height: 1 }).getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    context.clearRect(0, 0, 1, 1);
    context.fillStyle = colour;
    context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data];
  };
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const colour = rgba(getComputedStyle(node).backgroundColor);
      if (colour[3] === 255) return colour;
    }
  };
  const poor = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let seen = 0;
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !node.checkVisibility() || node.closest("button:disabled")) continue;
    const [a, b] = [light(rgba(getComputedStyle(node).color)), light(behind(node))].sort((x, y) => y - x);
    seen += 1;
    if ((a + 0.05) / (b + 0.05) < 4.5) poor.push(`${walker.currentNode.data.trim().slice(0, 40)}: ${((a + 0.05) / (b + 0.05)).toFixed(2)}`);
  }
  return [seen, poor];
}"""

WIDE_TABLE = "| " + " | ".join(f"a rather wide column {i}" for i in range(9)) + " |\n" + "|---" * 9 + "|\n" + "| x " * 9 + "|"
RICH = f"""## Result

It is **bold**, `code`, [a link](https://example.invalid) and more.

> Quoted.

```python
return 1
```

{WIDE_TABLE}

{"word" * 100}

```
{"y" * 400}
```
"""


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_in_both_themes(page: Page, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    for failed in (False, True):
        answers_with(page, 500 if failed else 200, error("internal_error") if failed else stream(RICH))
        expect(ask(page, "How does it look?").locator(".note" if failed else ".answer table")).to_be_visible()
    add(page, one="Here we go. ")
    page.get_by_role("button", name="Settings").click()
    seen, poor = page.evaluate(CONTRAST)
    assert seen > 40 and poor == []


@needs_browser
def test_the_theme_follows_the_system_until_it_is_chosen(page: Page) -> None:
    def dark() -> bool:
        return page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(23, 23, 22)"

    page.emulate_media(color_scheme="dark")
    assert dark()
    page.get_by_role("button", name="Use the light theme").click()
    assert not dark()
    page.reload()
    assert not dark()
    page.emulate_media(color_scheme="light")
    page.get_by_role("button", name="Use the dark theme").click()
    assert dark()
    page.get_by_role("button", name="Use the light theme").click()
    page.emulate_media(color_scheme="dark")
    assert dark(), "the system's own theme was chosen, so the page follows the system again"


@needs_browser
def test_a_phone_needs_no_sideways_scrolling(open_page: Callable[..., Page], url: str, no_files: None) -> None:
    page = open_page(url, viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    expect(page.locator("#model")).to_have_text(NAME)

    def fits() -> bool:
        return page.evaluate("document.scrollingElement.scrollWidth <= innerWidth && innerWidth === 360")

    assert fits()
    page.get_by_role("button", name="Show").click()
    add(page, **{"a_very_long_name_without_any_space_" * 4: "Here we go."})
    assert fits()
    page.get_by_label("Question").fill("A question")
    page.get_by_label("Question").press("Enter")
    expect(page.get_by_label("Question")).to_have_value("A question\n")
    answers_with(page, body=stream(RICH))
    page.get_by_role("button", name="Ask", exact=True).tap()
    done(page.locator(".turn"))
    page.get_by_role("button", name="Settings").click()
    assert fits()
    small = page.evaluate("""() => [...document.querySelectorAll("button")].filter((b) => b.checkVisibility())
      .filter((b) => b.getBoundingClientRect().height < 44).map((b) => b.textContent)""")
    assert small == []


@needs_browser
def test_everything_is_reached_by_keyboard_and_seen_to_be(page: Page) -> None:
    add(page, one="Here we go.")
    answers_with(page, body=stream(RICH))
    page.keyboard.type("What is it?")
    page.keyboard.press("Control+Enter")
    turn = done(page.locator(".turn"))
    expect(turn.locator(".facts, .answer").first).to_be_visible()
    page.evaluate("document.activeElement.blur()")
    reached, unseen = [], []
    wanted = set(page.evaluate("""() => [...document.querySelectorAll("a[href], button, input, textarea, summary, [tabindex='0']")]
      .filter((node) => node.checkVisibility() && !node.disabled).map((node, i) => (node.dataset.number = String(i)))"""))
    for _ in range(len(wanted) + 2):
        page.keyboard.press("Tab")
        number, outline = page.evaluate("""() => {
          const node = document.activeElement, style = getComputedStyle(node);
          return [node.dataset.number ?? null, style.outlineStyle === "none" ? 0 : parseFloat(style.outlineWidth)];
        }""")
        if number is not None:
            reached.append(number)
            if outline < 2:
                unseen.append(page.evaluate("document.activeElement.outerHTML"))
    assert set(reached) == wanted and unseen == []
    unnamed = page.evaluate("""() => [...document.querySelectorAll("input, textarea")]
      .filter((node) => !node.labels.length && !node.getAttribute("aria-label")).map((node) => node.id)""")
    assert unnamed == []


@needs_browser
def test_keys_of_the_question(page: Page, engine: Engine) -> None:
    field = page.get_by_label("Question")
    expect(field).to_be_focused()
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    expect(field).to_have_value("one\ntwo")
    answers_with(page, body=stream("Yes."))
    page.keyboard.press("Enter")
    expect(done(page.locator(".turn")).locator("h2")).to_have_text("one\ntwo", use_inner_text=True)
    page.unroute_all()
    with Slowly(engine, 0.02):
        turn = ask(page, "Once more, at some length. " * 10)
        field.fill("too early")
        field.press("Enter")
        expect(page.locator("#announce")).to_have_text("An answer is under way. Stop it first, or wait.")
        expect(field).to_have_value("too early")
        done(turn)


@needs_browser
def test_changes_are_announced(page: Page) -> None:
    add(page, one="Here we go.")
    expect(page.locator("#announce")).to_have_text(re.compile(r"^1 document, \d+ tokens"))
    answers_with(page, body=stream("Yes."))
    done(ask(page, "What?"))
    expect(page.locator("#announce")).to_have_text("The answer is complete.")


@needs_browser
def test_motion_is_left_out_where_it_is_unwanted(page: Page) -> None:
    page.emulate_media(reduced_motion="reduce")
    bar = "getComputedStyle(document.querySelector('#share .read')).transitionDuration"
    assert page.evaluate(bar) == "0s"
    page.emulate_media(reduced_motion="no-preference")
    assert page.evaluate(bar) != "0s"
