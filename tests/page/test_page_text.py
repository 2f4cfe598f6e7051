"""Strangers' text on the page: documents, answers, markup."""

from __future__ import annotations

from browsing import Page, add, answers_with, ask, done, expect, needs_browser, stream

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
