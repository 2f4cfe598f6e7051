"""How the page looks and is reached: themes, phones, keys, readers."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from browsing import NAME, Page, add, answers_with, ask, done, error, expect, needs_browser, stream
from serving import Slowly

from zen_turbo.engine.engine import Engine


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
