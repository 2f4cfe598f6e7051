"""The page when something is wrong."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from typing import Any

import httpx
from browsing import LIMIT, NAME, Page, add, answers_with, ask, asked, done, error, expect, needs_browser, stored, stream
from serving import serving, wait_until

from zen_turbo.engine.engine import Engine
from zen_turbo.server.app import create_app
from zen_turbo.server.keys import KeyRing
from zen_turbo.server.settings import ServerSettings


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
