"""HTML to text: blocks become lines, table cells are separated by tabs, preformatted text keeps its spaces."""

from __future__ import annotations

import html.parser
import re

_HIDDEN = frozenset(("script", "style", "template", "title"))
_BLOCKS = frozenset(
    """address article aside blockquote body br dd div dl dt figcaption figure footer form h1 h2 h3 h4 h5 h6 header hr li main nav ol p pre
    section table tbody tfoot thead tr ul""".split()
)
_CELLS = frozenset(("td", "th"))
_WHITE_SPACE = re.compile(r"\s+")


class _Text(html.parser.HTMLParser):
    """``lines``: the finished ones."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.lines: list[str] = []
        self._line: list[str] = []
        self._hidden = 0
        self._preformatted = 0
        self._first_cell = True

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._hidden += tag in _HIDDEN
        if tag in _BLOCKS:
            self.end_line()
            self._first_cell = self._first_cell or tag == "tr"
        elif tag in _CELLS:
            if not self._first_cell:
                self._line.append("\t")
            self._first_cell = False
        self._preformatted += tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        if tag in _HIDDEN and self._hidden:
            self._hidden -= 1
        if tag in _BLOCKS:
            self.end_line()
        if tag == "pre" and self._preformatted:
            self._preformatted -= 1

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self._line.append(data if self._preformatted else _WHITE_SPACE.sub(" ", data))

    def end_line(self) -> None:
        text = "".join(self._line)
        self._line.clear()
        if self._preformatted:
            self.lines += [line.rstrip() for line in text.strip("\r\n").splitlines()]
            return
        line = "\t".join(" ".join(cell.split()) for cell in text.split("\t")).rstrip()  # tabs are between cells only
        if line:
            self.lines.append(line)


def html_to_text(source: str) -> str:
    """The text that a reader of the page would see, without scripts, styles and the title; malformed HTML is read as far as it goes."""
    parser = _Text()
    parser.feed(source)
    parser.close()
    parser.end_line()
    return "\n".join(parser.lines)
